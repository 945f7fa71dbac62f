"""A model's values and gradients on their way: the cache that pulls bring up to date, the vectors that pushes are gathered in,
and the memory that both lie in (SPEC §11).

Rules
- Memory is shared with the shards that can open it; for the others the same vectors travel as bytes. Nobody else need know.
- What a shard may still read or write is never used for anything else: it is given up instead.
- One pull at a time: an older answer must not overwrite a newer one, and nobody reads the cache meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from ..protocol.codecs import RAW, Codec
from ..protocol.errors import ConfigError, ServerLost, ShoalError, WaitTimeout
from ..protocol.layout import Layout
from . import calls
from .arrays import Array, Cache, Gather, Template, bits
from .calls import Part
from .encoder import Encoder
from .loop import Loop, Ticket
from .region import Region
from .stats import Stats

logger = logging.getLogger("shoal")

TRANSPORTS = ("auto", "shm", "tcp")
SHARING_TIMEOUT = 2.0
"""Seconds for shards to open a region. What they have not opened by then travels as bytes."""
MOST_IN_FLIGHT = 256 * 1024 * 1024
"""Bytes pushed and not acknowledged over which a push waits for the oldest."""

MOST_REGIONS = 4
"""Regions for pushes under way. What more there is travels as bytes: a shard takes so many, and descriptors are few."""


class Exchange:
    """Belongs to one worker.

    Args:
        transport: `auto`, `tcp` (share nothing) or `shm` (share with every shard, or refuse).
        push_codec, pull_codec: what travels as bytes is in these (SPEC §12).

    Raises:
        ConfigError: another transport.
    """

    def __init__(self, loop: Loop, stats: Stats, transport: str, push_codec: Codec, pull_codec: Codec) -> None:
        if transport not in TRANSPORTS:
            raise ConfigError(f"SHOAL_TRANSPORT is {transport!r}", hint=f"one of {', '.join(TRANSPORTS)}")
        self._loop, self._stats, self._transport = loop, stats, transport
        self._push_codec, self._pull_codec = push_codec, pull_codec
        self._encoder: Encoder | None = None
        self._near: frozenset[int] = frozenset()
        """The shards that share memory."""
        self.cache: Cache | None = None
        self._spare: Cache | None = None
        """What `prefetch` brings up to date; then the two change places."""
        self._coming: Ticket | None = None
        self.templates: dict[str, Template] = {}
        self.gathers: deque[tuple[Ticket, Gather]] = deque()
        """Those that were pushed, oldest first, with the push."""
        self.lent: Gather | None = None
        """The vectors that the caller may be writing its next gradients to."""
        self._cache_lock = threading.Lock()
        self._fetch_lock = threading.RLock()
        self._gather_lock = threading.Lock()
        self._encoder_lock = threading.Lock()
        self._sharing = transport != "tcp"
        self._exact = False

    # --- registering

    def begin(self, layout: Layout, first: dict[str, Array]) -> Cache:
        """Make the cache, of first values; again changes nothing. Called by the loop if this worker is to fill a shard."""
        with self._cache_lock:
            if self.cache is None:
                cache = Cache(layout, self._region(layout))
                for name, array in first.items():
                    cache.set(name, array)
                first.clear()
                self.cache = cache
                if self._push_codec.number != RAW:
                    self._encoder = Encoder(self._push_codec, layout)
            return self.cache

    def registered(self, templates: dict[str, Template]) -> None:
        """The servers have the model: now they can be offered memory.

        Raises:
            ConfigError: all must share memory, and one does not.
        """
        assert self.cache is not None
        self.templates = templates
        if self.cache.region is None:
            return
        refusals = self._offer(self.cache.region)
        self._near = frozenset(shard for shard, why in refusals.items() if not why)
        if not self._near:
            self._sharing = False
        if self._transport == "shm" and any(refusals.values()):
            shard, why = next((shard, why) for shard, why in refusals.items() if why)
            raise ConfigError(f"SHOAL_TRANSPORT is shm, and shard {shard} does not share memory: {why}")

    def _region(self, layout: Layout) -> Region | None:
        if not self._sharing:
            return None
        try:
            return Region(layout)
        except (OSError, AttributeError) as error:  # AttributeError: a system without memory files
            self._sharing = False
            if self._transport == "shm":
                raise ConfigError(f"SHOAL_TRANSPORT is shm, and memory cannot be shared: {error}") from None
            logger.info("memory is not shared with servers of this machine: %s", error)
            return None

    def _offer(self, region: Region, timeout: float = SHARING_TIMEOUT) -> dict[int, str]:
        """Offer a region to the shards, from now on. Returns, by shard, why it does not share it."""
        ticket = self._loop.call(calls.ShareCalled, region.number, os.getpid(), region.fd, region.size, region.token)
        try:
            refusals: dict[int, str] = ticket.result(timeout)
        except (WaitTimeout, ServerLost) as error:
            self._loop.tell(calls.Cancelled(ticket.number))
            return {-1: error.what}
        return refusals

    def _retire(self, region: Region | None) -> None:
        """A shard may still use it; we do not."""
        if region is not None:
            region.close()
            if self._loop.usable:
                self._loop.tell(calls.UnshareCalled(region.number))

    def close(self) -> None:
        """Nothing is offered any more. What the caller holds views of stays."""
        held = [self.lent, *(gather for _, gather in self.gathers)]
        for owner in (self.cache, self._spare, *held):
            if owner is not None and owner.region is not None:
                owner.region.close()
        self.gathers.clear()
        self.lent = None

    @property
    def remote(self) -> frozenset[int]:
        """The shards to which gradients travel as they are: what is encoded is encoded whole, at the end of a step."""
        if self.cache is None or self._encoder is not None:
            return frozenset()
        return frozenset(self.cache.shards()) - self._near

    # --- pulling

    @contextlib.contextmanager
    def fetched(self, names: Iterable[str] | None, timeout: float | None) -> Iterator[Cache]:
        """The cache, brought up to date for these names (None: all). Nobody else pulls while it is read.

        Raises:
            WaitTimeout, ServerLost, WorkerEvicted: as `Worker.pull`.
        """
        started = time.perf_counter()
        with self._fetching(timeout):
            self._put_in_place(timeout)
            cache = self.cache
            assert cache is not None
            pulled = self._pulled(self._ask(cache, names), cache, timeout)
            waited = time.perf_counter()
            if names is None:
                cache.held.update(pulled.versions)
            self._stats.seconds["pull"] += waited - started
            yield cache
            self._stats.seconds["apply"] += time.perf_counter() - waited

    def be_exact(self, exact: bool = True) -> None:
        """Values are wanted as the shards have them, in no codec."""
        if exact and not self._exact and self._pull_codec.number != RAW and self.cache is not None:
            self.cache.held.clear()
        self._exact = exact

    def prefetch(self) -> None:
        """Ask for all values. They come to another cache while the caller goes on; `arrive` puts that in the place of this one."""
        with self._fetching(None):
            self._put_in_place(None)
            assert self.cache is not None
            if self._spare is None:
                self._spare = Cache(self.cache.layout, self._region(self.cache.layout))
                if self._spare.region is not None:
                    self._offer(self._spare.region)
            self._coming = self._ask(self._spare, None)

    def arrive(self, timeout: float | None) -> None:
        """What was asked for ahead is the cache now, if anything was. Waits for it; raises as `fetched`."""
        started = time.perf_counter()
        with self._fetching(timeout):
            self._put_in_place(timeout)
        self._stats.seconds["pull"] += time.perf_counter() - started

    @contextlib.contextmanager
    def _fetching(self, timeout: float | None) -> Iterator[None]:
        if not self._fetch_lock.acquire(timeout=self._loop.patience(timeout)):
            raise WaitTimeout("another thread's pull is not done", hint="a longer timeout")
        try:
            yield
        finally:
            self._fetch_lock.release()

    def _ask(self, cache: Cache, names: Iterable[str] | None) -> Ticket:
        region, codec = cache.region.number if cache.region else 0, RAW if self._exact else self._pull_codec.number
        return self._loop.call(calls.PullCalled, cache.shards(names), dict(cache.held), region, cache.load, codec)

    def _pulled(self, ticket: Ticket, cache: Cache, timeout: float | None) -> calls.Pulled:
        try:
            pulled: calls.Pulled = self._loop.result(ticket, timeout)
        except BaseException:
            self._move(cache)
            raise
        return pulled

    def _put_in_place(self, timeout: float | None) -> None:
        ticket, self._coming = self._coming, None
        if ticket is not None and self._spare is not None:
            self._spare.held.update(self._pulled(ticket, self._spare, timeout).versions)
            self.cache, self._spare = self._spare, self.cache

    def _move(self, cache: Cache) -> None:
        """A pull has failed; its answer may yet be written."""
        if cache.region is not None and self._loop.usable:
            with contextlib.suppress(ShoalError):
                self._retire(cache.move(self._region(cache.layout)))
                if cache.region is not None:
                    self._offer(cache.region, 0.0)

    # --- pushing

    def lend(self, timeout: float | None) -> Mapping[str, Array]:
        """Arrays to write the next gradients to."""
        with self._gather_lock:
            if self.lent is None:
                self.lent = self._free(timeout)
            return self.lent.view(self.templates)

    def gather(self, arrays: Mapping[str, Array], timeout: float | None) -> Gather:
        """Vectors to gather `arrays` in: those that they lie in already, if any were lent."""
        with self._gather_lock:
            lent = self.lent
            if lent is not None:
                views = lent.views
                if arrays is views or any(views.get(name) is array for name, array in arrays.items()):
                    self.lent = None
                    return lent
            return self._free(timeout)

    def send_early(self, blocks: Iterable[int]) -> None:
        """Blocks of the lent vectors, of a step that is not over. What goes wrong is told when it ends."""
        assert self.lent is not None
        with contextlib.suppress(ShoalError):
            self._loop.tell(calls.EarlyCalled(self.lent.whole(blocks), self.lent.number))
            self._loop.glance()

    def parts(self, gather: Gather, incarnation: int) -> tuple[Part, ...]:
        """What was put in, as messages to shards, for this life of the worker: encoded where it travels."""
        parts = gather.parts()
        if self._encoder is None:
            return parts
        with self._encoder_lock:
            return self._encoder.encode(parts, self._near if gather.region else (), incarnation, gather.encoded)

    def _free(self, timeout: float | None) -> Gather:
        """Vectors that no unacknowledged push needs; waits if too much is under way."""
        assert self.cache is not None
        in_flight = [gather.nbytes for ticket, gather in list(self.gathers) if not ticket.over]
        if len(in_flight) >= 2 and sum(in_flight) > MOST_IN_FLIGHT:
            with contextlib.suppress(ShoalError):  # the ticket's owner is told
                self._loop.wait(self.gathers[0][0], timeout)
        while self.gathers and self.gathers[0][0].over:
            ticket, gather = self.gathers.popleft()
            if not ticket.failed:
                return gather
            self._retire(gather.region)  # it may wait in a stream, to be sent when the shard is back
        if sum(gather.region is not None for _, gather in self.gathers) >= MOST_REGIONS:
            return Gather(self.cache)
        region = self._region(self.cache.layout)
        if region is not None:
            self._offer(region)
        return Gather(self.cache, region)


def first_values(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Copies, as the caller may go on with its own."""
    return {name: bits(array).copy() for name, array in arrays.items()}
