"""A run's mode changes while it runs: what coordinator and shard do about it, and what it costs (rungs T0 and T3, SPEC §6.5)."""

from __future__ import annotations

import threading
from math import inf
from typing import Any

import numpy as np
import pytest
from cores import RUN, SHARD, CoordinatorBench, ShardBench, only

import shoal
from shoal.launch.inquiry import Inquiry
from shoal.launch.mode import change
from shoal.launch.settings import BadFlag
from shoal.protocol import messages as m
from shoal.protocol.asking import Switch, Switched
from shoal.protocol.errors import ShoalError
from shoal.protocol.join import read_join

OPERATOR = b"operator"
START = m.Phase(0, "async", 3.0)


def begun(**settings: Any) -> CoordinatorBench:
    """Two shards with a layout, opened and at clock 4, and a worker."""
    bench = CoordinatorBench(min_shards=2, **settings)
    bench.shard(0)
    bench.shard(1)
    bench.join(1)
    bench.register(1)
    for number in (0, 1, 0, 1):  # the second time as of the view that says that all have begun
        bench.report(number)
    return bench


def asked(bench: CoordinatorBench, mode: str = "sync", staleness: float = 3.0, request: int = 1) -> list[Any]:
    return bench.hear(OPERATOR, Switch(request, mode, staleness))


def view_of(said: list[Any]) -> m.View:
    return [message for message in said if isinstance(message, m.View)][-1]


# --- the coordinator


def test_a_phase_begins_after_the_highest_clock() -> None:
    """Shards hold first; when both have said how far they are, the next clock but one is the first of the new phase."""
    bench = begun()
    holding = view_of(asked(bench))
    assert ((START,), True) == (holding.phases, holding.held)

    assert [] == [x for x in bench.report(0, held=True, highest=7) if isinstance(x, m.View | Switched)]
    said = bench.report(1, held=True, highest=5)
    after = view_of(said)
    assert ((START, m.Phase(8, "sync", 3.0)), False) == (after.phases, after.held)
    assert [Switched(1, 8, "sync", 3.0)] == bench.to(OPERATOR, Switched)
    assert after.phases == only(m.Cluster, said).phases, "workers are told"
    assert any("mode sync, from clock 8 on" in line for line in bench.logged)


@pytest.mark.parametrize("late", [{"held": False}, {"held": True, "opened": False}, {"held": True, "epoch": 1}])
def test_nothing_is_decided_without_all(late: dict[str, Any]) -> None:
    """A shard that does not hold yet, was restarted and has not heard from everybody, or knows an older view only, says nothing."""
    bench = begun()
    asked(bench)
    bench.report(0, held=True)

    assert [] == [x for x in bench.report(1, **late) if isinstance(x, Switched)]
    assert bench.core.modes.changing
    assert [Switched(1, 5, "sync", 3.0)] == [x for x in bench.report(1, held=True) if isinstance(x, Switched)]


def test_a_change_that_is_there_is_answered_at_once() -> None:
    """Before there is a layout, and when it is so already; a repeated question gets the same answer."""
    bench = CoordinatorBench(staleness=3.0)
    assert [Switched(1, 0, "sync", inf)] == asked(bench, "sync", inf)
    bench.shard(0)
    assert (m.Phase(0, "sync", inf),) == only(m.Welcome, bench.join(1)).phases

    later = begun()
    asked(later)
    for number in (0, 1):
        later.report(number, held=True)
    assert [Switched(9, 5, "sync", 3.0)] == asked(later, request=9)


@pytest.mark.parametrize(
    ("mode", "staleness", "code", "told"),
    [
        ("hogwild", 3.0, "mode", "no mode 'hogwild'; it is one of async, sync"),
        ("async", -1.0, "mode", "a staleness of -1"),
        ("async", 0.5, "mode", "a staleness of 0.5"),
        ("async", -inf, "mode", "a staleness of -inf"),
        ("async", 8.0, "busy", "another change is under way"),
    ],
)
def test_what_cannot_be_is_refused(mode: str, staleness: float, code: str, told: str) -> None:
    """By the coordinator, whoever asks; a change that is under way goes on."""
    bench = begun()
    asked(bench)
    (refused,) = asked(bench, mode, staleness, request=2)

    assert (2, code) == (refused.request, refused.code)
    assert told in refused.text
    assert bench.core.modes.changing


def test_one_change_at_a_time() -> None:
    """The next one waits until every shard has passed the last: two phases are all that anybody keeps."""
    bench = begun()
    asked(bench)
    for number in (0, 1):
        bench.report(number, held=True, highest=7)
    (refused,) = asked(bench, "async", 1.0)
    assert "early" == refused.code
    assert "not everybody has reached clock 8 yet" in refused.text

    for number in (0, 1):
        bench.report(number, floor=8)
    asked(bench, "async", 1.0, request=3)
    for number in (0, 1):
        bench.report(number, held=True, floor=8, highest=9)
    assert (m.Phase(8, "sync", 3.0), m.Phase(10, "async", 1.0)) == bench.core.modes.phases


def test_a_shard_that_was_started_again_is_asked_who_is_counted_in() -> None:
    """It looks as if everybody rested, until its workers are back; a third phase would make it forget the one they are in."""
    bench = begun()
    asked(bench, "federated", inf)
    for number in (0, 1):
        bench.report(number, held=True, highest=7)
    for number in (0, 1):
        bench.report(number, floor=0, opened=False)
    asked(bench, "async", 1.0, request=2)
    assert bench.core.modes.changing, "nobody is counted in, so nobody can be left behind"

    (refused,) = [
        message
        for number in (0, 1)
        for message in bench.report(number, held=True, floor=3, clocks=((1, 3),))
        if isinstance(message, m.Refused)
    ]
    assert "early" == refused.code
    assert (START, m.Phase(8, "federated", inf)) == bench.core.modes.phases
    assert not bench.core.modes.changing


def test_a_silent_shard_stops_a_change_for_a_lease() -> None:
    """Then it is off, with the shard named; the others go on in the mode that they had."""
    bench = begun(lease=15.0)
    asked(bench)
    bench.report(0, held=True)
    bench.now = 14.0
    bench.renew(1)
    said = bench.after(1.0)

    (refused,) = bench.to(OPERATOR, m.Refused)
    assert "shard 1 has not confirmed it in 15 s" in refused.text
    after = view_of(said)
    assert ((START,), False) == (after.phases, after.held)


def test_a_restarted_coordinator_takes_the_phases_over() -> None:
    """From a shard with a layout, whatever it was started with; until all are back they hold."""
    phases = (START, m.Phase(8, "sync", 3.0))
    bench = CoordinatorBench(staleness=1.0)
    said = bench.hear(b"s0", m.ShardJoin(SHARD, "host", 1000, "", 0, 2, "layout", phases))
    assert (phases, True) == (view_of(said).phases, view_of(said).held)
    said = bench.hear(b"s1", m.ShardJoin(SHARD + 1, "host", 1001, "", 1, 2, "layout", (START,)))
    assert (phases, False) == (view_of(said).phases, view_of(said).held)

    other = CoordinatorBench(staleness=1.0)
    other.hear(b"s0", m.ShardJoin(SHARD, "host", 1000, "", 0, 1, "layout", (m.Phase(9, "wild", 1.0),)))
    assert (m.Phase(0, "async", 1.0),) == other.core.modes.phases, "no shard may make up a mode"


def test_a_survivor_is_described_before_the_mode_changes() -> None:
    """Nobody asks it before there is a layout: a change would be known to all but the shards."""
    bench = CoordinatorBench()
    bench.hear(b"s0", m.ShardJoin(SHARD, "host", 1000, "", 0, 1, "layout", (START,)))
    asked(bench)
    refused = bench.to(OPERATOR, m.Refused)[-1]
    assert "early" == refused.code and "no worker has described it yet" in refused.text
    assert (START,) == bench.core.modes.phases


# --- the shard


def test_a_shard_that_holds_begins_no_step_beyond() -> None:
    """Steps below the highest clock go on; the pushes that wait are applied when it is decided, each in its own phase."""
    bench = ShardBench(staleness=inf)
    bench.start(1, 2)
    bench.push(1, 0, -1.0, 0.0)
    bench.view((1, 2), phases=(m.Phase(0, "async", inf),), held=True)
    report = bench.report()
    assert (True, 1) == (report.held, report.highest)

    bench.push(1, 1, -1.0, 0.0)
    assert [1.0, 0.0] == bench.weights
    bench.push(2, 0, 0.0, -4.0)
    assert [1.0, 4.0] == bench.weights

    bench.view((1, 2), phases=(m.Phase(0, "async", inf), m.Phase(2, "sync", 0.0)))
    assert [2.0, 4.0] == bench.weights
    bench.push(1, 2, -1.0, 0.0)
    bench.push(2, 1, 0.0, -4.0)
    assert [2.0, 8.0] == bench.weights, "step 2 is averaged, and not everybody has made it"
    bench.push(2, 2, 0.0, -4.0)
    assert [2.5, 10.0] == bench.weights


def test_a_shard_that_holds_answers_nobody_beyond() -> None:
    """A worker may hear of the new phase, and reach it, before the shard: its pull waits, to be judged by that phase's bound."""
    bench = ShardBench(staleness=inf)
    bench.start(1, 2)
    bench.push(1, 0, -1.0, 0.0)
    bench.view((1, 2), phases=(m.Phase(0, "async", inf),), held=True)
    assert [m.Values] == [type(x) for x in bench.pull(2, clock=1, after=1) if isinstance(x, m.Values)]
    assert [] == [x for x in bench.pull(1, clock=2, after=2) if isinstance(x, m.Values)]

    bench.view((1, 2), phases=(m.Phase(0, "async", inf), m.Phase(2, "async", 0.0)))
    assert [] == [x for x in bench.after(1.0) if isinstance(x, m.Values)]
    bench.push(1, 1, -1.0, 0.0)
    bench.push(2, 0, 0.0, -4.0)
    said = bench.push(2, 1, 0.0, -4.0)
    assert [2.0, 8.0] == np.frombuffer(only(m.Values, said).buffers[0], np.float32).tolist()


def test_averages_are_closed_before_steps_that_are_not_averaged() -> None:
    """A push and a pull of the next phase wait for the last step in `sync`."""
    bench = ShardBench(mode="sync")
    bench.start(1, 2)
    bench.push(1, 0, -2.0, 0.0)
    bench.view((1, 2), phases=(m.Phase(0, "sync", 0.0), m.Phase(1, "async", inf)))
    bench.push(1, 1, -8.0, 0.0)
    assert [] == [x for x in bench.pull(1, clock=2, after=4) if isinstance(x, m.Values)]
    assert [0.0, 0.0] == bench.weights

    said = bench.push(2, 0, 0.0, -2.0)
    assert [9.0, 1.0] == np.frombuffer(only(m.Values, said).buffers[0], np.float32).tolist()


def test_who_rests_reads_closed_averages() -> None:
    """A worker that is not counted in waits for nobody's step in `async`, but for the averages before it."""
    bench = ShardBench(mode="sync")
    bench.start(1, 2)
    bench.push(1, 0, -2.0, 0.0)
    bench.view((1, 2), phases=(m.Phase(0, "sync", 0.0), m.Phase(1, "async", inf)))
    bench.do(m.Pause, 1, 1)
    assert [] == [x for x in bench.pull(1, clock=1, after=4) if isinstance(x, m.Values)]

    said = bench.push(2, 0, 0.0, -2.0)
    assert [1.0, 1.0] == np.frombuffer(only(m.Values, said).buffers[0], np.float32).tolist()


def test_a_shard_keeps_what_was_decided() -> None:
    """A restarted coordinator that knows less is told when the shard joins; a shard without weights has nothing to keep."""
    phases = (START, m.Phase(2, "sync", 0.0))
    bench = ShardBench(staleness=3.0)
    bench.view((1, 2), phases=phases)
    bench.hear(-1, m.ShardWelcome(SHARD, RUN + 1, 0, 15.0))
    bench.hear(-1, m.View(RUN + 1, 1, (START,), True, 0, 0, ()))
    assert phases == only(m.ShardJoin, bench.hear(-1, m.Evicted(SHARD))).phases

    empty = ShardBench(fill=False)
    empty.view((1, 2), phases=phases)
    empty.view((1, 2), phases=(START,))
    assert () == only(m.ShardJoin, empty.hear(-1, m.Evicted(SHARD))).phases, "it may be behind, and has nothing to lose"


def test_whoever_enters_says_how_far_it_is() -> None:
    """Counted in at the least clock; the highest is its own, so that no phase begins below it."""
    bench = ShardBench(fill=True)
    bench.do(m.Enter, 1, 6)
    report = bench.report()
    assert (0, 6) == (report.floor, report.highest)


# --- the command, on a cluster


def test_the_mode_changes_under_running_workers() -> None:
    """Momentum and all: with one worker, steps in `sync` and in `async` are the same steps, and none is lost at the change."""
    steps, seen = 30, []
    expected = np.zeros(4, np.float32)
    with shoal.LocalCluster(shards=2, staleness=1, block_bytes=4096) as cluster:
        address = read_join(cluster.join)
        with shoal.connect(cluster.join) as worker:
            worker.register({"w": expected.copy()}, optimizer=shoal.SGD(lr=0.1, momentum=0.9))
            for step in range(steps):
                if step == 10:
                    changing = threading.Thread(target=lambda: seen.append(change(address, "sync", None)))
                    changing.start()
                worker.push({"w": np.full(4, float(step), np.float32)})
                worker.clock()
                worker.pull()
            changing.join()
            seen.append(change(address, "async", "inf"))
            for step in range(steps, steps + 3):
                worker.push({"w": np.full(4, float(step), np.float32)})
                worker.clock()
            found = worker.pull()["w"]
            assert "async" == worker.mode
        momentum = np.zeros(4, np.float32)
        for step in range(steps + 3):
            momentum = 0.9 * momentum + step
            expected -= np.float32(0.1) * momentum
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert [("sync", 1.0), ("async", "inf")] == [(now["mode"], now["staleness"]) for now in seen]
        assert 10 <= seen[0]["clock"] < seen[1]["clock"] <= steps + 1
        assert ("async", "inf", seen[1]["clock"]) == tuple(
            cluster.status()[key] for key in ("mode", "staleness", "mode_since")
        )


def test_mistakes_in_the_command() -> None:
    """A mode that there is not, a bound that cannot be, a refusal: each says which and why."""
    with shoal.LocalCluster() as cluster:
        address = read_join(cluster.join)
        with pytest.raises(BadFlag, match=r"MODE is 'hogwild': must be one of async, sync, federated"):
            change(address, "hogwild", None)
        with pytest.raises(BadFlag, match=r"--staleness is 'few'"):
            change(address, "async", "few")
        assert {"mode": "sync", "staleness": 3.0, "clock": 0} == change(address, "sync", None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Inquiry, "switch", lambda *_: m.Refused(1, "busy", "another change is under way"))
            with pytest.raises(ShoalError, match="the mode stays sync: another change is under way"):
                change(address, "async", None)
