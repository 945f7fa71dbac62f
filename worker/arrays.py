"""Named arrays <-> flat vectors (SPEC §4.2): what users hold against what shards hold.

Rules
- numpy and torch arrays go in; what comes out is of the kind that was registered.
- A wrong name, shape or dtype is a `ShapeError` in the caller, before anything is sent.
- torch is touched only when a torch tensor is given: then it is imported already.
- bfloat16 travels as its 16 bits.
"""

from __future__ import annotations

import functools
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from ..protocol.codecs import RAW
from ..protocol.coding import decode
from ..protocol.errors import NonFiniteError, ShapeError
from ..protocol.layout import Block, Layout, Piece
from ..protocol.model import ITEMSIZE, Tensor
from ..protocol.schema import Buffer
from .calls import Part
from .finite import all_finite
from .region import NUMPY, Region

Array: TypeAlias = Any
"""A numpy array or a torch tensor of float32, float64, float16 or bfloat16."""

Bits: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

PART_BYTES = 4 * 1024 * 1024


def is_torch(array: Array) -> bool:
    """Is it a torch tensor?"""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def describe(name: str, array: Array, group: int = 0) -> Tensor:
    """The tensor that an array is.

    Raises:
        ShapeError: not an array, or of a dtype that shoal does not carry.
    """
    if not is_torch(array) and not isinstance(array, np.ndarray | np.generic):
        raise ShapeError(f"{name!r} is a {type(array).__name__}", hint="a numpy array or a torch tensor")
    dtype = _name_of(array.dtype)
    if dtype not in ITEMSIZE:
        raise ShapeError(f"{name!r} has dtype {dtype}", hint=f"one of {', '.join(ITEMSIZE)}")
    return Tensor(name, dtype, tuple(int(size) for size in array.shape), group)


def _fits(array: Array, wanted: Tensor) -> bool:
    """Is it of the registered dtype and shape? As `describe` would say, without making a record of it."""
    if not is_torch(array) and not isinstance(array, np.ndarray | np.generic):
        return False
    return _name_of(array.dtype) == wanted.dtype and tuple(array.shape) == wanted.shape


@functools.cache
def _name_of(dtype: Any) -> str:
    """What a numpy or torch dtype is called on the wire. numpy takes microseconds to say it."""
    return str(dtype).removeprefix("torch.")


def bits(array: Array) -> Bits:
    """The values as a flat numpy array; bfloat16 as uint16. A view where that is possible."""
    if is_torch(array):
        import torch

        tensor = array.detach()
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        tensor = tensor.cpu().contiguous().reshape(-1)
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16)  # type: ignore[no-any-return]
        return tensor.numpy()  # type: ignore[no-any-return]
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint16) if _name_of(array.dtype) == "bfloat16" else flat


def write(target: Array, values: Bits) -> None:
    """Write flat values into an array, in place."""
    if is_torch(target):
        import torch

        tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if target.dtype is torch.bfloat16 else (
            torch.from_numpy(values)
        )  # fmt: skip
        with torch.no_grad():
            target.copy_(tensor.view(target.shape))
    else:
        target[...] = values.view(target.dtype).reshape(target.shape)


class Template:
    """How to make an array like the one that was registered."""

    def __init__(self, array: Array) -> None:
        self._torch = is_torch(array)
        self._dtype, self._shape = array.dtype, tuple(array.shape)

    def view(self, values: Bits) -> Array:
        """The values, flat, as an array like the one registered. It shares their memory."""
        if self._torch:
            import torch

            flat = values.view(np.int16) if self._dtype is torch.bfloat16 else values
            return torch.from_numpy(flat).view(self._dtype).view(self._shape)
        return values.view(self._dtype).reshape(self._shape)

    def make(self, values: Bits) -> Array:
        """A new array with these values; `values` is flat and is copied."""
        if self._torch:
            import torch

            made = torch.empty(self._shape, dtype=self._dtype)
            write(made, values)
            return made
        return values.copy().view(self._dtype).reshape(self._shape)


class Cache:
    """A worker's copy of the model, flat by flat, and which version of each shard it is of.

    Args:
        region: to hold it, where shards of this machine may write; without one it is in this process's own memory.
    """

    def __init__(self, layout: Layout, region: Region | None = None) -> None:
        self.layout, self.region = layout, region
        self.held: dict[int, tuple[int, int]] = {}
        """By shard, the incarnation and version that every block here is of."""
        self._flats = _flats(layout, region)
        self._views: dict[str, Array] = {}
        self._where: dict[str, tuple[int, Piece]] = {}
        for number, flat in enumerate(layout.flats):
            for piece in flat.pieces:
                self._where[layout.spec.tensors[piece.tensor].name] = (number, piece)
        self._blocks_of_flat: list[list[Block]] = [[] for _ in layout.flats]
        for block in layout.blocks:
            self._blocks_of_flat[block.flat].append(block)

    @property
    def memory(self) -> Sequence[Bits]:
        """The vectors that hold it."""
        return self._flats

    def move(self, region: Region | None) -> Region | None:
        """Go on in another region, or without one: a shard may yet write to the old one. Returns that."""
        before, self.region = self.region, region
        self._views = {}
        old, self._flats = self._flats, _flats(self.layout, region)
        for flat, values in zip(self._flats, old, strict=True):
            np.copyto(flat, values)
        self.held.clear()  # some of it may be newer than was said
        return before

    def tensor(self, name: str) -> Tensor:
        """
        Raises:
            ShapeError: there is no such tensor.
        """
        if name not in self._where:
            known = ", ".join(list(self._where)[:5])
            raise ShapeError(
                f"there is no tensor {name!r}", hint=f"one of {known}{', …' if len(self._where) > 5 else ''}"
            )
        _, piece = self._where[name]
        return self.layout.spec.tensors[piece.tensor]

    def values(self, name: str) -> Bits:
        """The tensor's values, flat; a view of the cache."""
        flat, piece = self._where[name]
        return self._flats[flat][piece.start : piece.stop]

    def views(self, templates: Mapping[str, Template]) -> Mapping[str, Array]:
        """Arrays like those registered, which share the cache's memory."""
        if not self._views:
            self._views = {name: template.view(self.values(name)) for name, template in templates.items()}
        return self._views

    def set(self, name: str, array: Array) -> None:
        self.values(name)[...] = bits(array)

    def block(self, index: int) -> Buffer:
        """A block's values now; a copy."""
        block = self.layout.blocks[index]
        return self._flats[block.flat][block.start : block.stop].copy().data.cast("B")

    def view(self, index: int) -> Buffer:
        """A block's values; the cache's own memory."""
        block = self.layout.blocks[index]
        return self._flats[block.flat][block.start : block.stop].data.cast("B")

    def load(self, index: int, payload: Buffer, codec: int = RAW) -> None:
        """A block's values, which a pull has brought.

        Raises:
            ProtocolError: the payload is none of this codec.
        """
        block = self.layout.blocks[index]
        target = self._flats[block.flat][block.start : block.stop]
        if codec == RAW:
            target[...] = np.frombuffer(payload, target.dtype)
        else:
            decode(codec, payload, block.elements, target, sys.modules.get("torch"))

    def shards(self, names: Iterable[str] | None = None) -> dict[int, tuple[int, ...]]:
        """Which blocks of which shards hold these tensors; an empty tuple for all blocks of a shard."""
        if names is None:
            return {index: () for index, blocks in enumerate(self.layout.by_shard) if blocks}
        spans: dict[int, list[tuple[int, int]]] = {}
        for name in names:
            self.tensor(name)
            flat, piece = self._where[name]
            spans.setdefault(flat, []).append((piece.start, piece.stop))
        wanted: dict[int, set[int]] = {}
        for flat, found in spans.items():
            runs = merged(found)
            for block in self._blocks_of_flat[flat]:
                at = bisect_right(runs, block.start, key=itemgetter(1))  # the first that ends in it, or after it
                if at < len(runs) and runs[at][0] < block.stop:
                    wanted.setdefault(block.shard, set()).add(block.index)
        return {shard: tuple(sorted(blocks)) for shard, blocks in sorted(wanted.items())}


class Gather:
    """Flat vectors that a push is gathered in. They belong to the push until it is acknowledged.

    Args:
        region: to hold them, where shards of this machine can read.
    """

    def __init__(self, cache: Cache, region: Region | None = None) -> None:
        self._cache, self.region = cache, region
        self._flats = _flats(cache.layout, region)
        self.views: dict[str, Array] = {}
        """Arrays that a caller may write its gradients to, by name, instead of having them copied."""
        self.encoded: dict[int, Bits] = {}
        """By block, memory for what is encoded of it."""
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._names: tuple[str, ...] = ()
        self._parts: tuple[Part, ...] | None = None
        """What `parts` said last, while it holds."""

    @property
    def number(self) -> int:
        """The region's; 0 without one."""
        return self.region.number if self.region else 0

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flats)

    @property
    def memory(self) -> Sequence[Bits]:
        """The vectors themselves."""
        return self._flats

    def values(self, index: int) -> Bits:
        """A block's values, where they lie."""
        block = self._cache.layout.blocks[index]
        return self._flats[block.flat][block.start : block.stop]

    def whole(self, blocks: Iterable[int]) -> tuple[Part, ...]:
        """Blocks as they lie here, each as a message to its shard."""
        known = self._cache.layout.blocks
        return tuple(Part(known[b].shard, (b,), (), (self.values(b).data.cast("B"),)) for b in blocks)

    def put(self, arrays: Mapping[str, Array], check: bool) -> None:
        """Copy gradients in.

        Raises:
            ShapeError: a name, shape or dtype is not as registered.
            NonFiniteError: with `check`, a gradient holds NaN or infinity; names the tensor.
        """
        if arrays is not self.views:
            self._copy(arrays)
        if len(arrays) == len(self._cache.layout.spec.tensors):
            return self._all(check)
        names = tuple(arrays)
        if names != self._names:
            self._names, self._parts = names, None
        self._spans = {}
        for name in names:
            flat, piece = self._cache._where[name]
            if check and not all_finite(self._flats[flat][piece.start : piece.stop], self._cache.tensor(name).dtype):
                raise self._nonfinite(name)
            self._spans.setdefault(flat, []).append((piece.start, piece.stop))

    def _copy(self, arrays: Mapping[str, Array]) -> None:
        """Bring in what is not here already: all that fits, or nothing."""
        foreign = {name: array for name, array in arrays.items() if self.views.get(name) is not array}
        for name, array in foreign.items():
            wanted = self._cache.tensor(name)
            if not _fits(array, wanted):
                found = describe(name, array)
                raise ShapeError(
                    f"{name!r} is {found.dtype}{list(found.shape)}, registered as {wanted.dtype}{list(wanted.shape)}"
                )
        for name, array in foreign.items():
            flat, piece = self._cache._where[name]
            self._flats[flat][piece.start : piece.stop] = bits(array)

    def _all(self, check: bool) -> None:
        """Every tensor is in: look through whole flats."""
        layout = self._cache.layout
        self._names, self._parts = (), self._parts if self._names == () else None
        self._spans = {number: [(0, flat.elements)] for number, flat in enumerate(layout.flats)}
        if check and not all(all_finite(f, flat.dtype) for f, flat in zip(self._flats, layout.flats, strict=True)):
            raise self._nonfinite(
                next(
                    layout.spec.tensors[piece.tensor].name
                    for number, flat in enumerate(layout.flats)
                    for piece in flat.pieces
                    if not all_finite(self._flats[number][piece.start : piece.stop], flat.dtype)
                )
            )

    def view(self, templates: Mapping[str, Template]) -> dict[str, Array]:
        """Arrays like those registered, of which a push needs no copy."""
        if not self.views:
            for name, template in templates.items():
                flat, piece = self._cache._where[name]
                self.views[name] = template.view(self._flats[flat][piece.start : piece.stop])
        return self.views

    @staticmethod
    def _nonfinite(name: str) -> NonFiniteError:
        return NonFiniteError(
            f"the gradient of {name!r} holds NaN or infinity",
            cause="too large a learning rate, or a division by zero in the loss",
            hint="--nonfinite skip on the server to leave such steps out",
        )

    def parts(self) -> tuple[Part, ...]:
        """What was put in, as messages to shards: views of the flats where a block is pushed whole or in one run."""
        if self._parts is None:
            parts = self._find_parts()
            if any(part.ranges for part in parts):  # some of their buffers may be copies
                return parts
            self._parts = parts
        return self._parts

    def _find_parts(self) -> tuple[Part, ...]:
        by_shard: dict[int, list[tuple[Block, list[tuple[int, int]]]]] = {}
        for flat, spans in self._spans.items():
            runs = merged(spans)
            at = 0
            for block in self._cache._blocks_of_flat[flat]:
                inside = []
                while at < len(runs) and runs[at][0] < block.stop:
                    start, stop = max(runs[at][0], block.start), min(runs[at][1], block.stop)
                    if start < stop:
                        inside.append((start - block.start, stop - block.start))
                    if runs[at][1] > block.stop:
                        break
                    at += 1
                if inside:
                    by_shard.setdefault(block.shard, []).append((block, inside))
        return tuple(part for shard, found in sorted(by_shard.items()) for part in self._packed(shard, found))

    def _packed(self, shard: int, found: Sequence[tuple[Block, list[tuple[int, int]]]]) -> Iterable[Part]:
        found = sorted(found, key=lambda entry: entry[0].index)
        run: list[tuple[Block, list[tuple[int, int]]]] = []
        size = 0
        for block, inside in found:
            if run and (size + block.nbytes > PART_BYTES or len(run) == 1024):
                yield self._part(shard, run)
                run, size = [], 0
            run.append((block, inside))
            size += block.nbytes
        if run:
            yield self._part(shard, run)

    def _part(self, shard: int, run: Sequence[tuple[Block, list[tuple[int, int]]]]) -> Part:
        counts, pairs, buffers = [], [], []
        for block, inside in run:
            whole = self._flats[block.flat][block.start : block.stop]
            if inside == [(0, block.elements)]:
                counts.append(0)
            else:
                counts.append(len(inside))
                pairs += inside
                pieces = [whole[start:stop] for start, stop in inside]
                whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            buffers.append(whole.data.cast("B"))
        blocks = tuple(block.index for block, _ in run)
        if not pairs:
            return Part(shard, blocks, (), tuple(buffers))
        return Part(shard, blocks, tuple(counts), (np.array(pairs, "<u4").tobytes(), *buffers))


def _flats(layout: Layout, region: Region | None) -> list[Bits]:
    return region.flats if region else [np.zeros(flat.elements, NUMPY[flat.dtype]) for flat in layout.flats]


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in ascending order, those that touch made one; empty ones left out."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if start == stop:
            continue
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs
