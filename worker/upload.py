"""A client's slices on their way to the shards (SPEC §14.6): made by the piece, sent in order, sent again if need be.

Rules
- What can be sent is masked: an update is quantised and masked in a buffer of its own and copied from there, so that memory which
  a socket may still read never holds anything else.
- A piece is made once: rounding by chance would make it another.
- The lanes are made when all pieces of all slices are: they count what was clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from ..protocol.errors import ConfigError, ShapeError
from ..protocol.federated import NORM, SUM
from ..protocol.join import SECAGG
from ..protocol.rounds import Masked
from ..protocol.schema import Buffer
from ..protocol.secure.fixed import UNIFORM, Quantiser, auxiliary, finite, ratio
from ..protocol.secure.masks import AUXILIARY, Masks
from ..protocol.secure.noise import Array, generator, privatise
from ..protocol.secure.plan import Plan
from ..protocol.session import PIECE, Slice
from .parley import Input

WINDOW = 8
"""Pieces to a shard that are not acknowledged."""
RETRY = 1.0


class Encoder:
    """Makes the slices.

    Args:
        count: members of the session. add, subtract: the keys of the masks.
        memory: to write to, if it fits; else new memory is used, which costs more than the work.
        given: looked at by `check_input`.
    """

    def __init__(
        self,
        plan: Plan,
        given: Input,
        count: int,
        add: Sequence[bytes],
        subtract: Sequence[bytes],
        memory: Array | None = None,
    ) -> None:
        self._plan, self._given = plan, given
        self._weight = UNIFORM if plan.uniform else ratio(given.weight, plan.reference, plan.cap)
        self._count, self._masked = count, plan.protection == SECAGG
        self._masks, self._lane_masks = Masks(add, subtract), Masks(add, subtract, AUXILIARY)
        scale = plan.scale(count)
        self.dtype = scale.dtype if self._masked else np.dtype(np.float32)
        self._quantiser = Quantiser(scale, self._weight)
        self._noisy: Array | None = None
        if plan.noise is not None:
            self._noisy = np.empty(plan.elements, self.dtype)
            privatise(given.update, plan.noise, self._noisy, generator())
        self._factor = np.float32(1.0)
        self._tells = plan.noise is None
        """May it be known how much was clipped? Noise hides what is summed, and not this."""
        norm = float(dict(plan.training).get(NORM, 0.0))
        if norm and not self._masked:
            length = float(np.linalg.norm(given.update.astype(np.float64)))
            self._factor = np.float32(min(1.0, norm / length) if length else 1.0)
            self._tells = False
        self.slices = [Slice(stop - start, self.dtype.itemsize, plan.lanes) for start, stop in plan.shards]
        size = sum(each.size for each in self.slices)
        self.memory = memory if memory is not None and memory.nbytes == size else np.empty(size, np.uint8)
        self._begins = [sum(each.size for each in self.slices[:index]) for index in range(len(self.slices))]
        self._firsts = [sum(each.elements for each in self.slices[:index]) for index in range(len(self.slices))]
        self._made = [0] * len(self.slices)
        """Elements of each slice that are in memory."""
        self._clipped = 0
        self._sealed = False
        self._scratch = np.empty(min(PIECE, max(1, size)) // self.dtype.itemsize + 1 if self._masked else 0, self.dtype)
        """What is not masked yet never lies where it could be sent from."""

    def __repr__(self) -> str:
        return f"Encoder({len(self.slices)} slices)"

    def piece(self, shard: int, offset: int) -> Buffer:
        """The bytes of a slice from this offset on, a multiple of PIECE."""
        each, begin = self.slices[shard], self._begins[shard]
        stop = min(offset + PIECE, each.size)
        self._make(shard, min(stop, each.main))
        if stop > each.main:
            self._seal()
        return memoryview(self.memory[begin + offset : begin + stop])  # type: ignore[arg-type]

    def _make(self, shard: int, upto: int) -> None:
        """The elements of a slice, up to a byte."""
        each, made = self.slices[shard], self._made[shard]
        stop = upto // each.width
        while made < stop:
            end = min(made + PIECE // each.width, stop)
            self._encode(shard, made, end)
            made = self._made[shard] = end

    def _encode(self, shard: int, start: int, stop: int) -> None:
        first, number = self._firsts[shard], self._plan.shards[shard][0] + start
        begin, width = self._begins[shard], self.dtype.itemsize
        out = self.memory[begin + start * width : begin + stop * width].view(self.dtype)
        update, scratch = self._given.update[first + start : first + stop], self._scratch[: stop - start]
        if self._noisy is not None:
            scratch[:] = self._noisy[first + start : first + stop]
            self._masks.apply(scratch, number)
            out[:] = scratch
        elif self._masked:
            self._clipped += self._masks.encode(update, self._quantiser, scratch, number)
            out[:] = scratch
        else:
            self._clipped += self._clear(update, out)

    def _clear(self, update: Array, out: Array) -> int:
        """Returns how many were clipped, if that may be known."""
        clip, clipped = self._plan.clip, 0
        if max(update.max(), -update.min()) <= clip:
            np.multiply(update, self._factor, out=out, casting="same_kind")
            return 0
        np.clip(update, -clip, clip, out=out, casting="same_kind")
        if self._tells:
            clipped = int(np.count_nonzero(update > clip)) + int(np.count_nonzero(update < -clip))
        out *= self._factor
        return clipped

    def _seal(self) -> None:
        """Everything is made; now the lanes."""
        if self._sealed:
            return
        self._sealed = True
        for shard, each in enumerate(self.slices):
            self._make(shard, each.main)
        metrics = [float(self._given.metrics[name]) for name in self._plan.metrics]
        summed = [name.startswith(SUM) for name in self._plan.metrics]
        lanes = auxiliary(self._weight, self._clipped, metrics, self._count, summed)
        self._lane_masks.apply(lanes)
        for begin, each in zip(self._begins, self.slices, strict=True):
            self.memory[begin + each.main : begin + each.auxiliary] = 0
            self.memory[begin + each.auxiliary : begin + each.size] = lanes.view(np.uint8)
        self._noisy, self._scratch = None, self._scratch[:0].copy()
        del self._masks, self._lane_masks  # their keys: nothing is masked any more


@dataclass(slots=True)
class _Way:
    """To one shard: bytes that it has, bytes that were sent, when to look again."""

    kept: int = 0
    sent: int = 0
    most: int = 0
    due: float = -inf


class Upload:
    """Sends the slices.

    Args:
        make: the message for a shard at an offset.
    """

    def __init__(self, encoder: Encoder, make: Callable[[int, int, Buffer], Masked]) -> None:
        self._encoder, self._make = encoder, make
        self._ways = [_Way() for _ in encoder.slices]

    @property
    def sent(self) -> bool:
        """Was everything sent at least once?"""
        return all(way.most == each.size for way, each in self._pairs)

    @property
    def kept(self) -> bool:
        """Is everything there?"""
        return all(way.kept == each.size for way, each in self._pairs)

    @property
    def _pairs(self) -> Iterator[tuple[_Way, Slice]]:
        return zip(self._ways, self._encoder.slices, strict=True)

    @property
    def wake_at(self) -> float:
        return min((way.due for way, each in self._pairs if way.kept < each.size), default=inf)

    def acknowledged(self, shard: int, upto: int) -> None:
        """A shard has so many bytes. What it cannot have is not believed."""
        if 0 <= shard < len(self._ways):
            way, each = self._ways[shard], self._encoder.slices[shard]
            if way.kept < upto <= way.most and (upto % PIECE == 0 or upto == each.size):
                way.kept, way.due = upto, -inf
                way.sent = max(way.sent, upto)

    def again(self, shard: int) -> None:
        """What is under way to a shard may be lost."""
        if 0 <= shard < len(self._ways):
            self._ways[shard].due = -inf
            self._ways[shard].sent = self._ways[shard].kept

    def due(self, now: float) -> Iterator[tuple[int, Masked]]:
        """What is to be sent now, by shard."""
        for shard, (way, each) in enumerate(self._pairs):
            if way.kept == each.size or way.due > now:
                continue
            if way.due > -inf:  # nothing was heard for a while
                way.sent = way.kept
            way.due = now + RETRY
            while way.sent < min(each.size, way.kept + WINDOW * PIECE):
                buffer = self._encoder.piece(shard, way.sent)
                yield shard, self._make(shard, way.sent, buffer)
                way.sent = min(way.sent + PIECE, each.size)
                way.most = max(way.most, way.sent)


def check_input(plan: Plan, given: Input) -> None:
    """Can this be put into the round? To be asked before shares are dealt: then nobody has to make up for its loss.

    Raises:
        ShapeError, NonFiniteError, ConfigError: no.
    """
    if given.update.shape != (plan.elements,) or given.update.dtype not in (np.float32, np.float64):
        shape = f"{given.update.dtype} of shape {given.update.shape}"
        raise ShapeError(f"an update is {shape}, and {plan.elements} float32 or float64 are planned")
    missing = [name for name in plan.metrics if name not in given.metrics]
    if missing:
        raise ConfigError(f"this round sums the metric {missing[0]!r}, and it was not given", hint="metrics=")
    if not plan.uniform:
        ratio(given.weight, plan.reference, plan.cap)
    finite(given.update)
    auxiliary(UNIFORM, 0, [float(given.metrics[name]) for name in plan.metrics], 1)
