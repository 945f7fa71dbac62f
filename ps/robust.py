"""Averages that a few liars among the clients cannot move far, coordinate by coordinate or by choosing (in the clear only).

Rules
- Every update is held until the end: so many times the memory of an average.
- An update that is not finite is left out, whatever the rule.
- By pieces that stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from ..protocol.errors import ProtocolError
from ..protocol.secure.noise import Array

PIECE = 1 << 14
"""Elements of each row that are worked on at a time."""


def median(rows: Sequence[Array], out: Array) -> None:
    """The median of each coordinate (Yin et al. 2018, option I).

    Args:
        rows: float32, one-dimensional, one a client. out: as long.
    """
    for start in range(0, len(out), PIECE):
        np.median([row[start : start + PIECE] for row in rows], axis=0, out=out[start : start + PIECE])


def trimmed(rows: Sequence[Array], share: float, out: Array) -> None:
    """The mean of each coordinate without so large a share at either end (Yin et al. 2018, option II).

    So many rows as the share may be liars, hence it is rounded up: a tenth of seven is one. At least one row is left.
    """
    cut = min(ceil(share * len(rows) - 1e-9), (len(rows) - 1) // 2)
    for start in range(0, len(out), PIECE):
        piece = np.sort([row[start : start + PIECE] for row in rows], axis=0)
        np.mean(piece[cut : len(rows) - cut], axis=0, out=out[start : start + PIECE])


def mean(rows: Sequence[Array], out: Array) -> None:
    """Of those that were chosen, each as heavy as the others."""
    np.divide(rows[0], np.float32(len(rows)), out=out)
    for row in rows[1:]:
        out += row / np.float32(len(rows))


def distances(rows: Sequence[Array]) -> Array:
    """The squares of the distances between all pairs of rows: float64, symmetric; infinite from and to what is not finite."""
    count = len(rows)
    found = np.zeros((count, count))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows[0]) if count else 0, PIECE):
            piece = np.array([row[start : start + PIECE] for row in rows], np.float64)
            for one in range(count):
                found[one, one + 1 :] += np.square(piece[one + 1 :] - piece[one]).sum(axis=1)
    found += found.T
    return np.where(np.isfinite(found), found, np.inf)


def finite(rows: Sequence[Array]) -> list[Array]:
    """Those rows that are.

    Raises:
        ProtocolError: `malformed`: none is.
    """
    found = [row for row in rows if np.isfinite(row).all()]
    if not found:
        raise ProtocolError("malformed", "no update that is finite")
    return found
