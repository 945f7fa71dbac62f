"""The regions that workers of this machine share with a shard: which there are, reading from them, writing to them (SPEC §11).

Rules
- A region belongs to one life of a worker, and goes with it.
- A pull is written once. Its answer is remembered, so that a repeated request changes nothing that its worker may be reading.
"""

from __future__ import annotations

import numpy as np

from ..protocol.codecs import RAW
from ..protocol.effects import Attach, Attached, Peer, Send
from ..protocol.layout import Layout
from ..protocol.messages import Pull, Push, Share, Shared, Values
from ..protocol.regions import TOKEN_BYTES
from ..protocol.schema import Buffer, Buffers
from .store import Misfit
from .weights import Weights, spans_of

MAX_REGIONS = 16
"""Regions of one worker."""


class SharedMemory:
    """Regions by the incarnation of their worker and their number."""

    def __init__(self) -> None:
        self._regions: dict[int, dict[int, memoryview]] = {}
        self._said: dict[int, Values] = {}

    def region(self, incarnation: int, number: int) -> memoryview | None:
        """The region's memory, if it is shared."""
        return self._regions.get(incarnation, {}).get(number)

    def offered(self, peer: Peer, offer: Share, shard: int, layout: Layout) -> Send | Attach:
        """What to do about an offer: refuse it, say again that it was taken, or try the file.

        Args:
            shard: its incarnation.
        """
        if self.region(offer.incarnation, offer.region) is not None:
            return Send(peer, Shared(offer.incarnation, shard, offer.region, True, ""))
        why = ""
        if not offer.region or offer.size != layout.plan.size or len(offer.buffers[0]) != TOKEN_BYTES:
            why = "it is not a region for this model"
        elif len(self._regions.get(offer.incarnation, {})) >= MAX_REGIONS:
            why = f"{MAX_REGIONS} regions of this worker are shared"
        return Send(peer, Shared(offer.incarnation, shard, offer.region, False, why)) if why else Attach(peer, offer)

    def attached(self, event: Attached, shard: int, known: bool) -> Send:
        """The file was tried. `known`: is its worker still here?"""
        offer = event.offer
        if event.memory is not None and known:
            self._regions.setdefault(offer.incarnation, {})[offer.region] = event.memory
        accepted = event.memory is not None
        return Send(event.peer, Shared(offer.incarnation, shard, offer.region, accepted, event.why[:256]))

    def drop(self, incarnation: int, number: int | None = None) -> None:
        """Forget one region, or all of this life."""
        if number is not None:
            self._regions.get(incarnation, {}).pop(number, None)
        else:
            self._regions.pop(incarnation, None)
            self._said.pop(incarnation, None)

    # --- pushes

    def brought_in(self, push: Push, weights: Weights, copy: bool) -> Buffers:
        """The buffers of a push out of a region, as if they had come with it: views of the region, or copies.

        Raises:
            Misfit: there is no such region, block or range.
        """
        memory = self.region(push.incarnation, push.region)
        if memory is None:
            raise Misfit("shape", f"region {push.region} is not shared")
        buffers: list[Buffer] = list(push.buffers)
        for block, ranges in zip(push.blocks, spans_of(push), strict=True):
            if block not in weights.store:
                raise Misfit("shape", f"block {block} is not on this shard")
            start, stop = weights.layout.plan.blocks[block]
            whole = memory[start:stop]
            if ranges is not None:
                weights.store.check_ranges(block, ranges)
                size = weights.layout.blocks[block].itemsize
                buffers.append(b"".join(whole[a * size : b * size] for a, b in ranges))
            else:
                buffers.append(np.array(whole).data if copy else whole)
        return tuple(buffers)

    # --- pulls

    def answer(self, pull: Pull, shard: int, weights: Weights, min_clock: int) -> Values | None:
        """Write what has changed to the region that the pull names; None if that is not shared.

        Args:
            shard: its incarnation.
        """
        memory = self.region(pull.incarnation, pull.region)
        if memory is None:
            return None
        before = self._said.get(pull.incarnation)
        if before is not None and before.request >= pull.request:
            return before
        store = weights.store
        blocks = tuple(store.changed_since(pull.since, pull.blocks))
        for block in blocks:
            start, stop = weights.layout.plan.blocks[block]
            store.copy_into(block, memory[start:stop])
        head = (pull.incarnation, shard, pull.request, 0, 1, store.version, min_clock, pull.region, RAW)
        said = Values(*head, blocks, ())
        self._said[pull.incarnation] = said
        return said
