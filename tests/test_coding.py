"""Vectors and their bytes: each format as SPEC §12 says it, what it loses, and that no bytes do harm (rung T0)."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol import coding
from shoal.protocol.codecs import BF16, CHUNK, FP16, INT8, NAMES, RAW, TOPK, Codec, size
from shoal.protocol.coding import SAMPLE, decode, encode, indices
from shoal.protocol.errors import ProtocolError

NAN, INF = float("nan"), float("inf")
LENGTHS = (1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, coding.PIECE, coding.PIECE + 1, 3 * coding.PIECE + CHUNK + 5)
ALL = [Codec(RAW), Codec(BF16), Codec(FP16), Codec(INT8), Codec(TOPK, 0.1)]

vectors = hnp.arrays(
    np.float32, st.integers(1, 600), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


def vector_of(*values: float) -> coding.Vector:
    return np.array(values, np.float32)


def normal(elements: int, seed: int = 0) -> coding.Vector:
    return np.random.default_rng(seed).standard_normal(elements, dtype=np.float32)


def through(codec: Codec, vector: coding.Vector) -> coding.Vector:
    return decode(codec.number, encode(codec, vector), len(vector))


def largest(vector: coding.Vector, k: int) -> coding.Vector:
    """Only the k largest of a vector whose magnitudes all differ; sorted whole."""
    kept = np.zeros_like(vector)
    chosen = np.argsort(-np.abs(vector), kind="stable")[:k]
    kept[chosen] = vector[chosen]
    return kept


# --- the bytes


def test_bf16_to_the_byte() -> None:
    """The upper half, rounded to nearest, ties to even; NaN and infinity stay, what is too large becomes infinity."""
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], "<u4").view(np.float32)
    found = np.frombuffer(encode(Codec(BF16), np.concatenate([ties, vector_of(NAN, -INF, 3.4e38, -0.0)])), "<u2")

    assert [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7FC0, 0xFF80, 0x7F80, 0x8000] == found.tolist()
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], "<u4").view(np.float32)
    assert np.isnan(through(Codec(BF16), odd)).all(), "a NaN with every bit set does not become zero"
    assert [1.0, 1.015625, 1.0078125, 1.0] == decode(BF16, found[:4].tobytes(), 4).tolist()


def test_fp16_to_the_byte() -> None:
    """IEEE half; a finite number that is too large becomes the largest, infinity and NaN stay, the smallest vanish."""
    given_ = vector_of(1.0, -2.0, 65504.0, 65519.0, 65520.0, -1e30, INF, -INF, NAN, 2.0**-24, 2.0**-26)
    found = np.frombuffer(encode(Codec(FP16), given_), "<u2").tolist()

    assert [0x3C00, 0xC000, 0x7BFF, 0x7BFF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00] == found[:8]
    assert (True, 0x0001, 0x0000) == ((found[8] & 0x7FFF) > 0x7C00, found[9], found[10])
    assert [1.0, -2.0, 65504.0] == decode(FP16, struct.pack("<3H", 0x3C00, 0xC000, 0x7BFF), 3).tolist()


def test_int8_to_the_byte() -> None:
    """Scales first, one for 256 elements, then the integers; the last chunk may be short."""
    vector = np.zeros(CHUNK + 2, np.float32)
    vector[:3] = 254.0, -254.0, 3.1
    vector[CHUNK:] = 0.5, -127.0
    payload = bytes(encode(Codec(INT8), vector))

    assert struct.pack("<2f", 2.0, 1.0) == payload[:8]
    numbers = np.frombuffer(payload[8:], np.int8)
    assert ([127, -127, 2, 0], [0, -127]) == (numbers[:4].tolist(), numbers[CHUNK:].tolist())
    assert [254.0, -254.0, 4.0, 0.0] == decode(INT8, payload, len(vector))[:4].tolist()


def test_topk_to_the_byte() -> None:
    """Indices first, ascending, then the values; the rest is zero. At least one is sent."""
    vector = vector_of(0.5, -4.0, 1.0, 3.0, 0.0, 2.0)

    assert struct.pack("<2I2f", 1, 3, -4.0, 3.0) == encode(Codec(TOPK, 0.4), vector)
    assert [0.0, -4.0, 0.0, 3.0, 0.0, 0.0] == through(Codec(TOPK, 0.4), vector).tolist()
    assert struct.pack("<If", 1, -4.0) == encode(Codec(TOPK, 1e-9), vector)
    assert struct.pack("<If", 0, 7.0) == encode(Codec(TOPK, 0.5), vector_of(7.0))
    assert 3 == len(indices(encode(Codec(TOPK, 0.5), vector)))


# --- what is lost


@pytest.mark.parametrize("elements", LENGTHS)
@pytest.mark.parametrize("codec", ALL, ids=str)
def test_every_length_goes_through(codec: Codec, elements: int) -> None:
    """Within the bound of its codec, in its size, into memory of the caller's as well."""
    vector = normal(elements)
    payload = encode(codec, vector)
    out = np.full(elements, NAN, np.float32)
    found = decode(codec.number, payload, elements, out)

    assert found is out
    assert len(payload) == codec.size(elements) <= size(codec.number, elements)
    assert codec.number == TOPK or len(payload) == size(codec.number, elements)
    if codec.number == TOPK:
        assert np.array_equal(largest(vector, max(1, min(round(0.1 * elements), elements // 2))), found)
    else:
        chunks = np.abs(np.pad(vector, (0, -elements % CHUNK))).reshape(-1, CHUNK).max(axis=1).repeat(CHUNK)[:elements]
        bound = {
            RAW: 0.0,
            BF16: np.abs(vector) * 2.0**-8,
            FP16: np.abs(vector) * 2.0**-11 + 2.0**-25,
            INT8: chunks / 253,
        }
        assert np.all(np.abs(found - vector) <= bound[codec.number])


@given(vectors)
def test_any_finite_vector_goes_through(vector: coding.Vector) -> None:
    """The smallest and the largest numbers as well: no warning, no NaN, and an error that the format allows."""
    for codec in ALL:
        found = through(codec, vector)
        assert not np.isnan(found).any(), codec
    found = through(Codec(INT8), vector).astype(float)
    for start in range(0, len(vector), CHUNK):
        chunk = vector[start : start + CHUNK].astype(float)
        most = np.abs(chunk).max()
        assert np.abs(found[start : start + CHUNK] - chunk).max() <= max(most / 253, 2.0**-100)


@given(vectors)
def test_torch_makes_the_same_bytes(vector: coding.Vector) -> None:
    """Of fp16, both ways; and torch's own bfloat16 is our bf16."""
    payload = encode(Codec(FP16), vector)

    assert payload == encode(Codec(FP16), vector, torch)
    mine, theirs = (decode(FP16, bytearray(payload), len(vector), torch=with_) for with_ in (None, torch))
    assert np.array_equal(mine, theirs)
    assert torch.from_numpy(vector).to(torch.bfloat16).view(torch.int16).numpy().tobytes() == encode(
        Codec(BF16), vector
    )


def test_what_is_not_finite_is_not_hidden() -> None:
    """A NaN or an infinity arrives as such, or takes its chunk of int8 with it, and nothing else."""
    vector = normal(3 * CHUNK)
    vector[5], vector[CHUNK], vector[7] = NAN, -INF, 0.0
    for number in (RAW, BF16, FP16):
        found = through(Codec(number), vector)
        assert [5] == np.flatnonzero(np.isnan(found)).tolist()
        assert -INF == found[CHUNK]
    found = through(Codec(INT8), vector)
    assert np.isnan(found[: 2 * CHUNK]).all()
    assert np.isfinite(found[2 * CHUNK :]).all()
    assert {5, CHUNK} <= set(indices(encode(Codec(TOPK, 0.01), vector)).tolist())


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("shape", ["normal", "heavy", "sorted", "seen", "unseen", "sparse", "equal", "zero"])
def test_topk_finds_the_largest(shape: str, fraction: float) -> None:
    """Whether the threshold is guessed well or not: by their sum, since equal ones may be exchanged."""
    elements = 5 * SAMPLE + 77
    vector = normal(elements)
    if shape == "heavy":
        vector = vector**5
    elif shape == "sorted":
        vector.sort()
    elif shape == "seen":  # the sample, every fifth element, has all that is large
        vector[:: elements // SAMPLE] *= 1000
    elif shape == "unseen":
        vector[1 :: elements // SAMPLE] *= 1000
    elif shape == "sparse":
        vector[normal(elements, 1) < 2.5] = 0
    elif shape in ("equal", "zero"):
        vector[:] = 3.0 if shape == "equal" else 0.0
    k = round(fraction * elements)
    chosen = indices(encode(Codec(TOPK, fraction), vector))

    assert k == len(chosen)
    assert np.all(chosen[1:] > chosen[:-1])
    assert np.sort(np.abs(vector))[-k:].tolist() == np.sort(np.abs(vector[chosen])).tolist()


def test_topk_sends_a_nan_that_the_sample_has_not_seen() -> None:
    """It is larger than any threshold."""
    vector = normal(5 * SAMPLE)
    vector[7] = NAN

    assert 7 in indices(encode(Codec(TOPK, 0.001), vector))


# --- what must not come in


@pytest.mark.parametrize("number", range(5), ids=NAMES)
@pytest.mark.parametrize("elements", [1, 300])
def test_a_wrong_length_is_refused(number: int, elements: int) -> None:
    """One byte or one element more or less than the vector has; nothing at all; far too much."""
    good = bytes(encode(Codec(number, 0.5), normal(elements)))
    wrong = [b"", good[:-1], good + b"\0", good + good, bytes(10**6)]
    for payload in wrong if number != TOPK else [b"", good[:-1], good + b"\0", bytes(size(TOPK, elements) + 8)]:
        with pytest.raises(ProtocolError) as refused:
            decode(number, payload, elements)
        assert "malformed" == refused.value.reason
    decode(number, good, elements)


@pytest.mark.parametrize("number", [-1, 5, 255])
def test_an_unknown_codec_is_refused(number: int) -> None:
    """By number; no other is tried."""
    with pytest.raises(ProtocolError):
        decode(number, bytes(4), 1)


@pytest.mark.parametrize("bad", [(1, 0), (3, 3), (0, 300), (0, 2**32 - 1)])
def test_indices_that_cannot_be_are_refused(bad: tuple[int, int]) -> None:
    """Descending, twice the same, or not in the vector."""
    with pytest.raises(ProtocolError, match="do not ascend"):
        decode(TOPK, struct.pack("<2I2f", *bad, 1.0, 1.0), 300)


@pytest.mark.parametrize("scale", [INF, -INF, -1.0, -0.0, -NAN])
def test_scales_that_cannot_be_are_refused(scale: float) -> None:
    """Infinite or negative ones, and another NaN than ours."""
    decode(INT8, struct.pack("<2f", 1.0, NAN) + bytes(300), 300)
    with pytest.raises(ProtocolError, match="a scale"):
        decode(INT8, struct.pack("<2f", 1.0, scale) + bytes(300), 300)


@pytest.mark.parametrize("number", range(5), ids=NAMES)
def test_any_bytes_are_decoded_or_refused(number: int) -> None:
    """Random bytes of any length: a vector of the length asked for, or ProtocolError, and never another length."""
    dice = random.Random(number)
    read = 0
    for _ in range(3000):
        elements = dice.choice((1, 2, 7, 256, 300))
        length = dice.choice((size(number, elements), size(number, elements), 8, dice.randrange(2000)))
        payload = bytearray(dice.randbytes(length))
        if number == TOPK and dice.random() < 0.5 and length % 8 == 0:
            payload[: length // 2] = np.sort(
                np.array([dice.randrange(elements + 1) for _ in range(length // 8)], "<u4")
            ).tobytes()
        try:
            found = decode(number, payload, elements, torch=dice.choice((None, torch)))
        except ProtocolError:
            continue
        read += 1
        assert (elements, np.float32) == (len(found), found.dtype)
    assert read > 20
