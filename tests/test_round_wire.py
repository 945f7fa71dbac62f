"""What goes over the wire in a federated round looks like chance (rung T1, SPEC §14.6): statistics on captured frames.

Each test has a control that it must notice; six standard deviations are allowed, so that no honest run fails. No statistic can
notice a seed of few bits: that is for the tests of `protocol/secure`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from roundnet import RoundNet
from roundtable import MODEL, Table, plan_for

from shoal.protocol.rounds import Masked
from shoal.protocol.secure import masks
from shoal.protocol.secure.masks import AUXILIARY, Masks
from shoal.ps.recipe import Recipe
from shoal.worker import hand
from shoal.worker.hand import Hand
from shoal.worker.parley import Input
from shoal.worker.upload import Encoder

Array = np.ndarray[Any, np.dtype[Any]]
D = 400_000
SIGMAS = 6.0
SHAPES = {
    "constant": np.full(D, 0.25, np.float32),
    "zero": np.zeros(D, np.float32),
    "sorted": np.linspace(-1, 1, D, dtype=np.float32),
    "sparse": np.where(np.arange(D) % 1000 == 0, 1.0, 0.0).astype(np.float32),
}


def captured(net: RoundNet) -> dict[int, dict[int, Array]]:
    """The slices as they arrived at the only shard, by session and client."""
    pieces: dict[tuple[int, int], dict[int, bytes]] = {}
    for name, frames in net.wire:
        if name == "s0" and frames[0][2] == Masked.TYPE:
            _, _, incarnation, _, session, offset = msgpack.unpackb(frames[0])
            pieces.setdefault((session, incarnation), {})[offset] = frames[1]
    found: dict[int, dict[int, Array]] = {}
    for (session, incarnation), parts in pieces.items():
        whole = b"".join(part for _, part in sorted(parts.items()))
        found.setdefault(session, {})[incarnation] = np.frombuffer(whole, np.uint8)
    return found


def a_round(bits: int = 32, rounds: int = 1, clients: int = 4) -> tuple[RoundNet, dict[int, dict[int, Array]]]:
    net = RoundNet(3, clients, (D,), Recipe(rounds=rounds, bits=bits))
    for worker, shape in zip(net.workers.values(), SHAPES.values(), strict=False):
        worker.make = lambda plan, worker=worker, shape=shape: Input(shape, 1.0, {}, worker.model())
    assert net.go(rounds)
    return net, captured(net)


def lanes(slice_: Array, bits: int) -> Array:
    return slice_[: D * bits // 8].view(f"<u{bits // 8}")


# --- statistics: each gives a number of standard deviations


def chi_square(data: Array) -> float:
    counts = np.bincount(data, minlength=256)
    expected = len(data) / 256
    return abs(float(((counts - expected) ** 2 / expected).sum()) - 255) / 510**0.5


def monobit(values: Array) -> float:
    bits = 8 * values.dtype.itemsize
    ones = [int(np.count_nonzero(values >> values.dtype.type(bit) & values.dtype.type(1))) for bit in range(bits)]
    return max(abs(one - len(values) / 2) / (len(values) / 4) ** 0.5 for one in ones)


def centred(values: Array) -> Array:
    found = values.astype(np.float64) - float(values.mean(dtype=np.float64))
    norm = float(np.linalg.norm(found))
    return found / norm if norm else found


def autocorrelation(values: Array) -> float:
    x = centred(values)
    return max(abs(float(x[lag:] @ x[:-lag])) for lag in range(1, 65)) * len(values) ** 0.5


def pearson(values: Array, plain: Array) -> float:
    return abs(float(centred(values) @ centred(plain))) * len(values) ** 0.5


def looks_like_chance(slice_: Array, bits: int) -> Iterator[tuple[str, float]]:
    values = lanes(slice_, bits)
    yield "bytes", chi_square(slice_[: values.nbytes])
    yield "bits", monobit(values)
    yield "lags", autocorrelation(values)
    for name, shape in SHAPES.items():
        yield name, pearson(values, shape)
    yield "zlib", SIGMAS + 1 if len(zlib.compress(slice_.tobytes(), 1)) < len(slice_) else 0.0


def worst(slice_: Array, bits: int) -> float:
    return max(found for _, found in looks_like_chance(slice_, bits))


@pytest.mark.parametrize("bits", [16, 32])
def test_uploads_look_like_chance(bits: int) -> None:
    """Of inputs with much structure; each alone, and their sum before it is unmasked. Their length says nothing."""
    net, sessions = a_round(bits)
    ((_, slices),) = sessions.items()

    assert 4 == len(slices) and 1 == len({len(each) for each in slices.values()})
    for number, slice_ in slices.items():
        for name, found in looks_like_chance(slice_, bits):
            assert found < SIGMAS, (number, name, found)
    total = np.sum([lanes(each, bits) for each in slices.values()], axis=0, dtype=f"u{bits // 8}")
    assert chi_square(total.view(np.uint8)) < SIGMAS and autocorrelation(total) < SIGMAS
    assert all(pearson(total, shape) < SIGMAS for shape in SHAPES.values())
    assert 1 == net.check()


def test_two_rounds_differ_as_chance_does() -> None:
    """The same input twice: the difference of the uploads is as good as a new one."""
    _, sessions = a_round(rounds=2, clients=3)
    first, second = sessions.values()

    for client in first:
        difference = lanes(first[client], 32) - lanes(second[client], 32)
        assert chi_square(difference.view(np.uint8)) < SIGMAS and monobit(difference) < SIGMAS


@pytest.mark.parametrize("fault", ["off", "narrow", "reused"])
def test_bad_masks_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: no masks; masks of 16 bits in lanes of 32; the same mask in two rounds."""
    real = Masks._mask

    def off(self: Masks, piece: Array, start: int) -> None:
        pass

    def narrow(self: Masks, piece: Array, start: int) -> None:
        mask = np.zeros(len(piece), piece.dtype)
        real(self, mask, start)
        np.add(piece, mask & mask.dtype.type(0xFFFF), out=piece)

    if fault == "reused":
        monkeypatch.setattr(hand, "self_key", lambda b, sid, member: bytes(32))
        monkeypatch.setattr(hand, "pair_key", lambda pair, public, sid, model: bytes(32))
    else:
        monkeypatch.setattr(masks.Masks, "_mask", off if fault == "off" else narrow)
    net = RoundNet(3, 3, (D,), Recipe(rounds=2))
    for worker, shape in zip(net.workers.values(), SHAPES.values(), strict=False):
        worker.make = lambda plan, worker=worker, shape=shape: Input(shape, 1.0, {}, worker.model())
    net.go(2)
    slices, *more = captured(net).values()
    if fault == "reused":
        difference = lanes(slices[1], 32) - lanes(more[0][1], 32)
        assert chi_square(difference.view(np.uint8)) > 100 * SIGMAS
    else:
        assert worst(slices[1], 32) > 100 * SIGMAS
        assert chi_square(slices[1][: 4 * D]) > 100 * SIGMAS


def test_without_its_own_mask_a_late_input_would_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own mask hides a client whose pair masks the servers were given: with it the rest looks like chance, without it not."""
    table = Table(3, active=False)
    table.seat()
    hands = [client._hand for client in table.clients]
    plan = replace(table.plan, elements=D, shards=((0, D),))
    for own in (True, False):
        found = hands[0]
        assert found is not None
        if own:
            found.deal()
            found._shares |= {1: bytes(66), 2: bytes(66)}
        add, subtract = found.keys(MODEL)
        add, pairs = (add, add[1:]) if own else (add[1:], add[1:])
        given = Input(SHAPES["sorted"], 1.0, {}, MODEL)
        upload = np.frombuffer(bytes(Encoder(plan, given, 3, add, subtract).piece(0, 0)), np.uint8)
        values = lanes(upload, 32).copy()
        Masks(subtract, pairs).apply(values)  # what servers can do that know the pair masks
        assert (pearson(values.view(np.int32), SHAPES["sorted"]) < SIGMAS) == own
        assert (chi_square(values.view(np.uint8)) < SIGMAS) == own


def test_a_sign_that_is_wrong_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the canary: one client adds what it should subtract."""
    net = RoundNet(3, 4, (50,), Recipe(rounds=1))
    client = net.workers["w2"].client
    real = Hand.keys

    def flipped(self: Hand, model: bytes) -> tuple[list[bytes], list[bytes]]:
        add, subtract = real(self, model)
        return (add, subtract) if self is not client._hand else ([*add, subtract[0]], subtract[1:])

    monkeypatch.setattr(Hand, "keys", flipped)
    assert net.go()
    assert net.coordinator.ended[0].released is None and not net.shards[0].applied


# --- two worlds


def features(slice_: Array, inputs: tuple[Array, Array]) -> Array:
    values = slice_[: 4 * len(inputs[0])].view(np.int32)
    counts = np.bincount(slice_, minlength=256) / len(slice_)
    return np.concatenate([counts, [centred(values) @ centred(each) for each in inputs]])


def accuracy(masked: bool, tries: int = 160) -> float:
    """How often a classifier by nearest centroid tells which of two inputs a client has, from what it sends."""
    draw = np.random.default_rng(5)
    size = 2000
    inputs = draw.normal(0, 0.3, size), np.sign(draw.normal(size=size)) * 0.5
    plan = replace(plan_for(3, active=False), elements=size, shards=((0, size),))
    rows, worlds = [], draw.integers(0, 2, tries)
    for world in worlds:
        keys = [draw.bytes(32), draw.bytes(32)] if masked else []
        given = Input(inputs[world], 1.0, {}, MODEL)
        rows.append(features(np.frombuffer(bytes(Encoder(plan, given, 3, keys, []).piece(0, 0)), np.uint8), inputs))
    table, half = np.array(rows), tries // 2
    table = (table - table.mean(0)) / (table.std(0) + 1e-12)
    centres = [table[:half][worlds[:half] == world].mean(0) for world in (0, 1)]
    nearer = np.linalg.norm(table[half:] - centres[1], axis=1) < np.linalg.norm(table[half:] - centres[0], axis=1)
    return float((nearer == worlds[half:]).mean())


def test_two_worlds_cannot_be_told_apart() -> None:
    """With masks as good as by tossing a coin, within five standard deviations; without them always."""
    assert abs(accuracy(masked=True) - 0.5) < 5 * 0.5 / 80**0.5
    assert 1.0 == accuracy(masked=False)


def test_the_lanes_are_masked_apart_from_the_elements() -> None:
    """What counts examples has a stream of its own: no byte of a stream hides two things."""
    key = bytes(range(32))
    main, auxiliary = np.zeros(8, np.uint64), np.zeros(8, np.uint64)
    Masks([key]).apply(main)
    Masks([key], domain=AUXILIARY).apply(auxiliary)
    assert not set(main.tolist()) & set(auxiliary.tolist())
