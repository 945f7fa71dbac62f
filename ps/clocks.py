"""The clocks of the workers that a shard counts in (SPEC §6.1).

Rules
- `min` never falls, and stays while it is held.
- A worker's clock never falls while it is counted in.
"""

from __future__ import annotations


class Clocks:
    """Who is at which clock. Keys are incarnations."""

    def __init__(self, floor: int = 0) -> None:
        self._clocks: dict[int, int] = {}
        self._min = floor
        self._highest = floor
        self._held = True

    @property
    def min(self) -> int:
        """The least clock; with nobody counted in, the highest ever reached."""
        return self._min

    @property
    def highest(self) -> int:
        """The highest clock that anybody has had."""
        return self._highest

    def __contains__(self, incarnation: int) -> bool:
        return incarnation in self._clocks

    def __len__(self) -> int:
        return len(self._clocks)

    def get(self, incarnation: int) -> int | None:
        return self._clocks.get(incarnation)

    def items(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._clocks.items())

    def slowest(self) -> int | None:
        """The first of those at the least clock."""
        return min(self._clocks, key=self._clocks.__getitem__, default=None)

    def release(self) -> None:
        """From now on `min` follows the clocks."""
        self._held = False
        self._settle()

    def enter(self, incarnation: int, clock: int | None = None, reached: int = 0) -> int:
        """Count a worker in, at `min` unless a clock is given; again changes nothing. Returns `min`.

        Args:
            reached: where it is, wherever it begins here.
        """
        self._highest = max(self._highest, reached)
        if incarnation not in self._clocks:
            self._clocks[incarnation] = self._min if clock is None else max(clock, self._min)
            self._highest = max(self._highest, self._clocks[incarnation])
            self._settle()
        return self._min

    def reach(self, incarnation: int, clock: int) -> None:
        """A worker that is counted in has reached `clock`; a lower one than its own changes nothing."""
        before = self._clocks[incarnation]
        if clock > before:
            self._clocks[incarnation] = clock
            self._highest = max(self._highest, clock)
            if before == self._min:
                self._settle()

    def leave(self, incarnation: int, clock: int = 0) -> None:
        """Count a worker out, if it was in. `clock` is where it is, for a shard that has not counted it in before."""
        self._highest = max(self._highest, clock)
        if self._clocks.pop(incarnation, None) == self._min or not self._clocks:
            self._settle()

    def _settle(self) -> None:
        if self._held:
            return
        self._min = max(self._min, min(self._clocks.values(), default=self._highest))
