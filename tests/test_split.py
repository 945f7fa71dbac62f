"""Simulated owners (rung T0)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal.protocol.errors import ConfigError

LABELS = np.random.default_rng(0).integers(0, 5, 200)


@given(st.integers(1, 20), st.integers(0, 9), st.sampled_from([None, 0.05, 1.0, 100.0]))
def test_every_example_is_in_one_part(owners: int, seed: int, alpha: float | None) -> None:
    """Whatever the split; the same seed gives the same parts."""
    by = None if alpha is None else LABELS
    parts = shoal.split(list(range(200)), owners, by=by, alpha=alpha, seed=seed)
    assert owners == len(parts) and all(parts)
    assert list(range(200)) == sorted(index for part in parts for index in part)
    assert parts == shoal.split(list(range(200)), owners, by=by, alpha=alpha, seed=seed)


def test_kinds_of_data() -> None:
    """Arrays stay arrays, and stay together; a Dataset becomes subsets."""
    x, y = np.arange(400).reshape(200, 2), torch.arange(200)
    for px, py in shoal.split((x, y), 7):
        assert isinstance(py, torch.Tensor) and px.shape == (len(py), 2) and (px[:, 0] == 2 * py.numpy()).all()
    data = torch.utils.data.TensorDataset(y)
    parts = shoal.split(data, 3)
    assert 200 == sum(map(len, parts)) and isinstance(parts[0], torch.utils.data.Subset)
    assert {67, 66} == {len(part) for part in parts}


def test_by_a_column() -> None:
    """Owner k has the k-th value, whether it is a number or a name; a column is named by its place."""
    for by in (LABELS, np.array(list("abcde"))[LABELS], torch.tensor(LABELS)):
        parts = shoal.split((np.arange(200), LABELS), 5, by=by)
        assert [{owner} for owner in range(5)] == [set(labels) for _, labels in parts]
    again = shoal.split((np.arange(200), LABELS), 5, by=1)
    assert all((a[0] == b[0]).all() for a, b in zip(parts, again, strict=True))


def test_nobody_is_left_without() -> None:
    parts = shoal.split(LABELS, 20, by=LABELS, alpha=0.01, least=8)
    assert 200 == sum(map(len, parts)) and 8 == min(map(len, parts))


def skew(alpha: float) -> float:
    """The mean share of an owner's most frequent label, over seeds."""
    shares = []
    for seed in range(20):
        for labels in shoal.split(LABELS, 5, by=LABELS, alpha=alpha, seed=seed):
            shares.append(np.bincount(labels).max() / len(labels))
    return float(np.mean(shares))


def test_alpha_says_how_much_owners_differ() -> None:
    assert skew(0.1) > 0.6 > skew(1.0) > 0.35 > skew(100.0) > 0.2


@pytest.mark.parametrize(
    ("owners", "given_", "told"),
    [
        (0, {}, "cannot be split among 0"),
        (201, {}, "200 examples cannot be split among 201"),
        (50, {"least": 5}, "with at least 5 each"),
        (3, {"alpha": 0.1}, "there are none"),
        (3, {"by": LABELS}, "5 different values, and there are 3 owners"),
        (5, {"by": LABELS[:10]}, "by has shape"),
        (5, {"by": 1}, "no tuple"),
        (5, {"by": LABELS, "alpha": -1.0}, "alpha is -1"),
        (5, {"by": LABELS, "least": 40}, "owner . would have .* examples, and 40 are the least"),
    ],
)
def test_what_cannot_be_is_said(owners: int, given_: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        shoal.split(list(range(200)), owners, **given_)
