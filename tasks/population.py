"""Population-based training (Jaderberg et al. 2017): members of a population train with settings of their own; after each
generation the worst go on from the weights of the best, with settings near theirs. Pure: what is drawn comes from outside.

Rules
- Every member decides for itself, from what all have said: there is no master, and who is late is judged by what he said last.
- Settings are numbers within bounds, on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..protocol.errors import ConfigError

Settings: TypeAlias = Mapping[str, float]
Draw: TypeAlias = Callable[[], float]
"""A uniform number from 0 up to 1: `random.Random(seed).random`."""
FACTOR = 1.25
"""By which a setting is changed when it is explored, up or down; the paper's 1.2, about."""


@dataclass(frozen=True)
class Space:
    """Bounds of each setting, both above 0."""

    bounds: Mapping[str, tuple[float, float]]

    def __post_init__(self) -> None:
        for name, (low, high) in self.bounds.items():
            if not 0 < low <= high < math.inf:
                raise ConfigError(f"the setting {name!r} is from {low} to {high}", hint="both above 0, and in order")

    def draw(self, draw: Draw) -> dict[str, float]:
        """Settings from anywhere in the space: how a member begins, and random search."""
        return {name: low * (high / low) ** draw() for name, (low, high) in self.bounds.items()}

    def near(self, settings: Settings, draw: Draw) -> dict[str, float]:
        """Each setting a step up or down, within the bounds."""
        return {
            name: min(high, max(low, settings[name] * (FACTOR if draw() < 0.5 else 1 / FACTOR)))
            for name, (low, high) in self.bounds.items()
        }


@dataclass(frozen=True)
class Said:
    """What a member has said last: how good it is, higher is better, and with which settings."""

    member: str
    score: float
    settings: Settings


@dataclass(frozen=True)
class Move:
    """What a member does next. `source`: whose weights it goes on with; itself, where nothing is copied."""

    source: str
    settings: Mapping[str, float]


def move(me: str, said: Sequence[Said], space: Space, draw: Draw, share: float = 0.25) -> Move:
    """The next move of a member.

    Args:
        said: of all members that have said something, `me` among them.
        share: of the population that counts as best, and as worst; at least one of each where there are two.

    Raises:
        ConfigError: `me` has said nothing.
    """
    mine = next((each for each in said if each.member == me), None)
    if mine is None:
        raise ConfigError(f"{me!r} has not said how good it is")
    order = sorted(said, key=lambda each: (each.score if each.score == each.score else -math.inf, each.member))
    count = max(1, int(share * len(order))) if len(order) > 1 else 0
    worst, best = order[:count], order[len(order) - count :]
    if mine not in worst or mine in best:
        return Move(me, dict(mine.settings))
    chosen = best[min(len(best) - 1, int(draw() * len(best)))]
    return Move(chosen.member, space.near(chosen.settings, draw))
