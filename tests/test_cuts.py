"""Consistent cuts (SPEC §15): one shard by the specification's own words, and real processes that train meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from cores import SHARD, ShardBench, only, peer_of

import shoal
from shoal.protocol.cuts import CutKept, Freeze, Frozen, NoCut, Piece, Release, Settle, Take
from shoal.protocol.errors import ConfigError, WaitTimeout
from shoal.protocol.messages import Ack, Pause
from shoal.protocol.phases import closed
from shoal.protocol.records import Phase
from shoal.ps.cuts import HOLD, KEEP, READING
from shoal.worker.cut import consistent


class Cutting(ShardBench):
    """Two workers, counted in; a reader is one of them or another member."""

    def __init__(self, **other: Any) -> None:
        super().__init__((1, 2, 3), staleness=np.inf, **other)
        self.start(1, 2)

    def ask(self, kind: Any, reader: int, *fields: Any) -> list[Any]:
        return self.hear(peer_of(reader), kind(reader, SHARD, *fields))

    def taken(self, maker: int, cut: int, reader: int = 3) -> list[float]:
        piece = only(Piece, self.ask(Take, reader, maker, cut, (0,)))
        return np.frombuffer(piece.buffers[0], np.float32).tolist()


def test_steps_wait_until_all_are_at_one_boundary_and_then_go_on() -> None:
    """A shard holds still, goes up to the clocks that it is told and no further, keeps that, and goes on."""
    bench = Cutting()
    bench.push(1, 0, 1.0, 0.0)
    frozen = only(Frozen, bench.ask(Freeze, 3, 1))
    assert (0, ((1, 1), (2, 0))) == (frozen.closed, tuple(sorted(frozen.reached)))

    bench.push(1, 1, 1.0, 0.0)
    bench.push(2, 0, 0.0, 1.0)
    assert [-1.0, 0.0] == bench.weights

    settled = only(CutKept, bench.ask(Settle, 3, 1, 0, ((1, 1), (2, 1))))
    assert (1, settled.version) == (settled.min_clock, bench.core.weights.store.version - 1)
    assert [-2.0, -1.0] == bench.weights
    assert [-1.0, -1.0] == bench.taken(3, 1) == bench.taken(3, 1, reader=2)


def test_it_waits_for_what_is_under_way() -> None:
    """A step that another shard has is awaited; what comes of later ones is not let past it."""
    bench = Cutting()
    bench.ask(Freeze, 3, 1)
    assert [] == [m for m in bench.ask(Settle, 3, 1, 0, ((1, 1), (2, 0))) if isinstance(m, CutKept)]
    bench.push(2, 0, 0.0, 5.0)
    only(CutKept, bench.push(1, 0, 1.0, 0.0))

    assert [-1.0, 0.0] == bench.taken(3, 1)
    assert [-1.0, -5.0] == bench.weights


def test_a_step_that_has_begun_is_whole_in_a_cut() -> None:
    """Of a step that is pushed in several messages a part is in the weights: the cut has all of it."""
    bench = Cutting()
    bench.push(1, 0, 1.0, 0.0, advance=False)
    assert (1, 1) in only(Frozen, bench.ask(Freeze, 3, 1)).reached
    bench.ask(Settle, 3, 1, 0, ((1, 1), (2, 0)))
    bench.push(1, 0, 0.0, 1.0, advance=False)
    only(CutKept, bench.push(1, 0))

    assert [-1.0, -1.0] == bench.taken(3, 1)


def test_nobody_waits_longer_than_a_freeze_lasts() -> None:
    """A maker that has died, or waits for a step that does not end, holds nobody up; it is told why."""
    for settles in (False, True):
        bench = Cutting()
        bench.push(1, 0, 1.0, 0.0, advance=False)
        bench.ask(Freeze, 3, 1)
        if settles:
            bench.ask(Settle, 3, 1, 0, ((1, 1), (2, 0)))
        bench.push(2, 0, 0.0, 1.0)
        bench.now += HOLD - 0.1
        assert [-1.0, 0.0] == bench.weights
        assert bench.core.wake_at <= bench.now + 0.1 + 1e-9
        said = bench.after(0.1)

        assert ("name1" in only(NoCut, said).why) == settles
        assert [2] == [ack.incarnation for ack in said if isinstance(ack, Ack)]
        assert [-1.0, -1.0] == bench.weights
        assert "vain" in only(NoCut, bench.ask(Settle, 3, 1, 0, ((1, 1), (2, 0)))).why


def test_messages_may_come_twice_or_late() -> None:
    """The same question has the same answer; one that comes when all is over begins nothing."""
    bench = Cutting()
    assert bench.ask(Freeze, 3, 1) == bench.ask(Freeze, 3, 1)
    settle = (Settle, 3, 1, 0, ((1, 0), (2, 0)))
    assert [only(CutKept, bench.ask(*settle))] == bench.ask(*settle)
    bench.ask(Release, 3, 3, 1)
    assert "over" in only(NoCut, bench.ask(Freeze, 3, 1)).why
    assert "not kept" in only(NoCut, bench.ask(Take, 3, 3, 1, (0,))).why
    bench.ask(Release, 3, 3, 2)  # overtakes the question
    assert "over" in only(NoCut, bench.ask(Freeze, 3, 2)).why


def test_one_cut_at_a_time() -> None:
    """Another worker's is refused while one is frozen or being read; afterwards it takes its place."""
    bench = Cutting()
    bench.ask(Freeze, 3, 1)
    assert "another" in only(NoCut, bench.ask(Freeze, 2, 1)).why
    bench.ask(Settle, 3, 1, 0, ((1, 0), (2, 0)))
    assert "another" in only(NoCut, bench.ask(Freeze, 2, 2)).why
    bench.after(READING)
    only(Frozen, bench.ask(Freeze, 2, 3))
    assert "not kept" in only(NoCut, bench.ask(Take, 3, 3, 1, (0,))).why


def test_what_is_kept_costs_what_changes_and_goes() -> None:
    """A snapshot is copied block by block as they change, is never more than the parameters, and is dropped in the end."""
    bench = Cutting()
    bench.ask(Freeze, 3, 1)
    bench.ask(Settle, 3, 1, 0, ((1, 0), (2, 0)))
    cuts = bench.core.cuts
    before = cuts.nbytes
    for clock in range(3):
        bench.push(1, clock, 1.0, 1.0)
    assert (0, bench.core.weights.store.nbytes) == (before, cuts.nbytes)
    bench.after(KEEP)
    assert 0 == cuts.nbytes


def test_the_maker_and_the_dead_hold_nobody_up() -> None:
    """A maker that leaves takes its freeze along; a worker that leaves is not waited for, nor is one that pauses."""
    bench = Cutting()
    bench.ask(Freeze, 3, 1)
    bench.push(1, 0, 1.0, 0.0)
    bench.view((1, 2))
    assert [-1.0, 0.0] == bench.weights

    bench.ask(Freeze, 1, 1)
    bench.ask(Settle, 1, 1, 0, ((1, 1), (2, 7)))
    only(CutKept, bench.view((1,)))

    bench = Cutting()
    bench.push(2, 0, 1.0, 0.0)
    bench.do(Pause, 2, 1)
    assert (2, 1) in only(Frozen, bench.ask(Freeze, 3, 1)).reached


def test_only_who_is_in_the_view_and_what_is_here() -> None:
    """A stranger is told so, a shard without weights has no cut, and a block of another shard is refused."""
    bench = ShardBench((1,), fill=False)
    assert "no weights" in only(NoCut, bench.hear(peer_of(1), Freeze(1, SHARD, 1))).why
    bench = Cutting()
    assert ["Evicted"] == [type(m).__name__ for m in bench.hear(b"x", Freeze(77, SHARD, 1))]
    bench.ask(Freeze, 3, 1)
    bench.ask(Settle, 3, 1, 0, ())
    assert "not on this shard" in only(NoCut, bench.ask(Take, 3, 3, 1, (9,))).why


@pytest.mark.parametrize(
    ("modes", "step", "expected"),
    [
        (("async",), 7, 0),
        (("sync",), 7, 7),
        (("async", "sync"), 3, 5),
        (("async", "sync"), 9, 9),
        (("sync", "async"), 3, 3),
        (("sync", "async"), 9, 5),
        (("sync", "federated"), 9, 5),
        (("sync", "sync"), 9, 9),
    ],
)
def test_closed_steps(modes: tuple[str, ...], step: int, expected: int) -> None:
    """Which averaged steps are in the weights follows from the open step and the phases."""
    phases = tuple(Phase(5 * number, mode, 0.0) for number, mode in enumerate(modes))
    assert expected == closed(phases, step)
    later = tuple(Phase(5 * number, "async", 0.0) for number in (3, 4))
    assert 15 == closed(later, step)


# --- real processes


def test_a_cut_of_a_running_cluster() -> None:
    """While two workers push ones to all elements, on two shards, every cut has the same number everywhere; a step without an end
    is named, and is in the cut once it has one."""
    arrays = {"a": np.zeros(3000, np.float32), "b": np.zeros((40, 50), np.float32)}
    ones = {name: np.ones_like(array) for name, array in arrays.items()}
    stop = threading.Event()
    with shoal.LocalCluster(shards=2, staleness=np.inf, min_workers=2) as cluster:
        trainers = [shoal.connect(cluster.join, name=f"w{n}") for n in range(2)]

        def train(worker: shoal.Worker) -> None:
            worker.register(arrays, optimizer=shoal.Delta())
            while not stop.is_set():
                worker.push(ones)
                worker.clock()
                worker.pull()
            worker.close()

        threads = [threading.Thread(target=train, args=(worker,)) for worker in trainers]
        for thread in threads:
            thread.start()
        try:
            with shoal.connect(cluster.join, name="reader") as reader:
                watch(reader, arrays)
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)


def watch(reader: shoal.Worker, arrays: dict[str, Any]) -> None:
    """Make cuts, beside all else."""
    with pytest.raises(ConfigError, match="no model"):
        consistent(reader)
    reader.register(arrays, optimizer=shoal.Delta())
    found = []
    for _ in range(5):
        values, boundary = consistent(reader, timeout=20)
        (level,) = {float(level) for array in values.values() for level in np.unique(array)}
        found.append((level, boundary.clock))
        assert "async" == boundary.mode
    assert found == sorted(found)

    reader.push({"a": np.full(3000, 1e6, np.float32)}).result(10)
    with pytest.raises(WaitTimeout, match=r"reader has begun step \d+ and has not ended it"):
        consistent(reader, timeout=2.5)
    reader.push({"b": np.full((40, 50), 1e6, np.float32)})
    reader.clock()
    values, _ = consistent(reader, timeout=20)
    (level,) = {float(level) for array in values.values() for level in np.unique(array)}
    assert 1e6 < level < 2e6
