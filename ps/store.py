"""The blocks of a shard: their values, versions and updates (SPEC §4.2, §6.4).

Rules
- A live block is never handed out: a reader gets a copy, made once a version (and codec) and shared by all who ask for it.
- A reader who takes his time costs nothing until the block changes: it is copied when he asks for it, or just before the change.
- Sizes are checked here, against the layout, before anything is touched.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from math import isfinite
from sys import getrefcount
from typing import Any

import numpy as np
import torch

from ..protocol.codecs import RAW, Codec
from ..protocol.coding import encode
from ..protocol.layout import Block, Layout
from ..protocol.schema import Buffer
from .rules import Ranges, Updater

MOST_COUNTED = 1024
"""Updates of a block that are counted back (SPEC §13.2)."""
FREE = 2
"""References to an array that nobody else holds: its owner's, and the question's."""

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Misfit(Exception):
    """A payload does not fit the layout, or holds NaN. `code` goes into the refusal."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Shot:
    """A block's values at one moment, in a codec."""

    def __init__(self, store: Store, block: int, codec: int) -> None:
        self._of = store, block, codec
        self._copy: Buffer = b""

    @property
    def nbytes(self) -> int:
        """Of the copy, if there is one."""
        return len(self._copy)

    def values(self) -> Buffer:
        """They, as bytes that nobody will change."""
        if not self._copy:
            store, block, codec = self._of
            self._copy = store.snapshot(block, codec)
        return self._copy


@dataclass(slots=True)
class _Copy:
    values: np.ndarray[Any, np.dtype[np.uint8]]
    version: int = -1


@dataclass(slots=True)
class _Held:
    block: Block
    group: int
    weights: torch.Tensor
    updater: Updater
    elements: int
    itemsize: int
    version: int = 0
    copies: dict[int, _Copy] = field(default_factory=dict)
    """By codec."""
    shots: dict[int, Shot] = field(default_factory=dict)
    """By codec, of this version, where somebody was promised its values."""
    updates: list[int] = field(default_factory=list)
    """The versions that its last updates made."""


class Store:
    """The blocks that shard `index` owns under `layout`, all zero until filled."""

    def __init__(self, layout: Layout, index: int) -> None:
        self.layout = layout
        self.version = 0
        self._held: dict[int, _Held] = {}
        for block in layout.by_shard[index]:
            flat = layout.flats[block.flat]
            weights = torch.zeros(block.elements, dtype=DTYPES[flat.dtype])
            updater = Updater(weights, layout.spec.groups[flat.group])
            self._held[block.index] = _Held(block, flat.group, weights, updater, block.elements, block.itemsize)

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(self._held)

    @property
    def nbytes(self) -> int:
        return sum(held.block.nbytes for held in self._held.values())

    def group(self, block: int) -> int:
        return self._held[block].group

    def nbytes_of(self, block: int) -> int:
        return self._held[block].block.nbytes

    def tensor(self, block: int, payload: Buffer, ranges: Ranges | None = None, check: bool = True) -> torch.Tensor:
        """A payload as a gradient of (part of) a block. Not a copy.

        Args:
            check: look for NaN and infinity; another has done it otherwise.

        Raises:
            Misfit: `shape` for a foreign block or a wrong length, `nonfinite` for NaN or infinity.
        """
        held = self._held.get(block)
        if held is None:
            raise Misfit("shape", f"block {block} is not on this shard")
        elements = held.elements if ranges is None else sum(b - a for a, b in ranges)
        if len(payload) != elements * held.itemsize:
            raise Misfit("shape", f"block {block}: {len(payload)} bytes, not {elements * held.itemsize}")
        tensor = _tensor(payload, held.weights.dtype)
        # A sum is one pass at memory speed, and NaN or infinity shows in it; only then look at each.
        if check and not isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            raise Misfit("nonfinite", f"block {block} holds NaN or infinity")
        return tensor

    def check_ranges(self, block: int, ranges: Ranges) -> None:
        """
        Raises:
            Misfit: the ranges are not ascending, touch, or leave the block.
        """
        held = self._held.get(block)
        before = -1
        for start, stop in ranges:
            if held is None or not before < start < stop <= held.block.elements:
                raise Misfit("shape", f"block {block}: the range [{start}, {stop}) is not in order or not in the block")
            before = stop

    def fill(self, block: int, payload: Buffer) -> None:
        """Set a block's values.

        Raises:
            Misfit: as `tensor`; weights that are not finite are let in, they are the user's.
        """
        held = self._held.get(block)
        if held is None or len(payload) != held.block.nbytes:
            raise Misfit("shape", f"block {block} with {len(payload)} bytes")
        self._about_to_change(held)
        held.weights.copy_(_tensor(payload, held.weights.dtype))
        self._changed(held)

    def apply(
        self,
        block: int,
        gradient: torch.Tensor,
        ranges: Ranges | None,
        numbers: tuple[float, ...],
        workers: int,
        tau: int = 0,
    ) -> None:
        """One step of the block's rule; see `Updater.apply`."""
        held = self._held[block]
        self._about_to_change(held)
        if not held.updater.apply(gradient, ranges, numbers, workers, tau):
            return
        self._changed(held)
        held.updates.append(held.version)
        if len(held.updates) >= 2 * MOST_COUNTED:
            del held.updates[:-MOST_COUNTED]

    def add(self, block: int, delta: torch.Tensor) -> None:
        """Add to a block's values, whatever its rule."""
        held = self._held[block]
        self._about_to_change(held)
        held.weights.add_(delta.to(held.weights.dtype))
        self._changed(held)

    def elements(self, block: int) -> int:
        return self._held[block].block.elements

    def updates_since(self, block: int, version: int) -> int:
        """How many updates of a block came after `version`: at most `MOST_COUNTED`."""
        updates = self._held[block].updates
        if not updates or updates[-1] <= version:
            return 0
        return min(len(updates) - bisect_right(updates, version), MOST_COUNTED)

    def version_of(self, block: int) -> int:
        """The version that the block's last change made."""
        return self._held[block].version

    def weights(self, block: int) -> torch.Tensor:
        """The live values; for whoever updates them."""
        return self._held[block].weights

    def as_tensor(self, block: int, values: Buffer) -> torch.Tensor:
        """A snapshot of a block as a tensor, which holds it. Not a copy."""
        return _tensor(values, self._held[block].weights.dtype)

    def changed_since(self, version: int, blocks: tuple[int, ...] = ()) -> list[int]:
        """Which of `blocks` (empty: all) have changed after `version`, in order."""
        return [index for index in blocks or self._held if self._held[index].version > version]

    def snapshot(self, block: int, codec: int = RAW) -> memoryview:
        """The block's values now, as bytes that nobody will change; in a codec if one applies to the block."""
        held = self._held[block]
        codec = codec if self.layout.coded[block] else RAW
        copy = held.copies.get(codec)
        if copy is None or (copy.version != held.version and getrefcount(copy.values) > FREE):
            nbytes = Codec(codec).size(held.block.elements) if codec else held.block.nbytes
            copy = held.copies[codec] = _Copy(np.empty(nbytes, np.uint8))
        if copy.version != held.version:  # nobody reads it: new pages would cost more than the copy
            copy.version = held.version
            if codec == RAW:
                copy.values[...] = held.weights.view(torch.uint8).numpy()
            else:
                encode(Codec(codec), held.weights.numpy(), torch, copy.values)
        return memoryview(copy.values)  # type: ignore[arg-type]

    def shot(self, block: int, codec: int = RAW) -> Shot:
        """The block's values now, to be read later."""
        return self._held[block].shots.setdefault(codec, Shot(self, block, codec))

    def copy_into(self, block: int, memory: memoryview) -> None:
        """The block's values now, written to `memory`, which has its length."""
        memory[:] = memoryview(self._held[block].weights.view(torch.uint8).numpy())  # type: ignore[arg-type]

    @staticmethod
    def _about_to_change(held: _Held) -> None:
        if not held.shots:
            return
        for shot in held.shots.values():
            if getrefcount(shot) > FREE + 1:  # somebody has not read it yet
                shot.values()
        held.shots.clear()

    def _changed(self, held: _Held) -> None:
        self.version += 1
        held.version = self.version


def _tensor(payload: Buffer, dtype: torch.dtype) -> torch.Tensor:
    """The payload as a tensor. Frames off a socket are writable, as torch wants it; anything else is copied."""
    if memoryview(payload).readonly:
        payload = bytearray(payload)
    return torch.frombuffer(payload, dtype=dtype)
