"""NaN and infinity are seen wherever they are, and large numbers are not taken for them (rung T0)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.protocol.model import ITEMSIZE
from shoal.worker import finite
from shoal.worker.arrays import bits
from shoal.worker.finite import all_finite

DTYPES = tuple(ITEMSIZE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_seen(dtype: str) -> None:
    """In any place, of any sign, the quiet kinds too; the largest number, whose sum overflows, is none of them."""
    kind = getattr(torch, dtype)
    largest = torch.finfo(kind).max
    fine = [[largest, largest, largest], [-largest, -largest, largest], [torch.finfo(kind).tiny, -0.0, 1.0], []]
    bad = [[0.0, torch.nan], [torch.inf, 1.0], [-torch.inf, 1.0], [-torch.inf, torch.inf]]

    assert [True] * 4 == [all_finite(bits(torch.tensor(values, dtype=kind)), dtype) for values in fine]
    assert [False] * 4 == [all_finite(bits(torch.tensor(values, dtype=kind)), dtype) for values in bad]


@pytest.mark.parametrize("at", [0, 49, 50, 99])
def test_long_vectors_are_looked_at_by_two(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a half, and neither is left out."""
    monkeypatch.setattr(finite, "LONG", 100)
    values = np.full(100, 1e30, np.float32)  # whose squares are infinite, and which is not
    assert all_finite(values, "float32")
    values[at] = np.nan

    assert not all_finite(values, "float32")
