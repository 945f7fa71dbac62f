"""Which mode a step is made in, and what its pull must wait for (rung T0, SPEC §6.2, §6.5)."""

from __future__ import annotations

from math import inf

import pytest

from shoal.protocol.phases import at, needed, opens
from shoal.protocol.records import Phase

ASYNC, SYNC = Phase(0, "async", 2.0), Phase(5, "sync", 2.0)


@pytest.mark.parametrize(("clock", "phase"), [(0, ASYNC), (4, ASYNC), (5, SYNC), (99, SYNC)])
def test_a_clock_has_one_phase(clock: int, phase: Phase) -> None:
    """The last that has begun; alone, a phase holds for every clock."""
    assert phase == at((ASYNC, SYNC), clock)
    assert SYNC == at((SYNC,), clock)


def test_what_a_pull_waits_for() -> None:
    """The bound of its own phase; after averages, these are closed first, and only then."""
    to_sync, to_async = (ASYNC, SYNC), (Phase(0, "sync", 2.0), Phase(5, "async", 2.0))

    assert [0, 0, 0, 1, 2, 5, 6] == [max(0, needed(to_sync, clock)) for clock in range(7)]
    assert [0, 1, 2, 3, 4, 5, 5, 5, 6] == [needed(to_async, clock) for clock in range(9)]
    assert 0 == needed((Phase(0, "async", inf),), 7)
    assert 5 == needed((Phase(0, "sync", 0.0), Phase(5, "async", inf)), 7)


def test_steps_wait_for_averages_alone() -> None:
    """Of the phase before: a first phase has none, and what is not averaged is over when it is applied."""
    assert [0, 0] == [opens((ASYNC, SYNC), clock) for clock in (4, 5)]
    assert [0, 5, 5] == [opens((Phase(0, "sync", 0.0), Phase(5, "async", inf)), clock) for clock in (4, 5, 9)]
    assert 0 == opens((Phase(5, "sync", 0.0),), 9)
