"""How good a version is at a kind of task: what its card says, and what has come back since, as a Beta distribution.

Rules
- A reward is between 0 (of no use) and 1 (right). It counts as that much of a success and the rest of a failure.
- The last rewards count, so many of them (a window): a model that was good and is not any more is found out.
- The card's word counts as `WORD` rewards: it decides at first, and feedback soon decides more.
- Whatever is drawn comes from outside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from ..protocol.errors import ConfigError

WINDOW = 500
WORD = 4.0
SCALE = 1 << 20
"""Rewards are kept as whole parts of this, so that what leaves the window takes away just what it brought."""
Beta: TypeAlias = Callable[[float, float], float]
"""A draw from the Beta distribution with these parameters: `random.Random(seed).betavariate`."""


class Belief:
    """About one version and one kind of task.

    Args:
        word: the quality on the card; None: nobody knows, and half is taken for it. window: so many rewards count.
    """

    def __init__(self, word: float | None = None, window: int = WINDOW) -> None:
        if window < 1:
            raise ConfigError(f"a window of {window} rewards")
        self._word = 0.5 if word is None else min(max(word, 0.0), 1.0)
        self._window = window
        self._rewards: deque[int] = deque()
        self._sum = 0

    def __repr__(self) -> str:
        return f"Belief({self.mean:.3f} of {self.count})"

    def add(self, reward: float) -> None:
        """One more.

        Raises:
            ConfigError: it is not between 0 and 1.
        """
        if not 0 <= reward <= 1:
            raise ConfigError(f"a reward of {reward}", hint="from 0, of no use, to 1, right")
        self._rewards.append(round(reward * SCALE))
        self._sum += self._rewards[-1]
        if len(self._rewards) > self._window:
            self._sum -= self._rewards.popleft()

    @property
    def count(self) -> int:
        """Rewards that count."""
        return len(self._rewards)

    @property
    def mean(self) -> float:
        """The expected reward of the next task; what the card says while nothing has come back."""
        return (WORD * self._word + self._sum / SCALE) / (WORD + self.count)

    def draw(self, beta: Beta) -> float:
        """One of the qualities that it may have, as likely as it is (Thompson 1933)."""
        return beta(*self._parameters)

    @property
    def _parameters(self) -> tuple[float, float]:
        """Of the Beta distribution, each at least 1: it has one peak."""
        good = self._sum / SCALE
        return 1.0 + WORD * self._word + good, 1.0 + WORD * (1.0 - self._word) + self.count - good
