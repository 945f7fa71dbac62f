"""Cards of models: canonical, and read strictly (rung T0)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.tasks.card import Card, Cost, Lineage

CARD = Card(
    "heart-risk", 3, "ab" * 32, 4096, {"heart-risk": {"auc": 0.89, "loss": 0.4}, "triage": {"accuracy": 0.7}},
    Cost(0.002, 1 << 20, 1000), ("site:a", "site:b"), Lineage(2**64 - 1, "federated", 60, "cd" * 32, ("heart",)), 1.5e9,
)  # fmt: skip


def test_a_card_is_its_bytes() -> None:
    """What is read is what was written; another value is another version."""
    assert CARD == Card.unpack(CARD.packed)
    assert list(CARD.quality["heart-risk"]) == list(Card.unpack(CARD.packed).quality["heart-risk"]), (
        "their order counts"
    )
    assert CARD.identity != replace(CARD, size=4097).identity
    assert (0.89, 0.7, None) == tuple(CARD.quality_of(kind) for kind in ("heart-risk", "triage", "other"))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"version": 0},
        {"version": True},
        {"weights": "ab"},
        {"weights": "AB" * 32},
        {"size": -1},
        {"quality": {"kind": {}}},
        {"quality": {"kind": {"auc": float("nan")}}},
        {"cost": Cost(-1.0)},
        {"cost": Cost(0.0, 1.5)},  # type: ignore[arg-type]
        {"data": ("",)},
        {"data": ["a"]},
        {"lineage": Lineage(run=2**64)},
        {"lineage": Lineage(parent="x")},
        {"published": float("inf")},
    ],
)
def test_what_is_no_card_cannot_be_made(change: dict[str, Any]) -> None:
    """The field that is wrong is named."""
    with pytest.raises(ConfigError, match=f"a card whose {next(iter(change))} is not"):
        replace(CARD, **change)


def test_the_same_in_other_bytes_is_refused() -> None:
    """One version has one identity."""
    for other in (json.dumps(json.loads(CARD.packed)).encode(), CARD.packed + b" "):
        with pytest.raises(ConfigError, match="no card|canonical"):
            Card.unpack(other)


@given(st.binary(max_size=200) | st.tuples(st.integers(0, len(CARD.packed) - 1), st.integers(0, 255)))
def test_any_bytes_are_a_card_or_refused(data: bytes | tuple[int, int]) -> None:
    """Nothing but `ConfigError`, and what is read is what would be written."""
    if isinstance(data, tuple):
        changed = bytearray(CARD.packed)
        changed[data[0]] = data[1]
        data = bytes(changed)
    try:
        assert data == Card.unpack(data).packed
    except ConfigError:
        pass
