"""How much noise makes a sum say how little (SPEC §14), as numbers: Skellam noise (Agarwal, Kairouz and Liu 2021).

Rules
- Only those survivors are counted on who are honest whoever drops out: the noise of each is the whole divided by their number.
- The unit of privacy is a client. To turn divergences into epsilon and delta, and to add up rounds, is the accountant's.
- No numpy: a coordinator makes plans and touches no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

FINE = 3.0
"""Units of the clip, by the root of the elements, from which rounding costs next to nothing."""
SIGMAS = 12.0
"""Noise beyond this many standard deviations does not occur: 2^-100 for each element."""


@dataclass(frozen=True, slots=True)
class Skellam:
    """How much noise.

    Attributes:
        clip: the L2 norm that no update exceeds. multiplier: standard deviation of the whole noise, by `clip`.
        units: integers that `clip` becomes.
        honest: survivors that are counted on, at most the fewest that there may be, less those of them that may be corrupt.

    Raises:
        ConfigError: a number that cannot be.
    """

    clip: float
    multiplier: float
    units: int
    honest: int

    def __post_init__(self) -> None:
        if not (
            0 < self.clip < math.inf and 0 < self.multiplier < math.inf and 0 < self.units < 2**31 and self.honest > 0
        ):
            raise ConfigError(
                f"noise with clip {self.clip}, multiplier {self.multiplier}, {self.units} units, {self.honest} honest"
            )

    @property
    def variance(self) -> float:
        """Of what one client adds to each element, in units squared."""
        return (self.multiplier * self.units) ** 2 / self.honest

    def norm(self, elements: int) -> float:
        """The L2 norm in units that no rounded update exceeds: conditional rounding with beta = e^-1/2 (Kairouz et al. 2021)."""
        root = math.sqrt(elements)
        return min(self.units + root, math.sqrt(self.units**2 + elements / 4 + self.units + root / 2))

    def bound(self, clients: int) -> float:
        """What no element of a sum of so many clients exceeds, in units: each is clipped and rounded, and noise has its limits."""
        return clients * (self.units + 1) + SIGMAS * math.sqrt(clients * self.variance)

    def fits(self, bits: int, clients: int) -> bool:
        """Does the sum of so many clients stay within a modulus of so many bits?"""
        return self.bound(clients) < 1 << (bits - 1)


def renyi(orders: Sequence[int], amount: Skellam, elements: int) -> list[float]:
    """The Renyi divergence of one round by order, for sums with and without one client (Agarwal, Kairouz and Liu 2021).

    Args:
        orders: whole numbers over 1. elements: of the update.

    Raises:
        ValueError: an order for which nothing is proven.
    """
    if any(order != int(order) or order < 2 for order in orders):
        raise ValueError("the bound is proven for whole orders from 2")
    square = amount.norm(elements) ** 2
    long = min(math.sqrt(elements * square), square)
    whole = amount.variance * amount.honest
    return [
        order * square / (2 * whole)
        + min(((2 * order - 1) * square + 6 * long) / (4 * whole**2), 3 * long / (2 * whole))
        for order in orders
    ]
