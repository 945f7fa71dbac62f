"""Updates as integers of a modulus, so that they can be masked and summed, and the average back (SPEC §14).

Rules
- Whatever clients send, a sum of so many does not wrap: each stays within Q = (2^(m-1) - 1) // N.
- Unbiased: with 16 bits the fraction is rounded by chance. With 32 bits a step is finer than float32, and the nearest is taken.
- A weight is relative to a public one, capped, and known to nobody: it is summed under a mask, with what else is counted.
- In float64, by pieces that stay in the processor's cache, into memory that is given.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import ConfigError, NonFiniteError, ProtocolError
from .noise import Array
from .scale import CAPPED, CLIENTS, CLIPPED, LANES, WEIGHT, Scale

PIECE = 1 << 16
"""Elements worked on at a time."""
UNIT = 1 << 20
"""A relative weight of 1."""
METRIC = 1 << 12
"""A metric of 1 with a weight of one UNIT-th; so a metric is exact to 2^-32."""
_FRACTION = 1 << 16
_ZEROS = memoryview(bytes(2 * PIECE))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A relative weight.

    Attributes:
        units: of one UNIT-th, at least 1. capped: was it larger?
    """

    units: int
    capped: bool

    @property
    def value(self) -> float:
        return self.units / UNIT

    def __repr__(self) -> str:
        return "Ratio(…)"  # how much data a client has is its own business


UNIFORM = Ratio(UNIT, False)
"""What everybody weighs when weights are uniform."""


def ratio(weight: float, reference: float, cap: float) -> Ratio:
    """A weight by a public reference, at most `cap`.

    Raises:
        ConfigError: a weight that is not over 0 and finite.
    """
    if not 0 < weight < math.inf:
        raise ConfigError(
            "a client's weight is not over 0 and finite", hint="examples=, the number of those trained on"
        )
    most = math.floor(cap * UNIT)
    wanted = weight / reference * UNIT
    return Ratio(most, True) if wanted > most else Ratio(max(1, round(wanted)), False)


def finite(vector: Array) -> None:
    """Refuse an update before anything of it is sent.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(
            float(np.dot(vector, vector))
        ):  # one quick pass; large numbers overflow and are looked at again
            return
    if not bool(np.isfinite(vector).all()):
        raise NonFiniteError(
            "an update holds NaN or infinity", hint="look at the loss of this round, or at its learning rate"
        )


class Quantiser:
    """Writes a client's update as integers. It keeps its working memory.

    Args:
        weight: the client's.
        seed: 32 bytes that rounding by chance is drawn from: AES-256 in counter mode, which costs less than other generators.
            By default the system's randomness; it MUST NOT be used twice.
    """

    def __init__(self, scale: Scale, weight: Ratio, seed: bytes | None = None) -> None:
        self.dtype = scale.dtype
        self._clip, self._chance = scale.clip, scale.bits == 16
        self._factor = scale.units * weight.value * (_FRACTION if self._chance else 1)
        self._work = np.empty(PIECE)
        self._whole, self._drawn = np.empty(PIECE, np.int32), bytearray(2 * PIECE + 16)
        self._cipher, self._pieces = AESGCM(seed or secrets.token_bytes(32)), 0

    def write(self, vector: Array, out: Array) -> int:
        """Quantise.

        Args:
            vector: float32 or float64, one-dimensional. out: of `dtype`, as long.

        Returns:
            How many elements were cut off at the clip.

        Raises:
            NonFiniteError: it holds NaN or infinity; `out` may hold anything.
        """
        signed = out.view("<i2" if self._chance else "<i4")
        return sum(
            self._piece(vector[start : start + PIECE], signed[start : start + PIECE])
            for start in range(0, len(vector), PIECE)
        )

    def _piece(self, vector: Array, out: Array) -> int:
        clipped, work = 0, self._work[: len(vector)]
        most = max(float(vector.max()), -float(vector.min()))
        if not math.isfinite(most):
            raise NonFiniteError("an update holds NaN or infinity")
        np.multiply(vector, self._factor, out=work, dtype=np.float64)
        if most > self._clip:
            limit = self._clip * self._factor
            clipped = int(np.count_nonzero(work > limit)) + int(np.count_nonzero(work < -limit))
            np.clip(work, -limit, limit, out=work)
        np.rint(work, out=work)
        if self._chance:
            self._round(work, out)
        else:
            np.copyto(out, work, casting="unsafe")
        return clipped

    def _round(self, work: Array, out: Array) -> None:
        """Up as often as the fraction says: what is below the point is 16 bits, and a uniform 16 bits are added to them."""
        whole, size = self._whole[: len(work)], 2 * len(work)
        self._pieces += 1
        self._cipher.encrypt_into(
            self._pieces.to_bytes(12, "big"), _ZEROS[:size], None, memoryview(self._drawn)[: size + 16]
        )
        np.copyto(whole, work, casting="unsafe")
        np.add(whole, np.frombuffer(self._drawn, np.uint16, len(work)), out=whole)
        np.right_shift(whole, 16, out=whole)
        np.copyto(out, whole, casting="unsafe")


def average(total: Array, scale: Scale, clients: int, weight: float, out: Array) -> None:
    """The weighted average behind an unmasked sum.

    Args:
        total: of `scale.dtype`. clients: whose it is the sum. weight: the sum of their relative weights.
        out: float32 or float64, as long.

    Raises:
        ProtocolError: `malformed`: no such sum can be: the masks did not cancel. `out` may hold anything.
    """
    signed = total.view(f"<i{scale.bits // 8}")
    bound, factor = clients * scale.bound, 1 / (scale.units * weight)
    for start in range(0, len(total), PIECE):
        piece = signed[start : start + PIECE]
        if max(int(piece.max()), -int(piece.min())) > bound:
            raise ProtocolError("malformed", f"an element of the sum of {clients} clients is over its bound")
        np.multiply(piece, factor, out=out[start : start + PIECE], dtype=np.float64, casting="unsafe")


def auxiliary(
    weight: Ratio, clipped: int, metrics: Sequence[float], clients: int, summed: Sequence[bool] = ()
) -> Array:
    """What is summed beside an update: uint64, `LANES` and one for each metric.

    Args:
        clipped: elements that were cut off. metrics: of this client; averaged with its weight. clients: how many may be summed.
        summed: which metrics are summed as they are; whole numbers are exact up to 2^50 over all clients.

    Raises:
        NonFiniteError: a metric is NaN or infinite.
    """
    most = ((1 << 63) - 1) // clients
    if not all(map(math.isfinite, metrics)):
        raise NonFiniteError("a metric is NaN or infinite")
    factors = [1 if plain else weight.units for plain in summed] or [weight.units] * len(metrics)
    scaled = [round(max(-most, min(most, m * factor * METRIC))) for m, factor in zip(metrics, factors, strict=True)]
    return np.array([1, weight.units, weight.capped, clipped, *scaled], np.int64).view(np.uint64)


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums beside an average.

    Attributes:
        clients: how many. weight: the sum of their relative weights. capped: whose was cut off.
        clipped: elements cut off, of all. metrics: weighted averages.
    """

    clients: int
    weight: float
    capped: int
    clipped: int
    metrics: tuple[float, ...]


def totals(lanes: Array, clients: int, cap: float, elements: int, summed: Sequence[bool] = ()) -> Totals:
    """Read an unmasked sum of auxiliary vectors.

    Args:
        lanes: uint64. clients: how many should be in it. cap: the largest relative weight. elements: of the update.
        summed: as in `auxiliary`.

    Raises:
        ProtocolError: `malformed`: no such sum can be: the masks did not cancel, or a client lies.
    """
    found = [int(lane) for lane in lanes.view(np.int64)]
    weight = found[WEIGHT]
    if (
        found[CLIENTS] != clients
        or not clients <= weight <= clients * cap * UNIT
        or not 0 <= found[CAPPED] <= clients
        or not 0 <= found[CLIPPED] <= clients * elements
    ):
        raise ProtocolError("malformed", f"what was counted beside the sum is not of {clients} clients")
    said = found[LANES:]
    divisors = [1 if plain else weight for plain in summed] or [weight] * len(said)
    metrics = tuple(lane / METRIC / divisor for lane, divisor in zip(said, divisors, strict=True))
    return Totals(clients, weight / UNIT, found[CAPPED], found[CLIPPED], metrics)
