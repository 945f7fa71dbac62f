"""Clocks: the least of those counted in, held until released, never falling (rung T0, SPEC §6.1)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.ps.clocks import Clocks

workers = st.integers(1, 5)


class ClocksMachine(RuleBasedStateMachine):
    """Workers come, step and go, as the stream lets them; beside them a model that looks at everything each time."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks = Clocks()
        self.model: dict[int, int] = {}
        self.reached = [0]
        self.minima = [0]
        self.held = True

    @rule(worker=workers)
    def enter(self, worker: int) -> None:
        assert self.minima[-1] == self.clocks.enter(worker)
        self.model.setdefault(worker, self.minima[-1])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), clock=st.integers(0, 12))
    def reach(self, data: st.DataObject, clock: int) -> None:
        worker = data.draw(st.sampled_from(sorted(self.model)))
        self.clocks.reach(worker, clock)
        self.model[worker] = max(self.model[worker], clock)
        self.reached.append(self.model[worker])

    @rule(worker=workers, clock=st.integers(0, 12))
    def leave(self, worker: int, clock: int) -> None:
        self.reached.append(clock)
        self.clocks.leave(worker, clock)
        self.model.pop(worker, None)

    @rule()
    def release(self) -> None:
        self.clocks.release()
        self.held = False

    @invariant()
    def the_least_clock_is_known(self) -> None:
        least = 0 if self.held else min(self.model.values(), default=max(self.reached))
        self.minima.append(self.clocks.min)

        assert least == self.clocks.min
        assert self.minima[-2] <= self.minima[-1]
        assert self.model == dict(self.clocks.items())
        assert len(self.model) == len(self.clocks)
        slowest = self.clocks.slowest()
        assert (slowest is None) == (not self.model)
        assert slowest is None or min(self.model.values()) == self.clocks.get(slowest)


ClocksMachine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)
test_min_is_the_least_of_those_counted_in = ClocksMachine.TestCase


def test_a_worker_enters_at_a_clock_that_is_known() -> None:
    """Members of a restarted shard's first view count at the view's clocks; nobody enters below `min` (SPEC §6.1.5)."""
    clocks = Clocks()
    clocks.enter(1, 4)
    clocks.enter(2, 6)
    clocks.release()
    assert 4 == clocks.min == clocks.enter(3, 2)

    assert {1: 4, 2: 6, 3: 4} == dict(clocks.items())
    assert 4 == clocks.enter(1, 9)
    assert 4 == clocks.get(1)


def test_a_clock_entered_with_was_reached() -> None:
    """With nobody left, `min` is the highest clock ever reached, by whatever way (SPEC §6.1.1)."""
    clocks = Clocks()
    clocks.enter(1, 4)
    clocks.enter(2, 6)
    clocks.release()
    clocks.leave(2)
    clocks.leave(1)

    assert 6 == clocks.min
