"""A secret of 32 bytes in shares, any `threshold` of which give it back and fewer say nothing (Shamir 1979; SPEC §14).

Rules
- The field is that of the smallest prime over 2^256, so that any 32 bytes are an element. A share is 33 bytes, big-endian.
- The coefficients are uniform and from the system's randomness.
- A wrong share is not noticed here: who combines compares with a commitment or a public key.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from operator import mul

from ..errors import ProtocolError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
LEAST_THRESHOLD = 2


def split(
    secret: bytes, threshold: int, xs: Sequence[int], below: Callable[[int], int] = secrets.randbelow
) -> list[bytes]:
    """One share for each place.

    Args:
        secret: 32 bytes. threshold: how many shares give it back, from 2 to as many as there are.
        xs: the places, distinct, from 1.
        below: draws a uniform number from 0 up to its argument, without it.

    Raises:
        ValueError: an argument is out of range.
    """
    _places(xs)
    if len(secret) != SECRET_BYTES or not LEAST_THRESHOLD <= threshold <= len(xs):
        raise ValueError(f"{len(secret)} bytes in {len(xs)} shares, {threshold} of which are enough")
    coefficients = [int.from_bytes(secret, "big"), *(below(PRIME) for _ in range(threshold - 1))]
    return [polynomial(coefficients, x, PRIME).to_bytes(SHARE_BYTES, "big") for x in xs]


class Combiner:
    """Gives back secrets whose shares are at the same places; what depends on the places alone is computed once.

    Args:
        xs: the places, distinct, from 1.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, xs: Sequence[int]) -> None:
        _places(xs)
        self._factors = lagrange(xs, PRIME)

    def combine(self, shares: Sequence[bytes]) -> bytes:
        """The secret, 32 bytes, if at least `threshold` shares are given and all are right; else other bytes.

        Args:
            shares: in the order of the places.

        Raises:
            ProtocolError: `malformed`: as many as the places there are not, one is no share, or together they are of no secret.
        """
        values = [int.from_bytes(share, "big") for share in shares]
        if (
            len(values) != len(self._factors)
            or any(len(share) != SHARE_BYTES for share in shares)
            or any(value >= PRIME for value in values)
        ):
            raise ProtocolError("malformed", f"{len(values)} shares, not all of which can be")
        secret: int = sum(map(mul, self._factors, values)) % PRIME
        if secret >> (8 * SECRET_BYTES):
            raise ProtocolError("malformed", "shares that are of no secret")
        return secret.to_bytes(SECRET_BYTES, "big")


def polynomial(coefficients: Sequence[int], x: int, prime: int) -> int:
    """Its value at `x`; the coefficients begin with that of the power 0."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def lagrange(xs: Sequence[int], prime: int) -> list[int]:
    """By what to multiply the values at these places to get the sum that is the value at 0."""
    every = math.prod(xs)
    return [every // x * pow(math.prod(other - x for other in xs if other != x) % prime, -1, prime) % prime for x in xs]


def _places(xs: Sequence[int]) -> None:
    if not xs or min(xs) < 1 or max(xs) >= PRIME or len(set(xs)) != len(xs):
        raise ValueError("places are distinct and from 1")
