"""A registry in pieces: what is uploaded is checked before anybody knows of it (rung T0)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from shoal.protocol.errors import ConfigError
from shoal.tasks import library
from shoal.tasks.library import Shelf

WEIGHTS = save({"w": torch.arange(1000.0)})
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
ABOUT: dict[str, Any] = {
    "name": "m",
    "quality": [["m", [["auc", 0.5]]]],
    "cost": {"latency": 0.0, "memory": 4000, "parameters": 1000},
    "data": ["site:a"],
    "lineage": {"run": 7, "mode": "sync", "clock": 3, "parent": "", "data": ["digits"]},
}


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.end()
    assert not list(tmp_path.rglob(".unfinished*")), "a part of an upload is left"


def upload(shelf: Shelf, digest: str = DIGEST, weights: bytes = WEIGHTS, piece: int = 1500) -> None:
    at = 0
    while at < len(weights):
        at = shelf.take(digest, len(weights), at, weights[at : at + piece])


def test_up_in_pieces_and_down_in_pieces(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(shelf)
    card = shelf.publish(DIGEST, json.dumps(ABOUT).encode())
    assert ("m", 1, DIGEST, ("site:a",), 7, "sync") == (
        *(card.name, card.version, card.weights, card.data),
        *(card.lineage.run, card.lineage.mode),
    )
    monkeypatch.setattr(library, "PIECE", 999)
    found = bytearray()
    while len(found) < card.size:
        total, piece = shelf.piece(DIGEST, len(found))
        assert total == card.size and 0 < len(piece) <= 999
        found += piece
    assert found == WEIGHTS
    assert len(WEIGHTS) == shelf.take(DIGEST, len(WEIGHTS), 0, b"x")  # it is here: nothing is to be uploaded
    assert 2 == shelf.publish(DIGEST, json.dumps(ABOUT).encode()).version
    assert (["m"], 2) == (list(shelf.names()), len(shelf.versions("m")))


def test_pieces_that_are_repeated_or_early_change_nothing(shelf: Shelf) -> None:
    assert 100 == shelf.take(DIGEST, len(WEIGHTS), 0, WEIGHTS[:100])
    assert 100 == shelf.take(DIGEST, len(WEIGHTS), 0, WEIGHTS[:100])
    assert 100 == shelf.take(DIGEST, len(WEIGHTS), 300, WEIGHTS[300:400])
    assert 100 == shelf.take(DIGEST, len(WEIGHTS), 100, bytes(len(WEIGHTS)))  # more than was said
    at = 100
    while at < len(WEIGHTS):
        at = shelf.take(DIGEST, len(WEIGHTS), at, WEIGHTS[at : at + 1000])
    assert 1 == shelf.publish(DIGEST, json.dumps(ABOUT).encode()).version


@pytest.mark.parametrize(
    ("digest", "weights", "about", "why"),
    [
        ("0" * 64, WEIGHTS, ABOUT, "another SHA-256"),
        (hashlib.sha256(b"x" * 99).hexdigest(), b"x" * 99, ABOUT, "no safetensors file"),
        (DIGEST, WEIGHTS, {**ABOUT, "more": 1}, "is told by"),
        (DIGEST, WEIGHTS, {**ABOUT, "quality": 3}, "cannot be read"),
        (DIGEST, WEIGHTS, {**ABOUT, "name": "\n"}, "name is not"),
        (DIGEST, WEIGHTS, {**ABOUT, "lineage": {}}, "cannot be read"),
    ],
)
def test_what_is_not_right_is_no_version(shelf: Shelf, digest: str, weights: bytes, about: Any, why: str) -> None:
    upload(shelf, digest, weights)
    with pytest.raises(ConfigError, match=why):
        shelf.publish(digest, json.dumps(about).encode())
    assert not shelf.names()


@pytest.mark.parametrize("name", ["../../etc/passwd", "A" * 64, "0" * 63, ""])
def test_weights_are_named_by_what_they_are(shelf: Shelf, name: str) -> None:
    for call in (
        lambda: shelf.piece(name, 0),
        lambda: shelf.take(name, 10, 0, b"x"),
        lambda: shelf.publish(name, json.dumps(ABOUT).encode()),
    ):
        with pytest.raises(ConfigError, match="SHA-256"):
            call()


def test_nothing_there(shelf: Shelf) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        shelf.piece("0" * 64, 0)
    with pytest.raises(ConfigError, match="nothing was uploaded"):
        shelf.publish("0" * 64, json.dumps(ABOUT).encode())
    with pytest.raises(ConfigError, match="weights of"):
        shelf.take("0" * 64, 1 << 50, 0, b"")
