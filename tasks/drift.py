"""Has a stream of rewards changed, and when: one stream for each version and kind of task.

Rules
- Whether is ADWIN's to say (Bifet and Gavaldà 2007), by river, an extra: two parts of the last rewards whose means differ by more
  than chance allows. When is where two constant means fit those rewards best: ADWIN cuts late, so as to be sure.
- After a change the old rewards are forgotten: the next one is a change from the new.
- Only the order of rewards counts, not the time between them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import ConfigError

SURE = 0.002
"""ADWIN's delta: of a stream that does not change, how likely it is called changed at one of its looks, at most."""
MOST = 4000
"""Rewards among which the moment is looked for."""


@dataclass(frozen=True, slots=True)
class Change:
    """Attributes:
    at: the moment, as a count of rewards of this stream: the first of the new ones has this number, from 0.
    seen: how many had come when it was noticed. before, after: means of the rewards on either side of it.
    """

    at: int
    seen: int
    before: float
    after: float

    @property
    def fall(self) -> float:
        """How much less the rewards are; below 0 they are more."""
        return self.before - self.after

    def __str__(self) -> str:
        return f"from {self.before:.3f} to {self.after:.3f} at reward {self.at}, noticed at {self.seen}"


class Drift:
    """A stream of rewards.

    Args:
        sure: ADWIN's delta; smaller is later and surer.

    Raises:
        ConfigError: river is not installed, or `sure` is no probability.
    """

    def __init__(self, sure: float = SURE) -> None:
        if not 0 < sure < 1:
            raise ConfigError(f"a delta of {sure}", hint="between 0 and 1: the chance of a false alarm")
        try:
            from river import drift
        except ImportError:
            raise ConfigError(
                "drift is found by river, which is not installed", hint="pip install 'shoal[drift]'"
            ) from None
        river: Any = drift  # without types for its constructors
        self._adwin = river.ADWIN(delta=sure)
        self._recent: deque[float] = deque(maxlen=MOST)
        self.seen = 0

    def add(self, reward: float) -> Change | None:
        """One more. What has changed, if that shows now.

        Raises:
            ConfigError: it is not between 0 and 1.
        """
        if not 0 <= reward <= 1:
            raise ConfigError(f"a reward of {reward}", hint="from 0, of no use, to 1, right")
        self._adwin.update(reward)
        self._recent.append(reward)
        self.seen += 1
        if not self._adwin.drift_detected:
            return None
        rewards = list(self._recent)
        cut = best_cut(rewards)
        change = Change(self.seen - len(rewards) + cut, self.seen, _mean(rewards[:cut]), _mean(rewards[cut:]))
        self._forget(rewards[cut:])
        return change

    def _forget(self, rest: list[float]) -> None:
        """Go on with the new rewards alone."""
        self._adwin = self._adwin.clone()
        for reward in rest:
            self._adwin.update(reward)
        self._recent = deque(rest, maxlen=MOST)


def best_cut(rewards: list[float]) -> int:
    """Where two constants fit best, by least squares: how many of them are before. At least two rewards."""
    total, count = sum(rewards), len(rewards)
    best, place, left = -1.0, 1, 0.0
    for cut in range(1, count):
        left += rewards[cut - 1]
        lead = left / cut - (total - left) / (count - cut)
        explained = lead * lead * cut * (count - cut)
        if explained > best:
            best, place = explained, cut
    return place


def _mean(rewards: list[float]) -> float:
    return sum(rewards) / len(rewards)
