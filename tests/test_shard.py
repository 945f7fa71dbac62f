"""The shard's core, by the specification's own words: who may push and pull what, and when (rung T0, SPEC §3 to §6)."""

from __future__ import annotations

import json
import random
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from cores import READER, RUN, SHARD, Bench, ShardBench, answered, floats, kinds, only, peer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import messages as m
from shoal.protocol.codecs import size
from shoal.protocol.coding import decode
from shoal.protocol.effects import COORDINATOR, Linked, Tick, Unreadable
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD, Rule
from shoal.ps.shard import Shard

TWO = ModelSpec((Tensor("a", "float32", (2,), 0), Tensor("b", "float32", (1,), 1)), (SGD(), SGD()))
HALF = ((0.5, 0.0, 0.0, 0.0, 0.0, 0.0),)


# --- the coordinator's side


def test_it_asks_for_a_place_until_it_has_one() -> None:
    """`ShardJoin` is repeated until `ShardWelcome`, then `Report`; who was forgotten names its old place (§3.1.1, §3.3.4)."""
    bench = Bench(Shard(SHARD, "host", 1, "key"))
    asking = m.ShardJoin(SHARD, "host", 1, "key", -1, 0, "", ())
    assert [asking] == bench.event(Tick()) == bench.after(1.0) == bench.event(Linked(COORDINATOR))
    assert [] == bench.after(0.9)
    assert [] == bench.hear(COORDINATOR, m.ShardWelcome(SHARD + 1, RUN, 0, 15.0))
    assert ["Report"] == kinds(bench.hear(COORDINATOR, m.ShardWelcome(SHARD, RUN, 0, 15.0)))
    bench.event(Tick())
    assert [["Report"], []] == [kinds(bench.after(1.1)), kinds(bench.after(0.1))]

    placed = ShardBench()
    asks = only(m.ShardJoin, placed.hear(COORDINATOR, m.Evicted(SHARD)))
    assert (0, 1, placed.layout.digest) == (asks.index, asks.shards, asks.digest)


@pytest.mark.parametrize(("run", "epoch"), [(RUN, 2), (RUN, 1), (RUN + 1, 9)])
def test_an_older_view_is_ignored(run: int, epoch: int) -> None:
    """A view of the run with an epoch not above the shard's own changes nothing, nor does one of another run (MUST, §3.2.1)."""
    bench = ShardBench()
    bench.view((1, 2))
    report = only(m.Report, bench.hear(COORDINATOR, m.View(run, epoch, (m.Phase(0, "sync", inf),), False, 2, 0, ())))

    assert 2 == report.epoch
    assert ["Greeting"] == kinds(bench.hear(peer_of(1), m.Hello(1, RUN, 2)))


def test_a_new_run_begins_to_count_again() -> None:
    """After a coordinator's restart its epochs begin anew; those who are not in its view are gone, the weights are not."""
    bench = ShardBench()
    bench.start(1, 2)
    bench.push(1, 0, -4.0, 0.0)
    bench.hear(COORDINATOR, m.ShardWelcome(SHARD, RUN + 1, 0, 15.0))
    assert ["Ack"] == kinds(bench.push(1, 1, -1.0, 0.0)), "without a coordinator pushes go on (§3.3.5)"
    bench.hear(
        COORDINATOR, m.View(RUN + 1, 1, (m.Phase(0, "async", 0.0),), False, 0, 0, (m.Member(READER, "reader", False),))
    )
    bench.hear(peer_of(READER), m.Hello(READER, RUN + 1, 1))

    assert [m.Evicted(1)] == bench.push(1, 2, -1.0, 0.0)
    assert [5.0, 0.0] == bench.weights


def test_a_hello_waits_for_its_view() -> None:
    """A shard whose view is older than the epoch in `Hello` answers when that view arrives (§3.1.3)."""
    bench = ShardBench()
    assert [] == bench.hear(peer_of(5), m.Hello(5, RUN, 3))
    assert [] == bench.hear(peer_of(6), m.Hello(6, RUN, 3))
    bench.view((1, 2))
    assert m.Greeting(5, SHARD, 0) not in [message for _, message in bench.sent]

    said = bench.view((1, 2, 5))
    assert m.Greeting(5, SHARD, 0) in said
    assert m.Evicted(6) in said


def test_a_hello_of_another_run_waits_as_well() -> None:
    """Epochs of two runs say nothing of each other: a coordinator was restarted, and its first view is still under way (§3.1.3)."""
    bench = ShardBench()
    bench.view((1, 2))
    assert [] == bench.hear(peer_of(5), m.Hello(5, RUN + 1, 1))
    bench.hear(COORDINATOR, m.ShardWelcome(SHARD, RUN + 1, 0, 15.0))

    said = bench.hear(
        COORDINATOR, m.View(RUN + 1, 1, (m.Phase(0, "async", 0.0),), False, 0, 0, (m.Member(5, "name5", False),))
    )
    assert m.Greeting(5, SHARD, 0) in said


def test_it_serves_those_in_its_view_and_no_others() -> None:
    """`Evicted` for who is not in the view, `Stranger` for who has no stream at this shard (§3.2.2)."""
    bench = ShardBench()
    for message in (m.Probe(8, SHARD), m.Enter(8, SHARD, 1, 0), m.Pull(8, SHARD, 1, 0, 0, 0, 0, 0, ())):
        assert [m.Evicted(8)] == bench.hear(peer_of(8), message)
    assert [m.Stranger(1, SHARD)] == bench.hear(peer_of(1), m.Enter(1, SHARD - 1, 2, 0))

    fresh = Bench(Shard(SHARD, "host", 1))
    assert m.Stranger(1, SHARD) in fresh.hear(peer_of(1), m.Probe(1, SHARD - 1))
    assert bench.core.counters["evicted"] == 3


def test_another_layout_is_not_taken() -> None:
    """A shard that computes another digest than the coordinator refuses to go on, and says so (MUST, §4.2.5)."""
    bench = ShardBench(fill=False)
    other = lay_out(ModelSpec((Tensor("v", "float32", (3,)),), (SGD(),)), 1)
    assert [] == bench.hear(COORDINATOR, bench.model(digest=other.digest))
    assert [] == bench.hear(COORDINATOR, m.Model(RUN, 1, 4096, other.digest, (b"nonsense",)))

    assert bench.layout.digest == bench.report().digest
    assert 2 == sum("layout" in text or "cannot be read" in text for text in bench.logged)


# --- the first weights


def test_a_shard_is_filled_by_its_filler() -> None:
    """Nobody else's `Fill` counts, nor a former filler's; a pull is parked and a push refused until it is whole (§4.3.3)."""
    bench = ShardBench(fill=False, spec=TWO)
    bench.start(1, 2)
    assert [] == bench.pull(2)
    bench.fill(2, 7.0)
    refused = only(m.Ack, bench.push(2, 0, -1.0, 0.0))
    assert [(4, "unfilled")] == [refusal[:2] for refusal in refused.refusals]
    bench.do(m.Fill, 1, 1, (0,), (floats(3.0, 3.0),))
    bench.view((1, 2), filler=2)
    bench.do(m.Fill, 2, 2, (1,), (floats(3.0),))
    assert not bench.report().filled

    said = bench.fill(2, 5.0)
    assert ([1], True) == (answered(said), only(m.Report, said).filled)
    bench.fill(2, 6.0)
    assert [5.0, 5.0] == bench.weights


def test_a_filling_waits_for_the_view_that_asks_for_it() -> None:
    """A `Fill` of a later epoch waits in its stream until the shard has that view (§4.3.3)."""
    bench = ShardBench(fill=False)
    assert 0 == only(m.Ack, bench.fill(2, 5.0, epoch=2)).seq
    bench.view((1, 2), filler=2)

    assert [5.0, 5.0] == bench.weights
    assert 1 == bench.to(peer_of(2), m.Ack)[-1].seq


# --- the stream


@settings(deadline=None, max_examples=100)
@given(st.permutations(range(1, 9)), st.lists(st.integers(1, 8), max_size=30))
def test_an_update_is_applied_once(order: list[int], more: list[int]) -> None:
    """Number n is applied after n - 1 and never twice, whatever arrives; `Ack` says the highest, and of a gap (MUST, §5.3)."""
    bench = ShardBench((1, 2))
    seen: set[int] = set()
    for number in [*more, *order, *more, *sorted(order)]:
        value = float(2**number)
        push = m.Push(2, SHARD, number, 0, False, 1.0, (), 0, 0, (0,), (), False, 0, (floats(-value, 0.0),))
        ack = only(m.Ack, bench.hear(peer_of(2), push))
        before = next(n for n in range(9) if n + 1 not in seen)
        seen |= {number} if number == before + 1 else set()
        applied = next(n for n in range(9) if n + 1 not in seen)
        assert (applied, number > applied) == (ack.seq, ack.gap)
        assert [float(2 ** (applied + 1) - 2), 0.0] == bench.weights


def test_a_refusal_is_repeated_eight_times() -> None:
    """The stream goes on over refusals; `Ack` repeats the last eight, so that a lost answer loses none (§5.4)."""
    bench = ShardBench()
    bench.start(1)
    for clock in range(9):
        ack = only(m.Ack, bench.push(1, clock, nan, 0.0))
    again = [message for message in bench.hear(peer_of(1), m.Probe(1, SHARD)) if isinstance(message, m.Ack)]

    assert 12 == ack.seq
    assert [(seq, "nonfinite") for seq in range(5, 13)] == [refusal[:2] for refusal in ack.refusals]
    assert [ack.refusals] == [message.refusals for message in again]
    assert 9 == bench.core.counters["refused.nonfinite"]


def test_a_refused_gradient_holds_nobody_up() -> None:
    """A step whose gradient was refused is a step all the same (§5.4, §6.3)."""
    bench = ShardBench()
    bench.start(1, 2)
    bench.push(2, 0, 1.0, 0.0)
    bench.pull(2, clock=1)

    assert [1] == answered(bench.push(1, 0, inf, 0.0))
    assert [-1.0, 0.0] == bench.weights


def test_a_fault_of_ours_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong inside is refused as `internal` and logged; the shard lives (§5.4)."""
    bench = ShardBench()
    monkeypatch.setattr(bench.core.weights, "apply", lambda *_, **__: 1 / 0)
    ack = only(m.Ack, bench.push(1, 0, 1.0, 0.0))

    assert [(2, "internal", "ZeroDivisionError: division by zero")] == list(ack.refusals)
    assert "applying Push failed" in bench.logged[-1]


def test_a_fault_in_closing_a_step_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a fault of ours or torch's in the average take the shard down (§5.4)."""
    bench = ShardBench((1,), mode="sync")
    bench.start(1)
    monkeypatch.setattr(bench.core.weights.store, "apply", lambda *_: 1 / 0)

    assert 1 == only(m.Ack, bench.push(1, 0, 1.0, 0.0)).min_clock
    assert "ZeroDivisionError" in bench.logged[-1]


# --- clocks


def test_a_restarted_shard_waits_until_those_it_is_told_of_have_spoken() -> None:
    """Whoever has registered may be counted in elsewhere at any clock; until all have spoken nothing is answered (§6.1.5)."""
    bench = ShardBench((1, 2, 3, 4), registered=(1, 2, 3, 4))
    bench.do(m.Start, 1, 6)
    assert [] == bench.pull(1, clock=6)
    assert [] == answered(bench.do(m.Start, 2, 5))
    assert [] == answered(bench.do(m.Pause, 3))
    assert (False, 0) == (bench.report().opened, bench.report().floor)

    assert [] == answered(bench.view((1, 2, 3)))
    assert (True, 5) == (bench.report().opened, bench.report().floor)
    assert [1] == answered(bench.do(m.Start, 2, 6))


@pytest.mark.parametrize("kind", [m.Enter, m.Start, m.Pause])
def test_the_last_to_speak_opens_a_restarted_shard(kind: Any) -> None:
    """Be it to enter, to start or to pause (§6.1.5); those who had not registered are not waited for."""
    bench = ShardBench((1, 2), registered=(1,))
    assert not bench.report().opened

    bench.do(kind, 1, *(() if kind is m.Enter else (3,)))

    assert bench.report().opened


def test_those_who_rest_read_a_restarted_shard_on() -> None:
    """Nobody is counted in any more: `min` is where they paused, and their pausing is the quorum (§6.1)."""
    bench = ShardBench((1, 2), mode="sync", quorum=2, registered=(1, 2))
    bench.do(m.Pause, 1, 4)
    assert [] == bench.pull(1, clock=4)

    assert [1] == answered(bench.do(m.Pause, 2, 3))


def test_a_filling_waits_for_the_model() -> None:
    """Messages of two connections come in any order: the filling before the model is kept, not refused (§4.3.3)."""
    bench = ShardBench((1,), fill=False)
    bench.core.weights = None
    assert 0 == only(m.Ack, bench.fill(1)).seq

    bench.hear(COORDINATOR, bench.model())

    assert (True, 1) == (bench.report().filled, only(m.Ack, bench.to(peer_of(1), m.Ack)[-1:]).seq)


def test_a_restarted_shard_is_opened_by_those_who_run_on() -> None:
    """Whoever is counted in counts toward the quorum, be it by `Enter` or by `Start` (§6.1.4)."""
    bench = ShardBench((1,), quorum=1, registered=(1,))
    bench.do(m.Start, 1, 3)

    assert bench.report().opened


def test_a_restarted_shard_does_not_hold_up_one_that_runs_on() -> None:
    """A worker that the first view did not count in starts at its own clock, and is held up by nobody (§6.1.1, §6.2)."""
    bench = ShardBench((1,))
    bench.do(m.Start, 1, 7)
    bench.push(1, 7)

    assert [1] == answered(bench.pull(1, clock=8))


# --- pushes


def test_a_mean_is_over_those_counted_in() -> None:
    """The rule `mean` goes a share of the way, one of as many as are counted in (§8)."""
    bench = ShardBench((1, 2), spec=ModelSpec((Tensor("w", "float32", (2,)),), (Rule("mean"),)))
    bench.start(1, 2)
    bench.push(1, 0, 8.0, 4.0)

    assert [4.0, 2.0] == bench.weights


def test_async_applies_at_the_numbers_a_push_carries() -> None:
    """In `async` a push is applied at once, at its own hyperparameters, or at those of registration (§6.3)."""
    bench = ShardBench()
    bench.start(1)
    bench.push(1, 0, -1.0, -2.0, hyper=HALF)
    bench.push(1, 0, -1.0, -2.0)
    bench.push(1, 7)

    assert [1.5, 3.0] == bench.weights
    assert ((1, 1),) == bench.report().clocks, "only the step that a worker is at can be ended"


def test_sync_averages_a_step() -> None:
    """Weighted by examples, applied once, when all have passed the step, at the numbers of the first to join (§6.3)."""
    bench = ShardBench((1, 2, 3), mode="sync")
    bench.start(1, 2, 3)
    bench.push(3, 0, examples=0.0)
    bench.push(2, 0, -4.0, 0.0, examples=1.0)
    assert 3 == only(m.Ack, bench.push(2, 1, -8.0, 0.0, examples=2.0)).seq, "a push of a later step waits in its stream"
    bench.push(1, 0, -1.0, -1.0, advance=False, examples=3.0)
    bench.push(1, 0, -1.0, -1.0, advance=False, examples=3.0)
    assert [0.0, 0.0] == bench.weights
    said = bench.push(1, 0, examples=3.0, hyper=HALF)
    assert [0.5 * (4 + 6) / 4, 0.5 * 6 / 4] == bench.weights
    assert (2, 4) in [(ack.incarnation, ack.seq) for ack in said if isinstance(ack, m.Ack)]

    bench.push(3, 1, -9.0, 0.0, advance=False)
    for kind, *fields in ((m.Pause,), (m.Enter,), (m.Start, 1)):  # what it had begun does not count
        bench.do(kind, 3, *fields)
    bench.push(3, 1, examples=2.0)
    bench.do(m.Pause, 1)
    assert [1.25 + 8.0 * 2 / 4, 0.75] == bench.weights
    refused = only(m.Ack, bench.push(1, 9, -1.0, 0.0)).refusals
    assert [(8, "clock")] == [refusal[:2] for refusal in refused], "one that is not counted in has no step"


@pytest.mark.parametrize(
    ("hyper", "examples"), [(((0.1,),), 1.0), ((), -1.0), ((), inf)], ids=["hyper", "negative", "infinite"]
)
def test_no_push_brings_a_shard_down(hyper: Any, examples: float) -> None:
    """What a peer puts in the push that ends a step is refused if it fits nothing; it raises nothing and spoils nothing (§2.2)."""
    bench = ShardBench(mode="sync")
    bench.start(1, 2)
    bench.push(2, 0, -1.0, 0.0)
    bench.push(1, 0, -1.0, 0.0, hyper=hyper, examples=examples)

    assert (1, True) == (bench.report().floor, bool(np.isfinite(bench.weights).all()))


def test_a_refused_part_takes_its_step_with_it() -> None:
    """The examples of a worker whose gradient was refused dilute nobody's average (§6.3)."""
    bench = ShardBench(mode="sync")
    bench.start(1, 2)
    bench.push(1, 0, nan, 0.0, advance=False)
    bench.push(1, 0, -1.0, 0.0)
    bench.push(2, 0, -1.0, 0.0)
    assert [1.0, 0.0] == bench.weights

    bench.push(1, 1, -1.0, 0.0)
    bench.push(2, 1, -3.0, 0.0)
    assert [3.0, 0.0] == bench.weights


def test_the_order_of_joining_outlives_a_view() -> None:
    """The contributor that joined first decides, also when a view in between has lost somebody before it (§6.3)."""
    bench = ShardBench((1, 2, 3), mode="sync")
    bench.start(1, 2, 3)
    bench.push(2, 0, -1.0, 0.0, hyper=HALF)
    bench.view((3,))
    bench.push(3, 0, -1.0, 0.0)

    assert [0.5, 0.0] == bench.weights


# --- the rest


def test_what_does_not_belong_here_is_counted() -> None:
    """What a shard never accepts, or not from this party, is counted; another version is told of ours (MUST, §2.2.4, §2.4)."""
    bench = ShardBench()
    assert [] == bench.hear(peer_of(1), m.Evicted(SHARD))
    assert [] == bench.hear(COORDINATOR, m.Hello(1, RUN, 1))
    assert [] == bench.event(Unreadable(peer_of(1), "garbage"))
    (refusal,) = bench.event(Unreadable(peer_of(1), "version"))

    assert (0, "version") == (refusal.request, refusal.code)
    assert [2, 1, 1] == [bench.core.counters[f"rejected.{reason}"] for reason in ("misplaced", "garbage", "version")]
    assert [m.Echoed(4, (b"abc",))] == bench.hear(b"anybody", m.Echo(4, (b"abc",)))
    answer = only(m.Answer, bench.hear(b"anybody", m.Inquire(3, "status")))
    assert {"role": "shard", "filled": True, "blocks": 1, "bytes": 8}.items() <= json.loads(answer.buffers[0]).items()


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_any_payload_in_a_codec_is_taken_or_refused(mode: str) -> None:
    """Random bytes as gradients: the stream goes on, what is refused is counted by its reason, and the weights stay finite."""
    dice = random.Random(7)
    bench = ShardBench(members=(1,), mode=mode, spec=ModelSpec((Tensor("w", "float32", (300,)),), (SGD(lr=1e-30),)))
    bench.start(1)
    for clock in range(400):
        codec, ranged = dice.randrange(5), dice.random() < 0.3
        elements = 7 if ranged else 300
        length = dice.choice((size(codec, elements), size(codec, elements), 8, dice.randrange(2000)))
        spans = (np.array([2, 9], "<u4").tobytes(),) if ranged else ()
        payload = dice.randbytes(length) if dice.random() < 0.5 else bytes(length)
        bench.do(m.Push, 1, clock, True, 1.0, (), 0, codec, (0,), (1,) * ranged, False, 0, (*spans, payload))
    refused = {name: count for name, count in bench.core.counters.items() if name.startswith("refused.")}

    assert {"refused.shape", "refused.nonfinite"} == set(refused)
    assert 100 < sum(refused.values()) < 380
    assert 400 == bench.core.clocks.get(1)
    assert [] == bench.logged
    assert np.isfinite(bench.weights).all()


def test_values_in_a_codec() -> None:
    """A reader gets them in the one that it asked for, and says so; an answer in a region or of float64 is raw."""
    spec = ModelSpec((Tensor("w", "float32", (300,)), Tensor("d", "float64", (3,))), (SGD(lr=1.0),))
    bench = ShardBench(members=(1,), spec=spec, fill=False)
    bench.do(m.Fill, 1, bench.epoch, (0, 1), (np.full(300, 0.1, np.float32).tobytes(), np.full(3, 0.1).tobytes()))
    for codec, nbytes in ((0, 1200), (1, 600), (2, 600), (3, 308)):
        values = only(m.Values, bench.hear(peer_of(READER), m.Pull(READER, SHARD, 1 + codec, 0, 0, 0, 5, codec, ())))
        assert (codec, [nbytes, 24]) == (values.codec, [len(buffer) for buffer in values.buffers])
        found = decode(codec, values.buffers[0], 300)
        assert np.abs(found - np.float32(0.1)).max() <= 0.1 / 250
        assert 0.1 == np.frombuffer(values.buffers[1])[0]
