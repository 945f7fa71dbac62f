"""A client's slices on their way (rung T0, SPEC §14.6): made once, sent in order, sent again from where a shard has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from roundtable import MODEL, plan_for

from shoal.protocol.rounds import Masked
from shoal.protocol.secure.masks import Masks
from shoal.worker import upload
from shoal.worker.parley import Input
from shoal.worker.upload import Encoder, Upload

KEYS = [bytes(32), bytes([1]) * 32]
SIZES = (40, 0, 23)
PIECE, WINDOW = 32, 2


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of eight elements, two of which may be under way."""
    monkeypatch.setattr(upload, "PIECE", PIECE)
    monkeypatch.setattr(upload, "WINDOW", WINDOW)


def encoder(memory: Any = None, **settings: Any) -> Encoder:
    plan = replace(
        plan_for(3, active=False, **settings),
        elements=sum(SIZES),
        shards=((0, 40), (40, 40), (1 << 17, (1 << 17) + 23)),
    )
    update = np.linspace(-1, 1, sum(SIZES), dtype=np.float32)
    return Encoder(plan, Input(update, 1.0, {}, MODEL), 3, KEYS[:1], KEYS[1:], memory)


def slices(found: Encoder) -> list[bytes]:
    return [
        b"".join(bytes(found.piece(shard, at)) for at in range(0, each.size, PIECE))
        for shard, each in enumerate(found.slices)
    ]


def test_slices_are_masked_by_the_number_of_their_elements() -> None:
    """Whatever the piece; and the lanes of all shards are the same."""
    found = encoder()
    whole = slices(found)
    plain = np.zeros((1 << 17) + 23, np.uint32)
    Masks(KEYS[:1], KEYS[1:]).apply(plain)
    assert [each.size for each in found.slices] == [len(each) for each in whole] == [160 + 32, 32, 96 + 32]
    scale = 0.5 / (((1 << 31) - 1) // 3)
    for data, start, count, at in ((whole[0], 0, 40, 0), (whole[2], 1 << 17, 23, 40)):
        values = (np.frombuffer(data[: 4 * count], np.uint32) - plain[start : start + count]).view(np.int32)
        wanted = np.linspace(-1, 1, sum(SIZES), dtype=np.float32)[at : at + count]
        assert np.abs(values * 2.0 * scale - wanted).max() < 1e-6
    assert whole[0][-32:] == whole[1] == whole[2][-32:]
    assert whole[2][92:96] == bytes(4)


def test_a_piece_is_made_once() -> None:
    """With 16 bits chance rounds; what is sent again is the same. Memory that fits is used again."""
    first = encoder(bits=16)
    once = slices(first)
    assert once == slices(first)
    other = encoder(first.memory, bits=16)
    assert other.memory is first.memory and once != slices(other)
    assert encoder(first.memory).memory is not first.memory


def test_memory_that_may_be_sent_never_holds_what_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment when a piece is quantised and not yet masked, it is elsewhere."""
    found = encoder()
    real, looks = Masks._mask, []

    def look(self: Masks, piece: Any, start: int) -> None:
        looks.append(np.shares_memory(piece, found.memory))
        real(self, piece, start)

    monkeypatch.setattr(Masks, "_mask", look)
    slices(found)
    assert looks and not any(looks)


def way() -> tuple[Upload, Any]:
    found = encoder()

    def make(shard: int, offset: int, piece: Any) -> Masked:
        return Masked(1, shard, 5, offset, (piece,))

    up = Upload(found, make)

    def sent(now: float) -> Iterator[tuple[int, int]]:
        return ((shard, message.offset) for shard, message in up.due(now))

    return up, sent


def test_as_much_is_under_way_as_may_be() -> None:
    """To each shard; what it has not got and cannot have is not believed."""
    up, sent = way()
    assert [(0, 0), (0, 32), (1, 0), (2, 0), (2, 32)] == list(sent(0.0))
    for wrong in (96, 192, 33, 31, -32):
        up.acknowledged(0, wrong)
    up.acknowledged(7, 32)
    assert [] == list(sent(0.1))
    up.acknowledged(0, 32)
    assert [(0, 64)] == list(sent(0.2))
    up.acknowledged(0, 32)
    assert [] == list(sent(0.3)) and not up.sent


def test_what_is_not_acknowledged_is_sent_again() -> None:
    """After a second, or on a new connection, from where the shard has it; what it says late spares what was to be sent again."""
    up, sent = way()
    list(sent(0.0))
    assert [(0, 0), (0, 32), (1, 0), (2, 0), (2, 32)] == list(sent(1.0))
    up.again(0)
    assert [(0, 0), (0, 32)] == list(sent(1.1))
    up.again(0)
    up.acknowledged(0, 64)
    assert [(0, 64), (0, 96)] == list(sent(1.2))


def test_everything_arrives() -> None:
    """Then nothing is due any more."""
    up, sent = way()
    now = 0.0
    while not up.kept:
        for shard, offset in list(sent(now)):
            up.acknowledged(shard, min(offset + PIECE, (192, 32, 128)[shard]))
        now += 0.1
    assert up.sent and float("inf") == up.wake_at
    assert [] == list(sent(99.0))
