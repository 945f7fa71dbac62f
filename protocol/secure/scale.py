"""How floats become integers of a modulus, as numbers (SPEC §14): Q, the units, and what is counted beside a sum.

Rules
- Whatever clients send, a sum of so many does not wrap: each stays within Q = (2^(m-1) - 1) // N.
- No numpy: a coordinator makes plans and touches no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

CLIENTS, WEIGHT, CAPPED, CLIPPED = range(4)
"""Lanes of the auxiliary vector; behind them are the metrics'."""
LANES = 4
"""How many there are without metrics."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How floats become integers.

    Args:
        bits: of the modulus, 16 or 32. clip: magnitude beyond which an element is cut off.
        cap: the largest relative weight. clients: how many may be summed.

    Raises:
        ConfigError: a number is out of range, or there are so many clients that nothing is left for each.
    """

    bits: int
    clip: float
    cap: float
    clients: int

    def __post_init__(self) -> None:
        if (
            self.bits not in (16, 32)
            or not 0 < self.clip < math.inf
            or not 1 <= self.cap < math.inf
            or self.clients < 1
        ):
            raise ConfigError(f"{self.bits} bits, clip {self.clip}, weights to {self.cap}, {self.clients} clients")
        if not 0 < self.units < math.inf:
            raise ConfigError(
                f"{self.clients} clients and clip {self.clip:g} leave nothing of {self.bits} bits",
                hint="a modulus of 32 bits",
            )

    @property
    def bound(self) -> int:
        """Q: no client's integer is larger in magnitude."""
        return ((1 << (self.bits - 1)) - 1) // self.clients

    @property
    def units(self) -> float:
        """Integers for 1.0 with a relative weight of 1."""
        return self.bound / (self.clip * self.cap)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """What integers travel as: unsigned, little-endian on the wire."""
        from numpy import dtype  # who has no arrays does without it

        return dtype(f"<u{self.bits // 8}")
