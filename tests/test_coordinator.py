"""The coordinator's core, by the specification's own words: members, views, the model, data leases (rung T0, SPEC §3, §4.3, §9)."""

from __future__ import annotations

from typing import Any

import pytest
from cores import RUN, SHARD, SMALL, CoordinatorBench, kinds, only, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import messages as m
from shoal.protocol.effects import Unreadable
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import Adam
from shoal.ps.coordinator import Died

OTHER = ModelSpec((Tensor("w", "float32", (2,)),), (Adam(),))


def trained(*workers: int, shards: int = 1, **settings_: Any) -> CoordinatorBench:
    """Shards and workers are here, the model is registered and filled."""
    bench = CoordinatorBench(min_shards=shards, **settings_)
    for number in range(shards):
        bench.shard(number)
    for worker in workers:
        bench.join(worker)
        bench.register(worker)
    for number in 2 * list(range(shards)):  # filled and opened; then the view that says so
        bench.report(number)
    return bench


def view_of(bench: CoordinatorBench, shard: int = 0) -> m.View:
    """The newest, once the shard has confirmed the one before."""
    views = bench.to(f"s{shard}".encode(), m.View)
    if views[-1].epoch < bench.core.epoch:
        held = bench.core.shards.known(SHARD + shard)
        state = {name: getattr(held, name) for name in ("filled", "opened", "digest")}
        bench.report(shard, epoch=views[-1].epoch, clocks=tuple(held.clocks.items()), **state)
    return bench.to(f"s{shard}".encode(), m.View)[-1]


# --- joining


def test_a_join_is_answered_once_there_are_shards() -> None:
    """The answer waits for `min_shards`; a repeated `Join` gets the same place, and is no second admission (MUST, §3.1.2)."""
    bench = CoordinatorBench(min_shards=2, staleness=2.0)
    bench.shard(0)
    assert m.Waiting(0, 1, 2, "shards") == only(m.Waiting, bench.join(1))
    welcome = only(m.Welcome, bench.shard(1))
    epoch = bench.core.epoch
    again = only(m.Welcome, bench.join(1))

    assert (1, RUN, 0, 15.0, (m.Phase(0, "async", 2.0),), "error") == (
        *(welcome.incarnation, welcome.run, welcome.worker, welcome.lease),
        *(welcome.phases, welcome.nonfinite),
    )
    assert (epoch, welcome.worker, [0, 1]) == (bench.core.epoch, again.worker, [place.index for place in again.shards])


def test_a_worker_that_still_asks_to_join_is_alive() -> None:
    """Its welcomes may be held up on the way back, as those of a host whose cable was pulled are (§3.1.2)."""
    bench = CoordinatorBench()
    bench.shard()
    for _ in range(3):
        epoch = only(m.Welcome, bench.join(1)).epoch
        bench.after(14.9)

    assert ["Renewed"] == kinds(bench.renew(1, epoch=epoch))


@pytest.mark.parametrize("how", ["leave", "lease", "process", "restart"])
def test_an_incarnation_lives_once(how: str) -> None:
    """Once it has ended, by whatever way, it is told so and never admitted again, and its data is free (MUST, §3.1.2, §3.3.2)."""
    bench = trained(1, 2)
    bench.ask(m.Declare, 1, 2, "job", 4, 1, 4, 0, 0)
    assert ["Leased", "Waiting"] == [kinds(bench.ask(m.Claim, 1, request, "job", 1))[0] for request in (3, 4)]
    if how == "leave":
        leaving = m.Leave(1, 5, (), (), ())
        assert m.Left(1, 5) in bench.hear(peer_of(1), leaving)
        assert [m.Left(1, 5)] == bench.hear(peer_of(1), leaving)
    elif how == "process":
        bench.event(Died("name1"))
    elif how == "restart":  # a higher attempt takes the name over at once (§3.1.4)
        assert 0 == only(m.Welcome, bench.join(3, name="name1", attempt=1)).worker, "a name keeps its number"
    else:
        bench.now = 14.9
        bench.renew(2)
        assert 15.0 == bench.core.wake_at
        bench.after(0.1)

    assert [2, 3][: 1 + (how == "restart")] == [member.incarnation for member in view_of(bench).members]
    for said in (bench.join(1), bench.renew(1), bench.register(1, 9), bench.ask(m.Claim, 1, 9, "job", 1)):
        assert [m.Evicted(1)] == said
    assert 0 == only(m.Leased, bench.ask(m.Claim, 2, 4, "job", 1)).start


def test_a_name_belongs_to_one_live_worker() -> None:
    """A second `Join` under it waits; the holder's next renewal refuses it (§3.1.4)."""
    bench = trained(1)
    assert ["Waiting"] == kinds(bench.join(2, name="name1"))
    assert ["Refused", "Renewed"] == kinds(bench.renew(1))
    (refusal,) = bench.to(peer_of(2), m.Refused)
    assert "name" == refusal.code
    assert ["Renewed"] == kinds(bench.renew(1))

    bench.join(2, name="name1")
    said = bench.after(15.0)
    assert 2 == only(m.Welcome, said).incarnation, "the end of the holder's lease admits it"


def test_a_join_that_is_not_repeated_is_forgotten() -> None:
    """Who waits for shards asks again each second (§3.1.2); one who has not for long is dead, and not admitted."""
    bench = CoordinatorBench()
    bench.join(1), bench.join(2)
    bench.now = 4.9
    bench.join(2)
    bench.now = 5.0
    bench.shard()

    assert [2] == [life.incarnation for life in bench.core.members]


def test_a_long_name_may_wait_too() -> None:
    """What the coordinator says of a name fits the limits of a message, whatever the name (§2.3)."""
    bench = trained()
    bench.join(1, name="x" * 128)

    assert ["Waiting"] == kinds(bench.join(2, name="x" * 128))


@pytest.mark.parametrize("name", ["x" * 129, "é" * 65, "\x1b]0;owned", "two\nlines"])
def test_a_name_that_no_terminal_should_see_is_refused(name: str) -> None:
    """Printable, and at most 128 bytes (MUST, §2.3)."""
    bench = trained()

    assert ["Refused"] == kinds(bench.join(1, name=name))
    assert 1 == bench.core.counters["rejected.malformed"]


# --- views


def test_every_change_is_a_view_that_is_repeated() -> None:
    """Each change is one epoch, sent to every shard, and again each second until the shard reports it (§3.2.1)."""
    bench = trained(1, shards=2)
    bench.sent.clear()
    bench.join(2)
    views = [bench.to(f"s{shard}".encode(), m.View) for shard in (0, 1)]
    assert [1, 1] == [len(found) for found in views]
    assert views[0] == views[1]
    view = views[0][0]
    assert (bench.core.epoch, [1, 2]) == (view.epoch, [member.incarnation for member in view.members])

    bench.report(0)
    bench.report(1, epoch=view.epoch - 1)
    bench.after(1.0)
    assert [1, 2] == [len(bench.to(f"s{shard}".encode(), m.View)) for shard in (0, 1)]
    bench.report(1)
    assert [] == bench.after(1.0)


def test_a_view_tells_a_restarted_shard_who_may_be_counted_in() -> None:
    """Those who have registered, whatever they renewed since (§6.1.5)."""
    bench = trained(1, 2)
    bench.renew(2, entered=False)
    bench.join(3)

    assert [(1, True), (2, True), (3, False)] == [(v.incarnation, v.registered) for v in view_of(bench).members]


def test_the_quorum_forgets_those_who_died_since() -> None:
    """`min_workers` until so many were here at once; then those who live; 0 when every shard has been opened (§6.1.4)."""
    bench = CoordinatorBench(min_workers=3)
    bench.shard()
    quorums = []
    for worker in (1, 2, 3):
        bench.join(worker)
        quorums.append(view_of(bench).quorum)
    bench.event(Died("name2"))
    quorums.append(view_of(bench).quorum)
    bench.register(1)
    bench.report(opened=False)
    bench.report(opened=True)

    assert [3, 3, 3, 2, 0] == [*quorums, view_of(bench).quorum]


def test_a_crowd_costs_a_shard_one_view_at_a_time() -> None:
    """What many joins change is held back until the shard has confirmed the view before, and then told at once (§3.2.1)."""
    bench = trained(1)
    before = len(bench.to(b"s0", m.View))
    for worker in range(2, 102):
        bench.join(worker)
    held_back = bench.to(b"s0", m.View)[before:]
    assert [2] == [len(view.members) for view in held_back]

    bench.report(epoch=held_back[0].epoch)
    last = bench.to(b"s0", m.View)[-1]
    assert (before + 2, 101, bench.core.epoch) == (len(bench.to(b"s0", m.View)), len(last.members), last.epoch)
    bench.report()
    bench.after(1.0)
    assert before + 2 == len(bench.to(b"s0", m.View)), "it has confirmed the newest"


def test_a_view_that_was_lost_is_repeated_each_second() -> None:
    """And what has changed since is in it, confirmed or not (§3.2.1)."""
    bench = trained(1)
    before = len(bench.to(b"s0", m.View))
    bench.join(2), bench.join(3)
    bench.after(0.9)
    assert 1 == len(bench.to(b"s0", m.View)[before:])
    bench.after(0.1)

    assert [2, 3] == [len(view.members) for view in bench.to(b"s0", m.View)[before:]]


def test_a_renewal_keeps_a_worker_and_tells_of_the_shards() -> None:
    """`Renewed` always; `Cluster` as well if shards or filler have changed since the epoch in `Renew` (§3.3.1, §3.3.2)."""
    bench = trained(1)
    epoch = bench.core.epoch
    for _ in range(4):
        bench.now += 10.0
        assert [m.Renewed(1, epoch)] == bench.renew(1)
    bench.shard(7)
    bench.join(2)
    said = bench.renew(1, epoch=epoch)

    assert ["Renewed", "Cluster"] == kinds(said)
    assert [SHARD + 7] == [place.incarnation for place in said[1].shards], "the first has been silent for too long"
    assert ["Renewed"] == kinds(bench.renew(1))


# --- shards


def test_a_shard_is_placed_and_known() -> None:
    """A repeated `ShardJoin` gets the same place, a spare waits, a report from elsewhere is told (§3.1.1, §3.3.4)."""
    bench = trained(1)
    assert [m.ShardWelcome(SHARD, RUN, 0, 15.0)] == bench.shard(0)
    assert ["Waiting"] == kinds(bench.shard(5))
    assert [m.Evicted(SHARD + 5)] == bench.report(5)
    assert [m.Evicted(SHARD)] == bench.report(0, run=RUN + 1)

    bench.now = 10.0
    bench.renew(1)
    bench.now = 15.0
    said = bench.shard(5)
    assert 0 == only(m.ShardWelcome, said).index, "a lost shard's index is free when another needs it"
    assert (SHARD + 5, (0,)) == (only(m.Cluster, said).shards[0].incarnation, only(m.Cluster, said).fill)
    assert ["Model", "View"] == kinds([message for peer, message in bench.sent if peer == b"s5"][-2:])


# --- the model


def test_the_first_register_fixes_the_model() -> None:
    """Every shard is sent it; another model is refused with the first difference, a broken one as malformed (§4.3.1, §4.3.2)."""
    bench = CoordinatorBench(min_shards=2)
    bench.shard(0), bench.shard(1), bench.join(1), bench.join(2)
    bench.register(1)
    for shard in (b"s0", b"s1"):
        (model,) = bench.to(shard, m.Model)
        assert (RUN, 2, SMALL.description) == (model.run, model.shards, model.buffers[0])
    refused = [only(m.Refused, bench.register(2, 4, OTHER)), only(m.Refused, bench.ask(m.Register, 2, 5, (b"x",)))]

    assert [(4, "mismatch"), (5, "malformed")] == [(no.request, no.code) for no in refused]
    assert "group 0 has optimizer sgd" in refused[0].text
    bench.after(1.0)
    assert 2 == len(bench.to(b"s0", m.Model)), "it is repeated until the shard's report shows it"


def test_register_is_answered_when_all_agree_and_are_here() -> None:
    """By every shard's report of the digest, and by `min_workers` at the same time once; who goes then is not missed (§4.3.2)."""
    bench = CoordinatorBench(min_shards=2, min_workers=2)
    bench.shard(0), bench.shard(1), bench.join(1)
    assert [] == [said for said in bench.register(1) if isinstance(said, m.Registered)]
    assert "workers" == only(m.Waiting, bench.register(1)).what
    assert "Registered" not in kinds(bench.report(0, filled=False) + bench.report(1, filled=False))
    bench.report(1, filled=False, digest="another")
    bench.join(2)
    bench.event(Died("name2"))
    assert "shards to take in" in only(m.Waiting, bench.register(1)).what

    answer = only(m.Registered, bench.report(1, filled=False))
    assert (1, 2, bench.core.shards.digest) == (answer.request, answer.shards, answer.digest)
    assert [answer] == bench.register(1)


def test_one_worker_fills_and_the_others_wait() -> None:
    """The filler is the first to have registered; `Register` of the others is answered when all is filled (§4.3.3)."""
    bench = CoordinatorBench()
    bench.shard(), bench.join(1), bench.join(2), bench.join(3)
    bench.register(2), bench.register(1)
    bench.renew(1, clock=5)
    bench.register(3)
    said = bench.report(filled=False)
    assert ([2], 2) == ([m_.incarnation for m_ in said if isinstance(m_, m.Registered)], view_of(bench).filler)
    assert [(0,)] == [cluster.fill for cluster in bench.to(peer_of(2), m.Cluster)[-1:]]
    assert {()} == {cluster.fill for cluster in bench.to(peer_of(1), m.Cluster)}

    said = bench.event(Died("name2"))
    assert (1, [(0,), ()]) == (view_of(bench).filler, [m_.fill for m_ in said if isinstance(m_, m.Cluster)])
    assert [1] == [m_.incarnation for m_ in said if isinstance(m_, m.Registered)]
    assert 3 == only(m.Registered, bench.report(filled=True)).incarnation


def test_a_lost_shard_is_filled_by_the_most_advanced() -> None:
    """Of those who have entered, the one with the highest clock; of two such, the first to have registered (§4.3.3)."""
    bench = trained(1, 2, 3, 4)
    for worker, clock, entered in ((1, 8, False), (2, 7, True), (3, 7, True), (4, 3, True)):
        bench.renew(worker, clock, entered)
    bench.after(3.0)
    bench.shard(1, port=1000)
    bench.report(1, filled=False)

    assert 2 == view_of(bench, 1).filler
    assert (0,) == bench.to(peer_of(2), m.Cluster)[-1].fill
    bench.report(1, filled=True)
    bench.join(5)
    assert 0 == view_of(bench, 1).filler


# --- requests and data


def test_a_claim_waits_for_data_that_others_hold() -> None:
    """`Waiting` when it is parked (MUST, §7); answered when a range comes back, or when all is complete (§9.3)."""
    bench = trained(1, 2, 3)
    bench.ask(m.Declare, 1, 2, "job", 8, 2, 4, 0, 0)
    first, second = (only(m.Leased, bench.ask(m.Claim, worker, 3, "job", 1)) for worker in (1, 2))
    assert [(0, 4), (4, 8)] == [(lease.start, lease.stop) for lease in (first, second)]
    assert [m.Waiting(3, 0, 0, "data that others hold")] == bench.ask(m.Claim, 3, 3, "job", 1)
    assert 1 == len(bench.ask(m.Claim, 3, 3, "job", 1)), "asked again, parked still"
    bench.renew(2, progress=((second.lease, 1), (first.lease, 4)))
    back = only(m.Leased, bench.event(Died("name2")))
    assert (3, 5, 8) == (back.incarnation, back.start, back.stop)

    bench.ask(m.Claim, 1, 4, "job", 1)
    assert [m.Completed(1, 5)] == bench.ask(m.Complete, 1, 5, first.lease, 4)
    done = bench.ask(m.Complete, 3, 4, back.lease, 3)
    assert [m.Completed(3, 4), m.Exhausted(1, 4)] == done


def test_data_sets_are_declared_first() -> None:
    """A `Declare` that differs is a mismatch, a `Claim` of nothing declared refused; it begins at its epoch (§9.1, §9.5)."""
    bench = trained(1, 2)
    assert [m.Declared(1, 2, 4)] == bench.ask(m.Declare, 1, 2, "job", 8, 2, 4, 0, 3)
    assert [("mismatch", "undeclared")] == [
        (
            only(m.Refused, bench.ask(m.Declare, 2, 2, "job", 9, 2, 4, 0, 3)).code,
            only(m.Refused, bench.ask(m.Claim, 2, 3, "other", 1)).code,
        )
    ]

    assert ["Exhausted"] == kinds(bench.ask(m.Claim, 2, 4, "job", 3))
    assert 3 == only(m.Leased, bench.ask(m.Claim, 2, 5, "job", 4)).epoch


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6)), min_size=1, max_size=25))
def test_a_repeated_request_gets_the_same_answer(asked: list[tuple[int, int]]) -> None:
    """Whatever is repeated when: the answer is that of the first time, and what it changed is changed once (MUST, §7)."""
    bench = trained(1, 2)
    bench.ask(m.Declare, 1, 100, "job", 100, 1, 1, 0, 0)
    answers: dict[tuple[int, int], list[Any]] = {}
    for worker, request in asked:
        kind, *rest = (m.Claim, "job", 1) if request % 2 else (m.Complete, request // 2, 1)
        said = bench.ask(kind, worker, 10 + request, *rest)
        assert answers.setdefault((worker, request), said) == said
    leases = [said[0].lease for said in answers.values() if isinstance(said[0], m.Leased)]

    assert list(range(1, len(leases) + 1)) == sorted(leases)
    assert len(leases) == len([key for key in answers if key[1] % 2])


# --- the rest


def test_what_does_not_belong_here_is_counted() -> None:
    """A message that a coordinator never accepts is counted; another version is told of ours (MUST, §2.2.4, §2.4)."""
    bench = trained(1)
    assert [] == bench.hear(peer_of(1), m.Probe(1, 2))
    assert [] == bench.event(Unreadable(b"x", "frames"))
    (refusal,) = bench.event(Unreadable(b"x", "version"))

    assert (0, "version") == (refusal.request, refusal.code)
    assert {"rejected.misplaced": 1, "rejected.frames": 1, "rejected.version": 1} == bench.core.counters
    assert [m.Echoed(4, (b"abc",))] == bench.hear(b"anybody", m.Echo(4, (b"abc",)))


def test_a_run_that_has_begun_is_no_longer_waited_for() -> None:
    """A shard that is opened and counts somebody says that `min_workers` have been here, under an earlier coordinator (§6.1.4)."""
    bench = CoordinatorBench(min_workers=3)
    bench.shard()
    bench.join(1)
    bench.report(opened=True)
    assert bench.core.opened_at is None

    bench.report(opened=True, clocks=((1, 6),))

    assert bench.core.opened_at is not None
    assert 1 == view_of(bench).quorum


def test_shards_close_ranks_before_there_is_a_model() -> None:
    """One that went before the layout was made is forgotten; the last is told to join again, and gets the free index (§3.3.4)."""
    bench = CoordinatorBench(min_shards=2)
    bench.shard(0), bench.shard(1)
    for _ in range(3):
        bench.report(1)
        bench.after(1.0)

    assert [m.Evicted(SHARD + 1)] == bench.to(b"s1", m.Evicted)
    bench.shard(1)
    assert [0] == [held.place.index for held in bench.core.shards]
