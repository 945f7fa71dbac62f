"""Federated rounds as a whole, on the fake network: the sum is the plain average, or there is none (rung T1, SPEC §14)."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement
from math import inf
from typing import Any

import msgpack
import numpy as np
import pytest
from roundnet import DEADLINES as QUICK
from roundnet import SHARD, RoundNet
from simnet import Faults

from shoal.protocol.effects import Received
from shoal.protocol.errors import ConfigError, RoundClosed
from shoal.protocol.federated import Aggregate
from shoal.protocol.join import CLEAR, SECAGG
from shoal.protocol.messages import Refused
from shoal.protocol.rounds import READY, Advertise, Deal, Invite, Masked, Noted, Relay, Released, Unmask, Withdraw
from shoal.protocol.secure.privacy import Skellam
from shoal.protocol.session import TURN, Slice
from shoal.ps.recipe import DEADLINES, Recipe
from shoal.ps.round import Stage
from shoal.worker.round import Phase

SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))
SCHEDULES = int(os.environ.get("SHOAL_ROUNDS", "500"))
SIZES = {1: (5,), 2: (5, 3), 3: (4, 0, 7)}


@pytest.mark.parametrize("protection", [SECAGG, CLEAR])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("workers", [3, 5, 10])
def test_a_round_is_the_weighted_average(workers: int, shards: int, protection: str) -> None:
    """Of updates, at every shard, and of metrics; two rounds one after the other, on weights that have changed."""
    recipe = Recipe(protection, rounds=2, cap=4.0, reference=2.0, metrics=("loss", "accuracy"))
    net = RoundNet(workers + shards, workers, SIZES[shards], recipe)

    assert net.go(2)
    assert 2 == net.check()
    assert [0, 1] == [end.round for end in net.coordinator.ended]
    for end in net.coordinator.ended:
        assert end.released is not None
        _, names, _ = net.expected(end.session)
        inputs = [net.world.inputs[end.session, name] for name in names]
        weights = [min(each.weight / 2.0, 4.0) for each in inputs]
        for name, found in end.released.metrics:
            assert found == pytest.approx(
                np.average([each.metrics[name] for each in inputs], weights=weights), abs=1e-6
            )
        assert end.released.capped == sum(each.weight > 8.0 for each in inputs)
        assert end.released.weight == pytest.approx(sum(weights))
    results = [end.result for worker in net.workers.values() for end in worker.ends]
    assert all(result is not None and result.survivors == workers for result in results)
    assert all(worker.client.phase == Phase.IDLE for worker in net.workers.values())


@pytest.mark.parametrize("recipe", [Recipe(bits=16), Recipe(active=True), Recipe(clip=0.01, bits=16, cap=2.0)], ids=str)
def test_a_round_under_other_plans(recipe: Recipe) -> None:
    """With a modulus of 16 bits, with signatures and consent, with a clip that cuts most of what is sent."""
    net = RoundNet(5, 5, (40, 30), replace(recipe, rounds=1))
    for worker in net.workers.values():
        plain = worker.plain
        worker.make = lambda plan, plain=plain: replace(plain(plan), update=plain(plan).update * 3)

    assert net.go()
    assert 1 == net.check()
    (end,) = net.coordinator.ended
    assert end.released is not None and end.released.clipped > 100


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_sum_of_extremes_does_not_wrap(sign: float) -> None:
    """All clients at the clip, with the largest weight."""
    net = RoundNet(7, 10, (9,), Recipe(rounds=1, cap=2.0, bits=16))
    for worker in net.workers.values():
        plain = worker.plain
        worker.make = lambda plan, plain=plain: replace(
            plain(plan), update=np.full(plan.elements, sign * plan.clip, np.float32), weight=1e9
        )

    assert net.go()
    assert 1 == net.check()


def test_noise_is_added_and_the_rest_is_the_average() -> None:
    """With distributed noise the average is off by what the plan says, and by not much more."""
    elements = 400
    noise = Skellam(clip=1.0, multiplier=0.5, units=1 << 12, honest=3)
    net = RoundNet(3, 5, (250, 150), Recipe(rounds=1, noise=noise, minimum=4))
    for worker in net.workers.values():
        plain = worker.plain
        worker.make = lambda plan, plain=plain: replace(plain(plan), update=np.full(elements, 0.01, np.float32))

    assert net.go()
    found = np.concatenate([shard.applied[0][2] for shard in net.shards.values()])
    deviation = noise.multiplier * noise.clip * math.sqrt(5 / noise.honest) / 5
    assert abs(found.mean() - 0.01) < 6 * deviation / math.sqrt(elements)
    assert 0.8 < found.std() / deviation < 1.2


# --- who is gone

STAGES = (Stage.ADVERTISE, Stage.DEAL, Stage.MASKED, Stage.CONSENT, Stage.UNMASK)
GROUPS = [(3, 2, 1, False), (5, 4, 2, True), (6, 4, 3, False), (7, 5, 2, True), (10, 7, 2, False)]


def cluster(workers: int, threshold: int, shards: int, active: bool, seed: int = 1) -> RoundNet:
    dropout = (workers - threshold) / workers
    recipe = Recipe(active=active, threshold=threshold, minimum=threshold, corrupt=0.0, dropout=dropout, rounds=1)
    net = RoundNet(seed, workers, SIZES[shards], recipe)
    for worker in net.workers.values():
        worker.client.policy = replace(worker.client.policy, corrupt=0.0)
    return net


def kill_at(net: RoundNet, stage: Stage, names: list[str]) -> None:
    net.when(lambda: net.stage == stage, lambda: [net.lose(name) for name in names] and None)


@pytest.mark.parametrize(
    ("workers", "threshold", "shards", "active", "stage"),
    [(*group, stage) for group in GROUPS for stage in STAGES if group[3] or stage != Stage.CONSENT],
)
def test_as_many_may_drop_out_as_the_threshold_says(
    workers: int, threshold: int, shards: int, active: bool, stage: Stage
) -> None:
    """At any stage, 1 to N - t clients are gone, and the sum is exact; one more, and nothing is applied."""
    for count in range(1, workers - threshold + 2):
        net = cluster(workers, threshold, shards, active, seed=count)
        kill_at(net, stage, [f"w{number}" for number in range(1, count + 1)])
        assert net.go(), (count, net.stage)
        assert net.check() == (count <= workers - threshold), (count, net.coordinator.ended)
        (end,) = net.coordinator.ended
        if end.released is None:
            assert end.why
            errors = [worker.ends[-1].error for name, worker in net.workers.items() if name in net.nodes]
            assert all(isinstance(error, RoundClosed) for error in errors)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != Stage.CONSENT])
def test_a_third_of_fifty_may_drop_out(stage: Stage) -> None:
    """16 of 50 are gone, at any stage, and the sum is exact; with 17 nothing is applied."""
    for count in (16, 17):
        net = cluster(50, 34, 1, False, seed=count)
        kill_at(net, stage, [f"w{number}" for number in range(1, count + 1)])
        assert net.go(), (count, net.stage)
        assert net.check() == (count == 16), (count, net.coordinator.ended)


@pytest.mark.parametrize("stages", list(combinations_with_replacement(STAGES, 2)), ids=str)
def test_two_drop_out_at_different_stages(stages: tuple[Stage, Stage]) -> None:
    """Of six, with a threshold of four, whatever the stages: what is released is the average of those who are in."""
    net = cluster(6, 4, 2, False)
    for name, stage in zip(("w2", "w5"), stages, strict=True):
        kill_at(net, Stage.UNMASK if stage == Stage.CONSENT else stage, [name])

    assert net.go()
    assert 1 == net.check()


def test_many_clients_are_neighbours_of_few() -> None:
    """Above 128 each has a few neighbours on a ring; three drop out when their shares are dealt, and the sum is exact."""
    net = RoundNet(1, 130, (4, 3), Recipe(rounds=1, corrupt=0.05, dropout=0.05, room=16))
    for worker in net.workers.values():
        worker.client.policy = replace(worker.client.policy, corrupt=0.05)
    kill_at(net, Stage.MASKED, ["w3", "w50", "w99"])

    assert net.go()
    assert 1 == net.check()
    (session,) = net.world.sessions.values()
    assert session.plan.degree < 20 and 127 == len(session.survivors)


def test_who_is_gone_holds_nobody_up() -> None:
    """Where one client has its turn at a time, one that dies has it until its lease ends, and not until its turn does."""
    net = RoundNet(3, 5, (5, 3), Recipe(rounds=1, room=1))
    began: list[float] = []

    def die() -> None:
        began.append(net.now)
        net.lose("w1", lease=1.0)

    net.when(lambda: net.stage == Stage.MASKED, die)

    assert net.go()
    assert 1 == net.check() and net.now - began[0] < 4.0 < QUICK[TURN]
    assert max(shard.peak for shard in net.shards.values()) <= 4 * 5 + Slice(5, 4, 4).size


def test_a_slice_that_one_shard_lacks_is_added_by_none() -> None:
    """A client that reaches one shard only is out of the sum at both."""
    net = RoundNet(3, 5, (5, 3), Recipe(rounds=1))
    net.cut.add(frozenset(("w4", "s1")))

    assert net.go()
    assert 1 == net.check()
    assert "w4" not in net.expected(net.coordinator.ended[0].session)[1]
    assert isinstance(net.workers["w4"].ends[0].error, RoundClosed)


def test_more_are_invited_than_are_wanted() -> None:
    """Of six invited the first four who are ready are taken; the others hear it at once. Each round draws anew."""
    net = RoundNet(3, 8, (5,), Recipe(rounds=12, clients=4, over=0.5, threshold=3, minimum=3, corrupt=0.0, dropout=0.5))
    for worker in net.workers.values():
        worker.client.policy = replace(worker.client.policy, corrupt=0.0)

    assert net.go(12)
    assert 12 == net.check()
    chosen = Counter(name for session, name in net.world.inputs)
    assert all(4 <= len(net.expected(end.session)[1]) <= 6 for end in net.coordinator.ended)
    assert 8 == len(chosen) and max(chosen.values()) <= 12
    assert all(6 == len(held._cohort) for held in net.world.sessions.values())


def test_no_round_begins_with_too_few() -> None:
    """Fewer workers than are wanted, or than a secure round needs: nobody is invited, and the log says why, once."""
    net = RoundNet(3, 2, (5,), Recipe(rounds=1, least=1))
    net.coordinator.rounds.recipe = replace(net.recipe, least=1)
    net.run(20.0, lambda: False)

    assert not net.coordinator.ended
    assert 1 == len([text for text in net.coordinator.log if "3" in text])
    with pytest.raises(ConfigError):
        net.recipe.plan(1, 0, 2, (5,), bytes(32), bytes(32))
    with pytest.raises(ConfigError, match="7 stages"):
        replace(net.recipe, deadlines=DEADLINES[:3]).plan(1, 0, 5, (5,), bytes(32), bytes(32))


# --- what comes late, again, or from elsewhere


def test_what_comes_late_is_refused() -> None:
    """A deal after its stage, and anything after the end: `round_closed`, and the client ends with `RoundClosed`."""
    net = RoundNet(3, 5, (5,), Recipe(rounds=1, corrupt=0.0, dropout=0.4, threshold=3, minimum=3))
    for worker in net.workers.values():
        worker.client.policy = replace(worker.client.policy, corrupt=0.0)
    net.workers["w1"].seconds = lambda: 30.0  # the deadline is 20

    assert net.go()
    assert 1 == net.check()
    assert "w1" not in net.expected(net.coordinator.ended[0].session)[1]
    assert isinstance(net.workers["w1"].ends[0].error, RoundClosed)
    assert not net.workers["w1"].ends[0].released
    session = net.coordinator.ended[0].session
    for message in (Advertise(1, session, (b"",)), Deal(1, session, (b"",)), Unmask(1, session, (), (b"",))):
        (answer,) = net.coordinator.rounds.handle(received(message), net.now)
        assert isinstance(answer.message, Refused)
        assert (session, "round_closed") == (answer.message.request, answer.message.code)
    assert not net.coordinator.rounds.handle(received(Withdraw(1, session, "RoundClosed")), net.now)
    assert not net.coordinator.rounds.handle(received(Noted(1, session, 66, 0)), net.now)


def received(message: Any) -> Any:
    return Received(b"", message)


def test_somebody_who_takes_no_part_is_refused() -> None:
    """At the coordinator, and at a shard; the round goes on."""
    net = RoundNet(3, 5, (5,), Recipe(rounds=1))
    answers = []

    def intrude() -> None:
        session = net.coordinator.rounds.session
        assert session is not None
        shard = net.shards[0]
        for message in (Deal(99, session.number, (b"",)), Advertise(99, session.number, (b"",))):
            answers.extend(
                say.message for say in net.coordinator.rounds.handle(received(message), net.now) if say.to == 99
            )
        for wrong in (Masked(99, SHARD, session.number, 0, (b"1",)), Masked(1, SHARD, 5, 0, (b"1",))):
            answers.extend(send.message for send in shard.accumulator.handle(received(wrong), net.now))

    net.when(lambda: net.stage == Stage.MASKED and net.shards[0].accumulator._sum is not None, intrude)
    assert net.go()
    assert 1 == net.check()
    assert 4 == len(answers)
    assert all(isinstance(answer, Refused) and "round_closed" == answer.code for answer in answers)


# --- crashes


@pytest.mark.parametrize(
    ("stage", "active"),
    [(stage, stage == Stage.CONSENT) for stage in Stage] + [(Stage.UNMASK, True), (Stage.FINISH, True)],
)
def test_a_coordinator_that_crashes_leaves_no_half_round(stage: Stage, active: bool) -> None:
    """At any stage: the next one asks the shards, ends the session alike at all of them, and the rounds go on, counted."""
    recipe = Recipe(active=active, rounds=2)
    if stage == Stage.MEASURE:
        recipe = Recipe(CLEAR, rounds=2, training=Aggregate("krum").settings)
    net = RoundNet(3, 5, (5, 3), recipe)
    before: list[int] = []
    if stage == Stage.ABANDONED:
        kill_at(net, Stage.DEAL, ["w1", "w2", "w3"])
    if stage == Stage.RELEASED:  # one shard hears of it, the other does not
        net.coordinator.lie = lambda to, message: (
            [] if isinstance(message, Released) and to >= SHARD + 100 else [message]
        )
        wanted = lambda: bool(net.shards[0].applied)  # noqa: E731
    elif stage == Stage.FINISH:  # all shards are ready, and the coordinator does not know it yet
        wanted = lambda: all(READY == shard.accumulator._last[1] for shard in net.shards.values())  # noqa: E731
    else:
        wanted = lambda: net.stage == stage  # noqa: E731

    def crash() -> None:
        net.crash("coordinator")
        before.extend(len(shard.applied) for shard in net.shards.values())
        if stage == Stage.ABANDONED:
            net.recipe = replace(net.recipe, least=2, threshold=2, minimum=2, corrupt=0.0, dropout=0.0)
            for worker in net.workers.values():
                worker.client.policy = replace(worker.client.policy, corrupt=0.0)
        net.at(net.now + 2.0, lambda: net.start_coordinator(2) and None)

    net.when(wanted, crash)
    assert net.run(400.0, lambda: net.coordinator.rounds.run == 2 and net.over())
    first = [[number for run, number, _ in shard.applied if run == 1] for shard in net.shards.values()]
    assert ([[0], [0]] if stage == Stage.RELEASED else [[], []]) == first
    second = [[number for run, number, _ in shard.applied if run == 2] for shard in net.shards.values()]
    assert [[0], [0]] == second and net.coordinator.rounds.completed == 1 + (stage == Stage.RELEASED)
    assert [(1, 0), (0, 0)][stage != Stage.RELEASED] == tuple(before)


@pytest.mark.parametrize("stage", [Stage.DEAL, Stage.MASKED, Stage.UNMASK, Stage.FINISH], ids=lambda stage: stage.name)
def test_a_shard_that_crashes_ends_the_round_for_all(stage: Stage) -> None:
    """Nothing is applied anywhere; the round is tried again, under another number if somebody has unmasked."""
    net = RoundNet(3, 5, (5, 3), Recipe(rounds=1))

    def crash() -> None:
        net.crash("s1")
        net.at(net.now + 0.2, lambda: net.start_shard(1, life=1) and None)

    net.when(lambda: net.stage == stage, crash)
    assert net.go(2)
    first, second = net.coordinator.ended
    assert first.released is None and "shard" in first.why
    assert second.released is not None and second.round == (stage >= Stage.UNMASK)
    assert all(1 == len(shard.applied) for shard in net.shards.values())
    net.coordinator.ended.remove(first)
    assert 1 == net.check()


def test_a_worker_that_crashes_takes_no_more_part_in_the_session() -> None:
    """Its new life, under the same name, is invited to the next one."""
    net = RoundNet(3, 5, (5,), Recipe(rounds=2))
    net.when(lambda: net.stage == Stage.MASKED, lambda: net.lose("w5"))
    net.when(lambda: len(net.coordinator.ended) == 1, lambda: net.start_worker(5) and None)

    assert net.go(2)
    assert 2 == net.check()
    assert ["w5" in net.expected(end.session)[1] for end in net.coordinator.ended] == [False, True]


def test_a_round_that_was_abandoned_is_tried_again_with_fresh_keys() -> None:
    """Before anybody unmasked: under the same number, with the same inputs, and nothing on the wire is the same."""
    net = RoundNet(3, 5, (5,), Recipe(rounds=1))
    net.when(lambda: net.stage == Stage.MASKED, lambda: net.coordinator.rounds.session.abandon("a test", net.now))  # type: ignore[union-attr]

    assert net.go(2)
    first, second = net.coordinator.ended
    assert (0, 0) == (first.round, second.round) and first.released is None
    net.coordinator.ended.remove(first)
    assert 1 == net.check()
    adverts, deals = ({bytes(frames[1]) for _, frames in net.wire if frames[0][2] == kind} for kind in (67, 69))
    assert 10 == len(adverts) == len(deals)


# --- any schedule


def schedule(seed: int) -> Counter[str]:
    """One random cluster with random faults. What came of it."""
    draw = random.Random(seed)
    workers, shards, active = draw.choice((3, 4, 4, 5, 6)), draw.choice((1, 2, 3)), draw.random() < 0.3
    threshold = max(2, workers - draw.choice((0, 1, 1, 2))) if not active else workers - (workers > 4)
    faults = Faults(
        draw.choice((0.0, 0.05, 0.15)), draw.choice((0.0, 0.1)), draw.choice((0.005, 0.3)), draw.choice((0.0, 0.01))
    )
    net = cluster(workers, threshold, shards, active, seed)
    net.faults = faults
    core, rounds = net.coordinator.rounds, draw.choice((1, 1, 2))
    core.recipe = replace(net.recipe, rounds=rounds, least=2, room=draw.choice((1, 2, 4)))
    for name in draw.sample(sorted(net.workers), draw.choice((0, 0, 1, 1, 2))):
        kill_at(net, draw.choice(STAGES), [name])
    if draw.random() < 0.15:
        net.when(lambda: net.stage == draw_stage, lambda: restart(net, draw.randrange(shards)))
    draw_stage = draw.choice(STAGES)

    def settled() -> bool:
        return core.session is None and (core.done or bool(core.problem) or not core._possible)

    net.run(inf, lambda: (net.now > 5.0 and settled()) or net.now > 60.0)  # what is due later stays due
    net.quiet = True
    assert net.run(net.now + 400.0, settled), "when the faults are over, the rounds go on"
    check_history(net)
    return Counter("released" if end.released else "abandoned" for end in net.coordinator.ended)


def restart(net: RoundNet, index: int) -> None:
    net.crash(f"s{index}")
    net.at(net.now + 0.2, lambda: net.start_shard(index, life=net.random.randrange(1, 100)) and None)


def check_history(net: RoundNet) -> None:
    """What was applied is the average of a session's survivors; no client has opened two secrets of one member."""
    by_number = {end.round: end for end in net.coordinator.ended if end.released}
    starts = np.cumsum([0, *net.world.sizes])
    for index, shard in net.shards.items():
        for _, number, update in shard.applied:
            session = next(
                held
                for held in net.world.sessions.values()
                if held.plan.round == number and held.stage == Stage.RELEASED
            )
            mean, names, bound = net.expected(session.number)
            assert len(names) >= session.plan.minimum
            assert np.abs(update - mean[starts[index] : starts[index + 1]]).max(initial=0.0) <= bound
    if all(shard.incarnation == SHARD + 100 * index for index, shard in net.shards.items()):  # else one has forgotten
        for shard in net.shards.values():
            assert sorted(by_number) == [number for _, number, _ in shard.applied]
    assert len(by_number) == sum(end.released is not None for end in net.coordinator.ended)
    for worker in net.workers.values():
        assert len(set(worker.remembered)) == len(worker.remembered)
    given: dict[tuple[int, int], set[bytes]] = {}
    for name, frames in net.wire:
        if name == "coordinator" and frames[0][2] == Unmask.TYPE:
            body = msgpack.unpackb(frames[0])
            given.setdefault((body[2], body[3]), set()).add(frames[1])
    assert all(len(buffers) == 1 for buffers in given.values())


def test_any_schedule_gives_the_average_or_nothing() -> None:
    """Loss, repetition, reordering, broken connections, deaths and restarts, from one seed: never a wrong sum."""
    print(f"SHOAL_SEED={SEED}")
    found: Counter[str] = Counter()
    for number in range(SCHEDULES):
        try:
            found += schedule(SEED + number)
        except BaseException:
            print(f"the schedule with SHOAL_SEED={SEED + number} SHOAL_ROUNDS=1")
            raise
    print(dict(found))
    assert found["released"] > SCHEDULES / 2 and (SCHEDULES < 100 or found["abandoned"] > SCHEDULES / 20)


def test_the_kinds_on_the_wire_are_those_of_the_stages() -> None:
    """In the clear nobody deals, consents or unmasks anything; masked, nobody sees an update."""
    for protection, absent in ((CLEAR, {76, 77, 78, 79}), (SECAGG, {77, 78})):
        net = RoundNet(3, 4, (5,), Recipe(protection, rounds=1))
        assert net.go()
        kinds = {frames[0][2] for _, frames in net.wire if frames[0][1] == 1}
        assert not kinds & absent
        assert {Invite.TYPE, Deal.TYPE, Relay.TYPE, Masked.TYPE} <= kinds
