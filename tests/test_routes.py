"""Where waiting tasks go: every one of them somewhere or nowhere, in bounded batches, whatever their sizes (rung T0)."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasknet import NAME, MemoryLibrary

from shoal.protocol.tasking import Asked, Offer, Work
from shoal.tasks.crew import Batch, Crew
from shoal.tasks.latency import Latencies
from shoal.tasks.parcels import shares
from shoal.tasks.rollout import Rollout
from shoal.tasks.routes import MOST_BYTES, MOST_ITEMS, Planner, Plans
from shoal.tasks.values import pack
from shoal.tasks.waiting import Item, Waiting


class Bench:
    """Executors that hold one version, and a queue."""

    def __init__(self, policy: str = "best", executors: int = 2, seconds: float | None = None) -> None:
        library = MemoryLibrary()
        card = library.make(NAME, b"weights", {NAME: {"auc": 0.5}}, ("site:a",))
        library.promote(NAME, 1)
        self.crew, self.waiting = Crew(), Waiting()
        for number in range(executors):
            offer = Offer(number, f"x{number}", (NAME,), True, (), 1.0, inf, (card.identity,), (), ())
            seat = self.crew.offered(b"peer", offer, 0.0)
            if seat is not None and seconds is not None:
                seat.seconds[card.identity] = Latencies()
                seat.seconds[card.identity].add(seconds)
        rollout = Rollout(library, {}, lambda key, text: None)
        self.planner = Planner(rollout, self.crew, {}, policy, 0.005, lambda a, b: a / (a + b))
        self.count = 0

    def add(self, items: int, nbytes: int, label: str = "") -> Item:
        self.count += 1
        asked = Asked(self.count, NAME, "", items, inf, 0.0, label, inf, inf)
        item = Item((1, self.count), asked, bytes(nbytes), 0.0)
        self.waiting.add(item)
        return item

    def plan(self) -> Plans:
        return self.planner.plan(self.waiting, 1.0)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, MOST_BYTES // 2), st.sampled_from(("", "site:a", "site:b"))),
        max_size=60,
    ),
    st.sampled_from(("best", "cheapest", "thompson", "assign")),
    st.sampled_from((None, 1e-6, 1e-3, 1.0)),
)
def test_every_task_goes_somewhere_or_waits(
    tasks: list[tuple[int, int, str]], policy: str, seconds: float | None
) -> None:
    """None is lost or doubled, none with a label goes where it may not, and batches have their bounds."""
    bench = Bench(policy, seconds=seconds)
    everything = [bench.add(*task) for task in tasks]
    plans = bench.plan()
    gone = [item for going in plans.batches for item in going.items]
    assert len(gone) == len(set(map(id, gone))) and len(gone) + len(bench.waiting) == len(everything)
    assert all(item.asked.privacy != "site:b" for item in gone)
    assert {id(item) for item, _ in plans.unmet} == {id(item) for item in everything if item.asked.privacy == "site:b"}
    assert not tasks or len(plans.batches) or all(task[2] == "site:b" for task in tasks)
    for going in plans.batches:
        if policy != "assign":
            assert len(going.items) <= MOST_ITEMS
            assert len(going.items) == 1 or going.nbytes <= MOST_BYTES
        assert going.nbytes == sum(len(item.payload) for item in going.items)


def test_many_large_tasks_do_not_stand_in_each_others_way() -> None:
    """Batches that are full by their bytes, long before they are by their number."""
    bench = Bench(seconds=1e-7)
    for _ in range(100):
        bench.add(50, 157_000)
    plans = bench.plan()
    assert 4 == sum(len(going.items) > 20 for going in plans.batches) or 2 == len(plans.batches)
    assert all(going.nbytes <= MOST_BYTES for going in plans.batches)


def test_a_task_that_takes_long_is_split_by_pace() -> None:
    """In proportion to how quick each has been; what cannot be cut is not."""
    bench = Bench(seconds=0.001)
    quick = next(iter(bench.crew))
    for known in quick.seconds.values():
        for _ in range(300):
            known.add(0.00025)
    item = bench.add(1000, 0)
    item.payload = pack(np.zeros((1000, 2), np.float32))
    sizes = {going.seat.name: going.items[0].items for going in bench.plan().batches}
    assert {"x0": 800, "x1": 200} == sizes and item.parcel is None
    bench = Bench(seconds=0.001)
    bench.add(1000, 8)  # no rows
    assert [1000] == [going.items[0].items for going in bench.plan().batches]


@given(st.integers(1, 10_000), st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_shares_add_up(items: int, rates: list[float]) -> None:
    found = shares(items, rates)
    assert items == sum(found) and min(found) >= 0
    assert all(
        abs(count - items * rate / sum(rates)) <= 1 + 1e-6 * items for count, rate in zip(found, rates, strict=True)
    )


@pytest.mark.parametrize("policy", ["best", "assign"])
def test_who_has_no_room_gets_nothing(policy: str) -> None:
    """Two batches under way are enough."""
    bench = Bench(policy, executors=1)
    (seat,) = bench.crew
    for number in range(2):
        work = Work(0, number, seat.offer.loaded[0], (1,), (b"",))
        seat.batches[number] = Batch(work, [], 0.0, 0.0)
    bench.add(1, 8)
    plans = bench.plan()
    assert not plans.batches and not plans.unmet and 1 == len(bench.waiting)
