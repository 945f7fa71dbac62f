"""An executor's core: it holds the versions that it is told to, and hands work to whoever runs it (SPEC §16).

Rules
- `handle` is the only method that changes anything; no socket, no clock, no model: what a version is of is the caller's to know.
- A version is offered as loaded when the caller has said so, and answered with from then on; before that it is nobody's.
- Each batch has one outcome, which is said until it is settled. What is at work is never dropped.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..protocol.effects import Effect, Fail, Log, Received, Resolve, Send
from ..protocol.errors import ConfigError, ShoalError
from ..protocol.records import Place
from ..protocol.schema import Buffer
from ..protocol.tasking import Chunk, Done, Fetch, Load, Offer, Retire, Settled, Work
from ..tasks.card import Card
from .calls import Cancelled
from .finder import DISPATCHER, Finder

OFFER_EVERY = 1.0
RETRY = 1.0
MOST_FAILED = 64


# --- what is asked of it


@dataclass(frozen=True, slots=True)
class NextCalled:
    """Who runs the models wants the next thing to do: a `Version`, a `Job` or a `Gone`."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A version is in memory, whole."""

    identity: str


@dataclass(frozen=True, slots=True)
class Unable:
    """A version cannot be used, and why."""

    identity: str
    why: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch is done: of each task an error or an output."""

    batch: int
    seconds: float
    errors: tuple[str, ...]
    outputs: tuple[Buffer, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class StopCalled:
    """Nothing more is to be done here."""

    ticket: int


@dataclass(frozen=True, slots=True)
class OpenCalled:
    """Answered when the dispatcher knows of this executor."""

    ticket: int


# --- what it answers


@dataclass(frozen=True, slots=True)
class Version:
    """A version has come: its safetensors file, whose SHA-256 is right. `Ready` or `Unable` is to be said of it."""

    card: Card
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Gone:
    """A version is not needed any more."""

    identity: str


@dataclass(frozen=True, slots=True)
class Job:
    """Tasks to be done with a version."""

    batch: int
    identity: str
    items: tuple[int, ...]
    payloads: tuple[Buffer, ...] = field(repr=False)


class Ended(ShoalError):
    """The executor was stopped."""


@dataclass(slots=True)
class _Coming:
    card: Card
    data: bytearray = field(default_factory=bytearray)
    asked_at: float = -inf
    handed: bool = False


class Executor:
    """One executor.

    Args:
        incarnation: random, never used twice. models: names of those that it serves.
        data: labels of the data that it may see; None: what its versions may see.
        memory: bytes that all versions together may take.
    """

    def __init__(
        self,
        coordinator: Place,
        incarnation: int,
        name: str,
        models: Collection[str],
        data: Collection[str] | None = None,
        price: float = 1.0,
        memory: float = inf,
    ) -> None:
        self.incarnation, self.name = incarnation, name
        self._who = tuple(models), data is None, tuple(data or ()), price
        self._memory = float(memory)
        self._finder = Finder(coordinator)
        self._coming: dict[str, _Coming] = {}
        self._ready: dict[str, Card] = {}
        self._failed: dict[str, str] = {}
        self._wanted: frozenset[str] = frozenset()
        self._gone: deque[str] = deque()
        self._queue: deque[Work] = deque()
        self._at_work: dict[int, Work] = {}
        self._done: dict[int, Done] = {}
        self._nexts: deque[int] = deque()
        self._openers: list[int] = []
        self._offer_at = -inf
        self._repeat_at = inf
        self._stopped = False
        self._now = 0.0
        self._out: list[Effect] = []

    @property
    def loaded(self) -> tuple[str, ...]:
        """Identities of the versions that it answers with."""
        return tuple(self._ready)

    @property
    def wake_at(self) -> float:
        if self._stopped:
            return inf
        if not self._finder.linked:
            return self._finder.wake_at
        coming = self._fetching
        fetch = coming.asked_at + RETRY if coming else inf
        return min(self._offer_at, fetch, self._repeat_at if self._done else inf)

    def handle(self, event: object, now: float) -> list[Effect]:
        self._out, self._now = [], now
        if self._stopped:
            return self._after_the_end(event)
        was = self._finder.linked
        self._out += self._finder.handle(event, now)
        if self._finder.linked and not was:
            self._offer_at = -inf
        if isinstance(event, Received):
            act = _ACTS.get(type(event.message))
            if act is not None and event.peer == DISPATCHER and event.message.executor == self.incarnation:  # type: ignore[union-attr]
                act(self, event.message)
        else:
            call = _CALLS.get(type(event))
            if call is not None:
                call(self, event)
        if not self._stopped:
            self._pursue()
        return self._out

    def timed_out(self, seconds: float, now: float) -> Exception:
        return self._finder.timed_out(seconds, now, "the dispatcher has not answered")

    # --- what the dispatcher says

    def _load(self, message: Load) -> None:
        self._wanted = frozenset(message.identities)
        self._resolve_openers()
        for identity, buffer in zip(message.identities, message.buffers, strict=True):
            if identity in self._ready or identity in self._coming or identity in self._failed:
                continue
            try:
                card = Card.unpack(bytes(buffer))
            except ConfigError as error:
                self._unable(identity, error.what)
                continue
            if card.identity != identity:
                self._unable(identity, "its card is another version's")
                continue
            needs = max(card.cost.memory, card.size)
            if needs > self._free:
                self._unable(identity, f"it needs {needs} bytes, and {max(0.0, self._free):.0f} are free")
                continue
            self._coming[identity] = _Coming(card)
        self._drop()

    @property
    def _free(self) -> float:
        held = [*self._ready.values(), *(each.card for each in self._coming.values())]
        return self._memory - sum(max(card.cost.memory, card.size) for card in held)

    def _drop(self) -> None:
        """What is not wanted any more and has no work."""
        busy = {work.identity for work in (*self._queue, *self._at_work.values())}
        for identity in [each for each in self._ready if each not in self._wanted and each not in busy]:
            del self._ready[identity]
            self._gone.append(identity)
            self._offer_at = -inf
        for identity in [
            each for each, coming in self._coming.items() if each not in self._wanted and not coming.handed
        ]:
            del self._coming[identity]

    def _chunk(self, message: Chunk) -> None:
        coming = next((each for each in self._coming.values() if each.card.weights == message.weights), None)
        if coming is None or coming.handed or message.offset != len(coming.data):
            return
        if message.total != coming.card.size or len(coming.data) + len(message.buffers[0]) > coming.card.size:
            return self._spoil(coming, "the weights that came are longer than its card says")
        coming.data += message.buffers[0]
        coming.asked_at = -inf
        if len(coming.data) < coming.card.size:
            return
        if hashlib.sha256(coming.data).hexdigest() != coming.card.weights:
            return self._spoil(coming, "the weights that came have another SHA-256")

    def _spoil(self, coming: _Coming, why: str) -> None:
        del self._coming[coming.card.identity]
        self._unable(coming.card.identity, why)

    def _unable(self, identity: str, why: str) -> None:
        self._failed[identity] = why[:4096]
        while len(self._failed) > MOST_FAILED:
            del self._failed[next(iter(self._failed))]
        self._out.append(Log("warning", f"version {identity[:12]} cannot be served here: {why}"))
        self._offer_at = -inf

    def _work(self, work: Work) -> None:
        known = work.batch in self._at_work or any(other.batch == work.batch for other in self._queue)
        if known or work.batch in self._done:
            return
        if work.identity not in self._ready:
            return self._say(Done(self.incarnation, work.batch, 0.0, (), ()))
        self._queue.append(work)

    def _settled(self, message: Settled) -> None:
        self._done.pop(message.batch, None)

    # --- what its owner says

    def _next(self, call: NextCalled) -> None:
        self._nexts.append(call.ticket)

    def _open(self, call: OpenCalled) -> None:
        self._openers.append(call.ticket)

    def _resolve_openers(self) -> None:
        while self._openers:
            self._out.append(Resolve(self._openers.pop(), None))

    def _is_ready(self, call: Ready) -> None:
        coming = self._coming.pop(call.identity, None)
        if coming is not None:
            self._ready[call.identity] = coming.card
            self._offer_at = -inf
            self._drop()

    def _is_unable(self, call: Unable) -> None:
        if self._coming.pop(call.identity, None) is not None:
            self._unable(call.identity, call.why)

    def _finished(self, call: Finished) -> None:
        if self._at_work.pop(call.batch, None) is not None:
            self._say(Done(self.incarnation, call.batch, call.seconds, call.errors, call.outputs))
            self._drop()

    def _say(self, done: Done) -> None:
        self._done[done.batch] = done
        self._repeat_at = min(self._repeat_at, self._now + RETRY)
        self._out.append(Send(DISPATCHER, done))

    def _cancelled(self, call: Cancelled) -> None:
        if call.ticket in self._nexts:
            self._nexts.remove(call.ticket)
        if call.ticket in self._openers:
            self._openers.remove(call.ticket)

    def _stop(self, call: StopCalled) -> None:
        self._stopped = True
        self._out.append(Send(DISPATCHER, Retire(self.incarnation)))
        for ticket in (*self._nexts, *self._openers):
            self._out.append(Fail(ticket, Ended("this executor was stopped")))
        self._nexts.clear()
        self._openers.clear()
        self._out.append(Resolve(call.ticket, None))

    def _after_the_end(self, event: object) -> list[Effect]:
        if isinstance(event, NextCalled | OpenCalled):
            return [Fail(event.ticket, Ended("this executor was stopped"))]
        return [Resolve(event.ticket, None)] if isinstance(event, StopCalled) else []

    # --- what is due

    def _pursue(self) -> None:
        if self._finder.error is not None:
            for ticket in (*self._openers, *self._nexts):
                self._out.append(Fail(ticket, self._finder.error))
            self._openers.clear()
            self._nexts.clear()
        if self._finder.linked:
            self._fetch()
            if self._done and self._now >= self._repeat_at:
                self._repeat_at = self._now + RETRY
                self._out += [Send(DISPATCHER, done) for done in self._done.values()]
        self._hand_on()
        if self._finder.linked and self._now >= self._offer_at:
            self._offer_at = self._now + OFFER_EVERY
            models, open_, data, price = self._who
            batches = [work.batch for work in self._queue] + [*self._at_work, *self._done]
            state = tuple(self._ready), tuple(self._failed.items()), tuple(batches[:1024])
            offer = Offer(self.incarnation, self.name, models, open_, data, price, max(0.0, self._free), *state)
            self._out.append(Send(DISPATCHER, offer))

    @property
    def _fetching(self) -> _Coming | None:
        """One at a time."""
        whole = (each for each in self._coming.values() if not each.handed and len(each.data) < each.card.size)
        return next(whole, None)

    def _fetch(self) -> None:
        coming = self._fetching
        if coming is not None and self._now >= coming.asked_at + RETRY:
            coming.asked_at = self._now
            self._out.append(Send(DISPATCHER, Fetch(self.incarnation, coming.card.weights, len(coming.data))))

    def _hand_on(self) -> None:
        while self._nexts:
            found = self._thing()
            if found is None:
                return
            self._out.append(Resolve(self._nexts.popleft(), found))

    def _thing(self) -> Version | Gone | Job | None:
        if self._gone:
            return Gone(self._gone.popleft())
        for coming in self._coming.values():
            if not coming.handed and len(coming.data) == coming.card.size:
                coming.handed, data = True, bytes(coming.data)
                coming.data = bytearray()
                return Version(coming.card, data)
        if self._queue:
            work = self._queue.popleft()
            self._at_work[work.batch] = work
            return Job(work.batch, work.identity, work.items, work.buffers)
        return None

    def check(self) -> None:
        """The invariants; tests call it after every event."""
        assert not set(self._ready) & set(self._coming)
        assert all(work.identity in self._ready for work in (*self._queue, *self._at_work.values()))


_ACTS: dict[type[Any], Callable[[Executor, Any], None]] = {
    Load: Executor._load,
    Chunk: Executor._chunk,
    Work: Executor._work,
    Settled: Executor._settled,
}
_CALLS: dict[type[Any], Callable[[Executor, Any], None]] = {
    NextCalled: Executor._next,
    OpenCalled: Executor._open,
    Ready: Executor._is_ready,
    Unable: Executor._is_unable,
    Finished: Executor._finished,
    StopCalled: Executor._stop,
    Cancelled: Executor._cancelled,
}
