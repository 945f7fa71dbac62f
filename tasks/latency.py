"""How long something takes: quantiles of what was measured last."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

WINDOW = 256


class Latencies:
    """The last measurements, in seconds.

    Args:
        guess: what is said while nothing was measured. window: so many count.
    """

    def __init__(self, guess: float = 0.0, window: int = WINDOW) -> None:
        self._guess, self._window = guess, window
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._last)

    def add(self, seconds: float) -> None:
        """One more; what is no time is left out."""
        if not (math.isfinite(seconds) and seconds >= 0):
            return
        self._last.append(seconds)
        insort(self._sorted, seconds)
        if len(self._last) > self._window:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]

    def quantile(self, share: float) -> float:
        """So long, or less, for this share of the measurements; `share` above 0, up to 1."""
        if not self._sorted:
            return self._guess
        return self._sorted[max(0, math.ceil(share * len(self._sorted)) - 1)]
