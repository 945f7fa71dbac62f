"""What operations do to a shard's weights: filling, applying at once, averaging a step (SPEC §4.3, §6.3).

Rules
- A push is checked whole, against the layout, before any of it is applied.
- In sync mode a worker's pushes of a step count when the step is complete: all of them, or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
import torch

from ..protocol.codecs import RAW
from ..protocol.coding import decode
from ..protocol.errors import ProtocolError
from ..protocol.federated import ServerRule
from ..protocol.frames import payload_bytes
from ..protocol.layout import Layout
from ..protocol.messages import Fill, Push
from ..protocol.schema import Buffer, Buffers
from ..protocol.session import blocks_digest
from .answers import PART_BYTES
from .averaging import StepAverage
from .fedopt import FedOpt
from .rules import Ranges
from .stale import Remedy
from .store import Misfit, Store

MAX_COLLECTED = 64 * 1024 * 1024
"""Bytes that a worker's pushes of one step may have, or twice the shard's own if that is more."""

MOST_STALENESS = 64
"""The histogram's last bin counts this staleness and all above."""


@dataclass(slots=True)
class _Update:
    """One block's part of a push, checked."""

    block: int
    gradient: torch.Tensor
    ranges: Ranges | None
    numbers: tuple[float, ...]


class Weights:
    """The blocks of one shard under one layout, zero until filled."""

    def __init__(self, layout: Layout, index: int) -> None:
        self.layout = layout
        self.store = Store(layout, index)
        self.filled = not len(self.store)
        self.updates = 0
        self.staleness: Counter[int] = Counter()
        """How many pushes in `async` had which staleness: that of their stalest block (SPEC §13.2)."""
        self.remedy = Remedy(layout.spec.stale, layout.spec.groups, self.store)
        self.federated: FedOpt | None = None
        self._filling: set[int] = set()
        self._average = StepAverage()
        self._collected: dict[int, list[Push]] = {}
        self._held: dict[int, list[Push]] = {}
        self._spoiled: set[int] = set()
        """Workers of whose open step a part was refused: it will not count."""

    @property
    def counters(self) -> Counter[str]:
        """For the report."""
        found = Counter({f"stale.{tau}": pushes for tau, pushes in self.staleness.items()})
        return found | Counter({"updates": self.updates, "uncompensated": self.remedy.uncompensated})

    @property
    def elements(self) -> int:
        """Of all blocks."""
        return sum(map(self.store.elements, self.store.blocks))

    def digest(self) -> bytes:
        """Of the values as they are now (SPEC §14.4)."""
        return blocks_digest(map(self.store.snapshot, self.store.blocks))

    def federate(self, update: np.ndarray[Any, np.dtype[np.float32]], rule: ServerRule) -> None:
        """The average of a federated round, over all blocks in order. Where tensors are means, it is added as it is."""
        if self.federated is None or self.federated.rule != rule:
            self.federated = FedOpt(rule)
        start = 0
        for block in self.store.blocks:
            stop = start + self.store.elements(block)
            average = torch.from_numpy(update[start:stop])
            mean = self.layout.spec.groups[self.store.group(block)].name == "mean"
            self.store.add(block, average if mean else self.federated.change(block, average))
            start = stop
        self.updates += 1

    def restart_filling(self) -> None:
        """Another worker fills from now on: what the one before had sent does not count."""
        self._filling.clear()

    def fill(self, fill: Fill) -> None:
        """First values, from the filler.

        Raises:
            Misfit: a foreign block or a wrong length.
        """
        for block, payload in zip(fill.blocks, fill.buffers, strict=True):
            self.store.fill(block, payload)
            self._filling.add(block)
        self.filled = len(self._filling) == len(self.store)

    def apply(self, push: Push, workers: int, finite: bool = False, buffers: Buffers | None = None) -> None:
        """Apply a push at once.

        Args:
            workers: how many are counted in.
            finite: it was looked through before.
            buffers: instead of the push's own: those that lie in a region.

        Raises:
            Misfit: nothing of it was applied.
        """
        push, stalest = self._decoded(push), 0
        for u in self._checked(push, finite, buffers):
            tau = self.store.updates_since(u.block, push.seen)
            stalest = max(stalest, tau)
            gradient, numbers = u.gradient, u.numbers
            if self.layout.spec.stale:
                gradient = self.remedy.gradient(push.incarnation, u.block, gradient, u.ranges, push.seen)
                numbers = self.remedy.numbers(u.block, numbers, tau)
            self.store.apply(u.block, gradient, u.ranges, numbers, workers, tau)
        self.staleness[min(stalest, MOST_STALENESS)] += 1
        self.updates += 1

    def read(self, worker: int, blocks: Iterable[int], version: int) -> None:
        """A worker that is counted in was answered with these blocks (none: all), as of `version`."""
        if self.remedy.keeps and version == self.store.version:  # else it is an old answer, said again
            self.remedy.read(worker, tuple(blocks) or self.store.blocks)

    def collect(self, push: Push) -> None:
        """Keep a push of the open step until its worker has finished the step, and has said whether what was `held` counts.

        Raises:
            Misfit: it is not kept.
        """
        push = self._decoded(push)
        self._checked(push)
        kept = [*self._collected.get(push.incarnation, ()), *self._held.get(push.incarnation, ())]
        room = max(MAX_COLLECTED, 2 * self.store.nbytes)
        if kept and sum(map(payload_bytes, (*kept, push))) > room:
            raise Misfit("full", f"one step may have {room} bytes at this shard: add gradients up, or end the step")
        early = push.held and not push.advance
        (self._held if early else self._collected).setdefault(push.incarnation, []).append(push)

    def apply_held(self, last: Push, workers: int) -> None:
        """A worker has finished a step with `last`, where steps are not averaged: apply what was held, if it says so."""
        for push in self._held.get(last.incarnation, ()) if last.held else ():
            self.apply(replace(push, hyper=last.hyper), workers, finite=True)

    def drop(self, incarnation: int) -> None:
        """A worker will not finish the open step, or has."""
        self._collected.pop(incarnation, None)
        self._held.pop(incarnation, None)
        self._spoiled.discard(incarnation)

    def leave(self, incarnation: int) -> None:
        """A worker is not counted in any more."""
        self.drop(incarnation)
        self.remedy.drop(incarnation)

    def spoil(self, incarnation: int) -> None:
        """A part of a worker's open step was refused: all of the step adds nothing and weighs nothing."""
        self.drop(incarnation)
        self._spoiled.add(incarnation)

    def contribute(self, last: Push, rank: int) -> None:
        """A worker has finished the open step with `last`. `rank` is its place in the order of joining."""
        spoiled = last.incarnation in self._spoiled
        collected = self._collected.get(last.incarnation, [])
        if last.held:
            held = self._held.get(last.incarnation, ())
            collected = [*collected, *(replace(push, examples=last.examples) for push in held)]
        self.drop(last.incarnation)
        if spoiled:
            return
        if last.examples > 0:
            for push in collected:
                for u in self._checked(push, finite=True):
                    elements = self.store.nbytes_of(u.block) // u.gradient.element_size()
                    self._average.add(u.block, elements, u.gradient, u.ranges, push.examples)
        self._average.finish(last.examples, rank, last.hyper)

    def close_step(self) -> None:
        """Every worker has passed the open step: apply its average."""
        average, self._average = self._average, StepAverage()
        for block, mean, ranges in average.means():
            numbers = average.hyper[self.store.group(block)] if average.hyper else ()
            self.store.apply(block, mean, ranges, numbers, 1)
        self.updates += 1

    def check(self, push: Push) -> None:
        """
        Raises:
            Misfit: its examples, version or hyperparameters cannot be, or it counts what was refused; whatever else it holds.
        """
        if push.advance and push.held and push.incarnation in self._spoiled:
            raise Misfit("spoiled", "a part of this step was refused")
        rules = self.layout.spec.groups
        if not 0 <= push.examples < inf:
            raise Misfit("shape", f"a gradient over {push.examples} examples")
        if push.seen > self.store.version:
            raise Misfit("shape", f"a gradient on version {push.seen}, and this shard is at {self.store.version}")
        if push.hyper and len(push.hyper) != len(rules):
            raise Misfit("shape", f"hyperparameters for {len(push.hyper)} groups of {len(rules)}")
        for rule, numbers in zip(rules, push.hyper, strict=False):
            if numbers and not rule.accepts(numbers):
                raise Misfit("shape", f"hyperparameters {numbers} do not fit {rule.name}")

    def _decoded(self, push: Push) -> Push:
        """The same push with its gradients raw (SPEC §12).

        Raises:
            Misfit: a foreign block, ranges or a payload that does not fit, or more than a message may hold.
        """
        if push.codec == RAW:
            return push
        known, buffers = self.layout.blocks, list[Buffer](push.buffers[: bool(push.ranges)])
        room = PART_BYTES
        for block, ranges, payload in zip(push.blocks, spans_of(push), push.buffers[bool(push.ranges) :], strict=True):
            if block not in self.store:
                raise Misfit("shape", f"block {block} is not on this shard")
            room -= known[block].nbytes
            if room < 0 and len(push.blocks) > 1:
                raise Misfit("shape", f"a push of over {PART_BYTES} bytes before its codec")
            if not self.layout.coded[block]:
                buffers.append(payload)
                continue
            if ranges is not None:
                self.store.check_ranges(block, ranges)
            elements = known[block].elements if ranges is None else sum(b - a for a, b in ranges)
            try:
                buffers.append(decode(push.codec, payload, elements, torch=torch).data.cast("B"))
            except ProtocolError as error:
                raise Misfit("shape", f"block {block}: {error.what}") from None
        return replace(push, codec=RAW, buffers=tuple(buffers))

    def _checked(self, push: Push, finite: bool = False, buffers: Buffers | None = None) -> list[_Update]:
        """`finite`: it was looked at before. What lies in shared memory its worker has looked at (SPEC §11.3)."""
        if not self.filled:
            raise Misfit("unfilled", "this shard has no weights yet; the update is lost")
        self.check(push)
        blocks, found = push.blocks, []
        if len(blocks) > 1 and any(a >= b for a, b in pairwise(blocks)):
            raise Misfit("shape", "blocks are not ascending")
        buffers = push.buffers if buffers is None else buffers
        for block, ranges, payload in zip(blocks, spans_of(push), buffers[bool(push.ranges) :], strict=True):
            if ranges is not None:
                self.store.check_ranges(block, ranges)
            gradient = self.store.tensor(block, payload, ranges, check=not (finite or push.region))
            numbers = push.hyper[self.store.group(block)] if push.hyper else ()
            found.append(_Update(block, gradient, ranges, numbers))
        return found


def spans_of(push: Push) -> list[list[tuple[int, int]] | None]:
    """The ranges of each block in a push; None for a whole block."""
    if not push.ranges:
        return [None] * len(push.blocks)
    buffer = push.buffers[0]
    if len(buffer) != 8 * sum(push.ranges):
        raise Misfit("shape", f"{len(buffer)} bytes of ranges, not {8 * sum(push.ranges)}")
    pairs = np.frombuffer(buffer, "<u4").reshape(-1, 2).tolist()
    spans: list[list[tuple[int, int]] | None] = []
    at = 0
    for count in push.ranges:
        spans.append([(start, stop) for start, stop in pairs[at : at + count]] if count else None)
        at += count
    return spans
