"""Which blocks can leave while backward still runs: those whose every gradient has been made (SPEC §6.3).

Rules
- What has left is looked at again when the step ends: whoever has changed a gradient since (a clip, a second backward, by whatever
  way) has changed its sum, and then nothing that left early counts.
- After such a step nothing leaves early for some steps: the loop seems to be of that kind.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

import numpy as np

from ..protocol.layout import Layout
from .arrays import Gather
from .finite import all_finite

REST = 100
"""Steps without, after one in which a gradient had changed."""

Bits: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


class Early:
    """Of one model's steps.

    Args:
        shards: to which blocks travel early: those that do not share memory.
    """

    def __init__(self, layout: Layout, shards: Collection[int]) -> None:
        self._layout = layout
        self._blocks: dict[str, list[int]] = {}
        """By tensor, the blocks that it lies in and that travel."""
        self._tensors: dict[int, int] = {}
        """By block, how many tensors it holds."""
        self._left: dict[int, int] = {}
        """By block, how many of its gradients are not made yet."""
        self._sums: dict[int, int] = {}
        """Of the blocks that have left in this step, their contents' sums."""
        self._rest = 0
        for block in layout.blocks:
            if block.shard not in shards:
                continue
            inside = layout.pieces_in(block)
            self._tensors[block.index] = len(inside)
            for piece in inside:
                self._blocks.setdefault(layout.spec.tensors[piece.tensor].name, []).append(block.index)

    def begin(self) -> None:
        """A step's gradients are made from now on."""
        self._left = self._tensors.copy() if self._rest == 0 else {}
        self._sums.clear()
        self._rest = max(0, self._rest - 1)

    def made(self, name: str, gather: Gather) -> Iterator[int]:
        """A tensor's gradient is in `gather`. Gives the blocks that can leave with it."""
        for block in self._blocks.get(name, ()):
            left = self._left.get(block, 0) - 1
            if left < 0:
                continue
            self._left[block] = left
            if left == 0:
                values = gather.values(block)
                if all_finite(values, self._layout.flats[self._layout.blocks[block].flat].dtype):
                    self._sums[block] = _sum(values)
                    yield block

    def unchanged(self, gather: Gather | None) -> bool:
        """Is what has left still what is to be pushed? That lies in `gather`; None: somewhere else."""
        if not self._sums:
            return False
        if gather is not None and all(_sum(gather.values(block)) == found for block, found in self._sums.items()):
            return True
        self._rest = REST
        return False


def _sum(values: Bits) -> int:
    """Of the bits, modulo 2^64: one pass at memory speed."""
    raw = values.view(np.uint8)
    even = len(raw) // 8 * 8
    return int(np.add.reduce(raw[:even].view(np.uint64))) + int.from_bytes(raw[even:].tobytes(), "little")
