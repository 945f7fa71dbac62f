"""Noise that clients add to their updates before masking, so that the sum says little of any of them (SPEC §14).

Skellam noise (Agarwal, Kairouz and Liu 2021): sums of Skellams are Skellam, so what drops out needs no analysis of its own.

Rules
- The only file here that makes generators, and each is a new one, seeded from the system's randomness.
- Only those survivors are counted on who are honest whoever drops out: the noise of each is the whole divided by their number.
- numpy's sampler is a floating-point approximation and its generators are not cryptographic; the guarantee is as good as they are.
- What is not noisy is not private: with noise, weights are uniform and no metrics are summed.
"""

from __future__ import annotations

import math
import secrets
from typing import Any, TypeAlias

import numpy as np

from ..errors import NonFiniteError, ProtocolError
from .privacy import Skellam

Generator: TypeAlias = np.random.Generator
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE = 1 << 16
"""Elements worked on at a time."""


def generator() -> Generator:
    """A generator of its own, for rounding and noise."""
    return np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))


def skellam(variance: float, out: Array, source: Generator) -> None:
    """Add noise to a vector, in its modulus.

    Args:
        variance: over 0. out: unsigned integers, one-dimensional.
    """
    for start in range(0, len(out), PIECE):
        piece = out[start : start + PIECE]
        drawn = source.poisson(variance / 2, len(piece)) - source.poisson(variance / 2, len(piece))
        np.add(piece, drawn.astype(out.dtype), out=piece)


def privatise(vector: Array, amount: Skellam, out: Array, source: Generator) -> bool:
    """An update in units, clipped, rounded and with its noise. It is to be masked afterwards.

    Args:
        vector: float32 or float64, all of the update: its norm is what is clipped. out: uint16 or uint32, as long.

    Returns:
        Was it over the clip?

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    length = math.sqrt(_squares(vector))
    if not math.isfinite(length):
        raise NonFiniteError("an update holds NaN or infinity, or is too large", hint="look at the loss of this round")
    factor = amount.units / max(amount.clip, length)
    most = amount.norm(len(vector)) ** 2
    while _round(vector, factor, out, source) > most:  # 2.5 times on average at worst, usually once
        pass
    skellam(amount.variance, out, source)
    return length > amount.clip


def _squares(vector: Array) -> float:
    """The sum of the squares of its elements."""
    pieces = (vector[start : start + PIECE] for start in range(0, len(vector), PIECE))
    with np.errstate(over="ignore"):
        return math.fsum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces)


def _round(vector: Array, factor: float, out: Array, source: Generator) -> float:
    """Multiply, round up or down so that the mean is kept, and return the sum of the squares of what came out."""
    signed = out.view(out.dtype.str.replace("u", "i"))
    squares = []
    for start in range(0, len(vector), PIECE):
        work = np.multiply(vector[start : start + PIECE], factor, dtype=np.float64)
        np.floor(np.add(work, source.random(len(work)), out=work), out=work)
        signed[start : start + PIECE] = work
        squares.append(float(np.square(work, out=work).sum()))
    return math.fsum(squares)


def restore(total: Array, amount: Skellam, clients: int, out: Array) -> None:
    """The average update behind an unmasked sum.

    Args:
        total: the sum or a part of it, uint16 or uint32. clients: how many survived.
        out: float32 or float64, as long as the sum.

    Raises:
        ProtocolError: `malformed`: no such sum can be: the masks did not cancel. `out` may hold anything.
    """
    signed = total.view(total.dtype.str.replace("u", "i"))
    bound, factor = amount.bound(clients), amount.clip / amount.units / clients
    for start in range(0, len(total), PIECE):
        piece = signed[start : start + PIECE]
        if max(int(piece.max()), -int(piece.min())) > bound:
            raise ProtocolError("malformed", f"an element of the sum of {clients} clients is over its bound")
        np.multiply(piece, factor, out=out[start : start + PIECE], dtype=np.float64, casting="unsafe")
