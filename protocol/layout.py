"""Tensors -> blocks -> shards, as a pure function (SPEC §4.2). Every party computes it and compares digests.

Rules
- Small tensors share blocks: a step costs messages per shard, not per tensor.
- Two shards differ by at most one block.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from .model import ITEMSIZE, ModelSpec
from .regions import Plan, plan

BLOCK_BYTES = 4 * 1024 * 1024
MIN_BLOCK_BYTES = 4096
MAX_BLOCK_BYTES = 16 * 1024 * 1024
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor lies in its flat: elements `[start, stop)`. `tensor` indexes `ModelSpec.tensors`."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Flat:
    """The tensors of one group and dtype, end to end."""

    group: int
    dtype: str
    elements: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Elements `[start, stop)` of a flat, and the shard that owns them."""

    index: int
    flat: int
    start: int
    stop: int
    itemsize: int
    shard: int

    @property
    def elements(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.itemsize


@dataclass(frozen=True)
class Layout:
    """The whole assignment. `block_bytes` is the largest block asked for."""

    spec: ModelSpec
    shards: int
    block_bytes: int
    flats: tuple[Flat, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def digest(self) -> str:
        hashed = hashlib.sha256(bytes.fromhex(self.spec.digest))
        hashed.update(self.shards.to_bytes(4, "big") + self.block_bytes.to_bytes(4, "big"))
        for block in self.blocks:
            hashed.update(block.shard.to_bytes(4, "big"))
        return hashed.hexdigest()

    @cached_property
    def plan(self) -> Plan:
        """Where the blocks lie in a region."""
        return plan(self.flats, self.blocks)

    @cached_property
    def coded(self) -> tuple[bool, ...]:
        """Does a codec apply to the block (SPEC §12.2)?"""
        fit = [flat.dtype == "float32" and self.spec.groups[flat.group].name != "mean" for flat in self.flats]
        return tuple(fit[block.flat] for block in self.blocks)

    @cached_property
    def by_shard(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each shard, in order of their numbers."""
        owned: list[list[Block]] = [[] for _ in range(self.shards)]
        for block in self.blocks:
            owned[block.shard].append(block)
        return tuple(map(tuple, owned))

    def pieces_in(self, block: Block) -> tuple[Piece, ...]:
        """What lies, in whole or in part, in a block, in order. Found by halving: there may be a million tensors."""
        pieces = self.flats[block.flat].pieces
        first = bisect_right(pieces, block.start, key=attrgetter("stop"))
        return pieces[first : bisect_left(pieces, block.stop, key=attrgetter("start"))]


def lay_out(spec: ModelSpec, shards: int, block_bytes: int = BLOCK_BYTES) -> Layout:
    """The layout of a model over `shards` shards.

    Args:
        shards: at least 1.
        block_bytes: the largest block, from MIN_BLOCK_BYTES to MAX_BLOCK_BYTES.

    Raises:
        ValueError: an argument is out of range.
    """
    if shards < 1 or not MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES:
        raise ValueError(f"shards {shards}, block_bytes {block_bytes}")
    flats = _flats(spec)
    limit = min(block_bytes, max(MIN_BLOCK_BYTES, -(-spec.total_bytes // shards)))
    cuts = [(i, a, b, ITEMSIZE[flat.dtype]) for i, flat in enumerate(flats) for a, b in _cut(flat, limit)]
    owners = [0] * len(cuts)
    load = [(0, shard) for shard in range(shards)]
    for index in sorted(range(len(cuts)), key=lambda i: (-(cuts[i][2] - cuts[i][1]) * cuts[i][3], i)):
        held, shard = heapq.heappop(load)
        _, start, stop, itemsize = cuts[index]
        owners[index] = shard
        heapq.heappush(load, (held + (stop - start) * itemsize, shard))
    blocks = tuple(Block(i, *cut, owners[i]) for i, cut in enumerate(cuts))
    return Layout(spec, shards, block_bytes, flats, blocks)


def _flats(spec: ModelSpec) -> tuple[Flat, ...]:
    pieces: dict[tuple[int, str], list[Piece]] = {}
    ends: dict[tuple[int, str], int] = {}
    for index, tensor in enumerate(spec.tensors):
        key = (tensor.group, tensor.dtype)
        start = ends.get(key, 0)
        ends[key] = start + tensor.elements
        pieces.setdefault(key, []).append(Piece(index, start, ends[key]))
    return tuple(Flat(group, dtype, ends[group, dtype], tuple(run)) for (group, dtype), run in pieces.items())


def _cut(flat: Flat, limit: int) -> Iterator[tuple[int, int]]:
    step = max(1, limit // (_ALIGN * ITEMSIZE[flat.dtype]) * _ALIGN)
    for start in range(0, flat.elements, step):
        yield start, min(start + step, flat.elements)
