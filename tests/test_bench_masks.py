"""The benchmark of masks: it measures what it says. No time is asserted (rung T0)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from shoal.bench import masks
from shoal.protocol.secure.masks import CHUNK_BYTES, Masks


def test_one_run_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is one JSON object: for both moduli the client, the limit, and their ratio."""
    assert 0 == masks.main(100_000, 3, 1, True)
    report = json.loads(capsys.readouterr().out)

    assert (100_000, 3, 1) == (report["elements"], report["neighbours"], report["repeat"])
    assert [32, 16] == [row["bits"] for row in report["moduli"]]
    for row in report["moduli"]:
        seconds = row["seconds"]
        assert {"client", "limit", "quantise", "masks"} == set(seconds)
        assert all(taken > 0 for taken in seconds.values())
        assert seconds["client"] / seconds["limit"] == row["ratio"]


def test_the_client_has_one_mask_more_than_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own; the limit makes the neighbours' alone."""
    made: list[int] = []

    class Counted(Masks):
        def __init__(self, add: list[bytes], subtract: list[bytes]) -> None:
            super().__init__(add, subtract)
            made.append(len(add) + len(subtract))

    asked: list[int] = []
    limit = masks.keystream
    monkeypatch.setattr(masks, "Masks", Counted)
    monkeypatch.setattr(masks, "keystream", lambda keys, size: asked.append(len(keys)) or limit(keys, size))
    masks.modulus(np.zeros(10, np.float32), 10, 32, 1)

    assert ([11], [10]) == (made, asked)


def test_the_limit_makes_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each key, in pieces."""
    made: list[int] = []

    class Cipher:
        def __init__(self, key: bytes) -> None:
            pass

        def encrypt_into(self, nonce: bytes, text: memoryview, about: None, room: memoryview) -> None:
            made.append(len(text))

    monkeypatch.setattr(masks, "AESGCM", Cipher)
    masks.keystream([b"a", b"b"], 2 * CHUNK_BYTES + 5)()

    assert [CHUNK_BYTES] * 4 + [5] * 2 == made


def test_the_report_can_be_read_by_people(capsys: pytest.CaptureFixture[str]) -> None:
    masks.main(1000, 2, 1)
    head, what, *rows = capsys.readouterr().out.splitlines()

    assert "1,000 float32, 2 neighbours, one thread, medians of 1" == what
    assert "CPUs" in head
    assert all("client / limit" in row for row in rows)
    assert ["32", "16"] == [row.split()[0] for row in rows]
