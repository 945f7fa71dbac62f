"""float32 vectors <-> the bytes of a codec (SPEC §12). The one definition of the formats.

Rules
- Vectorised, in few passes, by pieces that stay in the processor's cache.
- `decode` looks at every length, index and scale before it uses it, allocates no more than the vector, and raises `ProtocolError`
  and nothing else.
- torch is not imported. Who has it may hand the module in: `fp16` is several times faster with it, and the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from .codecs import BF16, CHUNK, FP16, INT8, RAW, TOPK, Codec, size
from .errors import ProtocolError
from .schema import Buffer

Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Bits: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PIECE = 1 << 16
"""Elements worked on at a time; a multiple of CHUNK."""
SAMPLE = 1 << 14
"""Elements that the threshold of `topk` is guessed from."""
LEAST = np.float32(2.0**-100)
"""A chunk of `int8` without a magnitude over this is zero."""
MOST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""127 of it are still finite, however they are rounded."""
HALF_MOST = np.float32(65504.0)
_NAN_SCALE = 0x7FC00000


def encode(codec: Codec, vector: Vector, torch: Any = None, out: Bits | None = None) -> memoryview:
    """The bytes that a vector travels in.

    Args:
        vector: float32, one-dimensional, contiguous, at least one element. It is not kept, but by `raw`, which is a view of it.
        torch: the module, if the caller has it.
        out: uint8, `codec.size(len(vector))` of them, to write to instead of new memory: new pages cost as much as the encoding.
    """
    if codec.number == RAW:
        return vector.data.cast("B")
    payload = np.empty(codec.size(len(vector)), np.uint8) if out is None else out
    _ENCODERS[codec.number](vector, payload, torch)
    return payload.data


def decode(number: int, payload: Buffer, elements: int, out: Vector | None = None, torch: Any = None) -> Vector:
    """The vector that the bytes hold.

    Args:
        number: the codec's. elements: how many the vector has, at least one.
        out: float32, contiguous, of that length: to write to instead of new memory. When this fails it may hold anything.

    Raises:
        ProtocolError: `malformed`: a wrong length, indices that do not ascend or are not in the vector, a scale that cannot be.
    """
    exact = number != TOPK
    if (
        number not in _DECODERS
        or len(payload) > size(number, elements)
        or (exact and len(payload) < size(number, elements))
    ):
        raise ProtocolError("malformed", f"{len(payload)} bytes for {elements} elements in codec {number}")
    if out is None:
        out = np.empty(elements, np.float32)
    _DECODERS[number](payload, out, torch)
    return out


def indices(payload: Buffer) -> Bits:
    """Which elements a payload of `topk` names: u32, ascending if it is well formed."""
    return np.frombuffer(payload, "<u4", len(payload) // 8)


# --- raw


def _from_raw(payload: Buffer, out: Vector, torch: Any) -> None:
    out[...] = np.frombuffer(payload, "<f4")


# --- 16 bits


def _bf16(vector: Vector, out: Bits, torch: Any) -> None:
    payload = out.view("<u2")
    scratch = np.empty(min(PIECE, len(vector)), np.uint32)
    for start in range(0, len(vector), PIECE):
        piece = vector[start : start + PIECE]
        bits, rounded = piece.view(np.uint32), scratch[: len(piece)]
        np.right_shift(bits, 16, out=rounded)  # half of what is cut off, less one where the result would stay even
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        payload[start : start + PIECE] = rounded
        nan = np.isnan(piece)
        if nan.any():
            payload[start : start + PIECE][nan] = 0x7FC0


def _from_bf16(payload: Buffer, out: Vector, torch: Any) -> None:
    np.left_shift(np.frombuffer(payload, "<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _fp16(vector: Vector, out: Bits, torch: Any) -> None:
    payload, bits = out.view("<f2"), out.view("<u2")
    if torch is not None:
        torch.from_numpy(payload).copy_(torch.from_numpy(vector))
    else:
        with np.errstate(over="ignore"):
            payload[...] = vector
    over = (bits & 0x7FFF) == 0x7C00
    if over.any():
        over &= np.isfinite(vector)
        payload[over] = np.copysign(HALF_MOST, vector[over])


def _from_fp16(payload: Buffer, out: Vector, torch: Any) -> None:
    halves = np.frombuffer(payload, "<f2")
    if torch is not None and halves.flags.writeable:  # torch warns of memory that it might write to
        torch.from_numpy(out).copy_(torch.from_numpy(halves))
    else:
        out[...] = halves


# --- 8 bits


def _int8(vector: Vector, out: Bits, torch: Any) -> None:
    elements = len(vector)
    scales, numbers = _halves(out, elements)
    scratch = np.empty((min(PIECE, elements) // CHUNK + 1, CHUNK), np.float32)
    for chunks, rows in _rows(elements):
        shape = (chunks.stop - chunks.start, -1)
        _quantise(vector[rows].reshape(shape), scales[chunks], numbers[rows].reshape(shape), scratch)


def _quantise(rows: Vector, scales: Vector, numbers: Bits, scratch: Vector) -> None:
    """Rows of one scale each; writes to `scales` and `numbers`."""
    work = scratch[: len(rows), : rows.shape[1]]
    largest = np.abs(rows, out=work).max(axis=1)
    fine = np.isfinite(largest) & (largest >= LEAST)
    ordinary = bool(fine.all())
    factor = np.divide(np.float32(127), largest, where=fine, out=np.zeros_like(largest))
    np.minimum(np.divide(largest, np.float32(127)), MOST_SCALE, out=scales)
    with np.errstate(invalid="ignore"):  # infinity times zero, which is put right below
        np.multiply(rows, factor[:, None], out=work)
    if not ordinary:
        scales[~fine] = np.where(np.isfinite(largest[~fine]), np.float32(0), np.float32(np.nan))
        work[~fine] = 0
    numbers[...] = np.rint(work, out=work)


def _from_int8(payload: Buffer, out: Vector, torch: Any) -> None:
    scales, numbers = _halves(np.frombuffer(payload, np.uint8), len(out))
    bits = scales.view("<u4")
    if np.any((bits > 0x7F7FFFFF) & (bits != _NAN_SCALE)):
        raise ProtocolError("malformed", "a scale that is negative or infinite")
    for chunks, rows in _rows(len(out)):
        shape = (chunks.stop - chunks.start, -1)
        with np.errstate(over="ignore"):  # a scale that is too large makes infinity, which is looked for later
            np.multiply(numbers[rows].reshape(shape), scales[chunks, None], out=out[rows].reshape(shape))


def _halves(payload: Bits, elements: int) -> tuple[Bits, Bits]:
    """The scales and the integers of a payload."""
    end = 4 * -(-elements // CHUNK)
    return payload[:end].view("<f4"), payload[end:].view(np.int8)


def _rows(elements: int) -> list[tuple[slice, slice]]:
    """By pieces: which chunks, and which elements; the last piece may be one shorter chunk."""
    whole = elements // CHUNK * CHUNK
    found = [(start, min(start + PIECE, whole)) for start in range(0, whole, PIECE)]
    if whole < elements:
        found.append((whole, elements))
    return [(slice(a // CHUNK, -(-b // CHUNK)), slice(a, b)) for a, b in found]


# --- a few


def _topk(vector: Vector, out: Bits, torch: Any) -> None:
    half = len(out) // 2
    chosen = _largest(np.abs(vector), half // 4)
    out[:half].view("<u4")[...] = chosen
    out[half:].view("<f4")[...] = vector[chosen]


def _largest(magnitudes: Vector, k: int) -> Bits:
    """The indices of the `k` largest, ascending. Which of several equal ones is nobody's business.

    A threshold guessed from a sample leaves a few more than `k` candidates; where the guess is bad (most are equal, or the order
    beats with the sample) all are.
    """
    step = len(magnitudes) // SAMPLE
    if step > 1 and 8 * k < len(magnitudes):
        sample = magnitudes[::step]
        rank = len(sample) - 1 - (5 * k) // (4 * step) - 8
        threshold = np.partition(sample, rank)[rank]
        candidates = np.flatnonzero(~(magnitudes < threshold))  # NaN is one
        if k <= len(candidates) <= 4 * k + 256:
            return np.sort(candidates[_order(magnitudes[candidates], k)])
    return np.sort(_order(magnitudes, k))


def _order(magnitudes: Vector, k: int) -> Bits:
    return np.argpartition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k :]


def _from_topk(payload: Buffer, out: Vector, torch: Any) -> None:
    if not payload or len(payload) % 8:
        raise ProtocolError("malformed", f"{len(payload)} bytes of indices and values")
    named = indices(payload)
    if named[-1] >= len(out) or not bool(np.all(named[1:] > named[:-1])):
        raise ProtocolError("malformed", "indices that do not ascend, or are not in the vector")
    out[...] = 0
    out[named] = np.frombuffer(payload, "<f4", len(named), 4 * len(named))


_ENCODERS: dict[int, Callable[[Vector, Bits, Any], None]] = {
    BF16: _bf16,
    FP16: _fp16,
    INT8: _int8,
    TOPK: _topk,
}
_DECODERS: dict[int, Callable[[Buffer, Vector, Any], None]] = {
    RAW: _from_raw,
    BF16: _from_bf16,
    FP16: _from_fp16,
    INT8: _from_int8,
    TOPK: _from_topk,
}
