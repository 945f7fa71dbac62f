"""Are all values finite? Asked of every gradient before it is sent: one pass at memory speed, by two threads where it is long.

Rules
- A product that overflows is no proof: what looks bad is looked at value by value.
"""

from __future__ import annotations

import threading
from math import isfinite
from typing import Any, TypeAlias

import numpy as np

Bits: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

LONG = 1 << 21
"""Elements from which a second thread is worth its start."""


def all_finite(values: Bits, dtype: str) -> bool:
    """
    Args:
        values: flat; bfloat16 as its 16 bits.
    """
    if dtype == "bfloat16":
        return not bool(np.any((values & 0x7F80) == 0x7F80))
    if dtype == "float16":
        with np.errstate(all="ignore"):
            return bool(np.isfinite(values.sum(dtype=np.float64)))
    if len(values) < LONG:
        return _finite(values)
    half, found = len(values) // 2, []
    other = threading.Thread(target=lambda: found.append(_finite(values[half:])), name="shoal finite")
    other.start()
    mine = _finite(values[:half])
    other.join()
    return mine and found == [True]


@np.errstate(all="ignore")
def _finite(values: Bits) -> bool:
    """NaN and infinity show in the sum of squares; only then is each looked at."""
    return isfinite(values.dot(values)) or bool(np.isfinite(values).all())
