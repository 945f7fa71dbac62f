"""Pushes in the codec that the user chose (SPEC §12), and what `topk` has not sent yet.

Rules
- What a push holds is encoded where its gradients are gathered, by the thread that pushes; the core sees bytes and a number.
- Error feedback (Stich, Cordonnier and Jaggi, *Sparsified SGD with Memory*, NeurIPS 2018, algorithm 1): what is pushed is the
  largest of gradient + rest; the rest is what remains. An element that is not pushed keeps its rest.
- The rest belongs to one life of the worker: a new one begins with none, as with everything else that was not acknowledged.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable
from dataclasses import replace

import numpy as np

from ..protocol.codecs import RAW, TOPK, Codec
from ..protocol.coding import Bits, Vector, encode, indices
from ..protocol.layout import Layout
from ..protocol.schema import Buffer
from .calls import Part


class Encoder:
    """The pushes of one worker. For `topk` it keeps a float32 number for each element of the blocks that were pushed."""

    def __init__(self, codec: Codec, layout: Layout) -> None:
        self.codec, self._layout = codec, layout
        self._rests: dict[int, Vector] = {}
        self._life = 0

    def encode(
        self, parts: Iterable[Part], near: Container[int], life: int, memory: dict[int, Bits]
    ) -> tuple[Part, ...]:
        """The same parts, encoded.

        Args:
            near: shards that have the gradients in shared memory: theirs stay raw.
            life: the worker's incarnation.
            memory: by block, where to write; belongs to the push until it is acknowledged. What is missing is added.
        """
        if life != self._life:
            self._life = life
            self._rests.clear()
        return tuple(part if part.shard in near else self._part(part, memory) for part in parts)

    def _part(self, part: Part, memory: dict[int, Bits]) -> Part:
        coded = self._layout.coded
        if self.codec.number == RAW or not any(coded[block] for block in part.blocks):
            return part
        first = bool(part.ranges)
        pairs = np.frombuffer(part.buffers[0], "<u4").reshape(-1, 2) if first else np.empty((0, 2), np.uint32)
        buffers: list[Buffer] = list(part.buffers[:first])
        at = 0
        for block, count, raw in zip(
            part.blocks, part.ranges or (0,) * len(part.blocks), part.buffers[first:], strict=True
        ):
            ranges = pairs[at : at + count].tolist()
            at += count
            buffers.append(self._block(block, np.frombuffer(raw, np.float32), ranges, memory) if coded[block] else raw)
        return replace(part, buffers=tuple(buffers), codec=self.codec.number)

    def _block(self, block: int, gradient: Vector, ranges: list[list[int]], memory: dict[int, Bits]) -> Buffer:
        """`ranges`: those that the gradient is of; none for the whole block."""
        elements = self._layout.blocks[block].elements
        if block not in memory:
            memory[block] = np.empty(self.codec.size(elements), np.uint8)
        out = memory[block][: self.codec.size(len(gradient))]
        if self.codec.number != TOPK:
            return encode(self.codec, gradient, sys.modules.get("torch"), out)
        rest = self._rests.get(block)
        if rest is None:
            rest = self._rests[block] = np.zeros(elements, np.float32)
        whole = np.concatenate([rest[start:stop] for start, stop in ranges]) if ranges else rest
        np.add(whole, gradient, out=whole)
        payload = encode(self.codec, whole, out=out)
        whole[indices(payload)] = 0
        at = 0
        for start, stop in ranges:
            rest[start:stop] = whole[at : at + stop - start]
            at += stop - start
        return payload
