"""A client's core: tasks go out, several in a message, and come back answered, each once (SPEC §16).

Rules
- `handle` is the only method that changes anything; no socket, no clock.
- A task is said until it is taken, and again after a broken connection until it is answered. The first answer counts.
- While two messages are not taken, what is submitted waits and goes together: a message for each would cost more than the tasks.
- At its deadline a task has failed here as well, whether or not anybody says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ..protocol.asking import Answer, Inquire
from ..protocol.effects import Effect, Fail, Received, Resolve, Send
from ..protocol.errors import ConfigError, QueueFull, ShoalError, TaskFailed
from ..protocol.messages import Message, Refused
from ..protocol.records import Place
from ..protocol.schema import Buffer
from ..protocol.tasking import (
    Answers,
    Asked,
    Busy,
    Chunk,
    Counted,
    Fetch,
    Governed,
    Heard,
    Published,
    Recollected,
    Submit,
    Taken,
    Told,
    Uploaded,
)
from .calls import Cancelled
from .finder import DISPATCHER, Finder

RETRY = 1.0
ASK_AGAIN = 30.0
"""Seconds after which a task that was taken is asked for again: its answer may have been lost."""
MOST = 512
"""Tasks in a message."""
MOST_BYTES = 8 * 1024 * 1024
WINDOW = 2
"""Messages that are not taken."""
HEAR = 0.05
"""Seconds in which answers are confirmed, many at once: a message for each costs the dispatcher as much as a task."""
GRACE = 1.0
"""Seconds after its deadline that a task's failure may take to come."""


@dataclass(frozen=True, slots=True)
class SubmitCalled:
    """`asked`: its number is given here."""

    ticket: int
    asked: Asked
    payload: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class AskCalled:
    """A request that is said until it is answered: `make(client, request)`."""

    ticket: int
    make: Callable[[int, int], Message]


@dataclass(frozen=True, slots=True)
class OpenCalled:
    """Answered when the dispatcher is there."""

    ticket: int


@dataclass(frozen=True, slots=True)
class HearCalled:
    """What was answered is to be confirmed now."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a task that was answered."""

    owner: int
    told: Told
    output: Buffer = field(repr=False)


@dataclass(slots=True)
class _Pending:
    ticket: int
    asked: Asked
    payload: Buffer
    said_at: float = -inf
    taken: bool = False


@dataclass(slots=True)
class _Asking:
    ticket: int
    message: Message
    said_at: float = -inf


class Submitter:
    """One client.

    Args:
        incarnation: random, never used twice: its tasks are known by it.
    """

    def __init__(self, coordinator: Place, incarnation: int) -> None:
        self.incarnation = incarnation
        self._finder = Finder(coordinator)
        self._last = 0
        self._pending: dict[int, _Pending] = {}
        self._numbers: dict[int, int] = {}
        """Of tasks, by ticket."""
        self._unsaid: list[int] = []
        self._under_way: list[set[int]] = []
        """Messages that are not taken yet: the numbers in each."""
        self._deadlines: list[tuple[float, int]] = []
        self._asking: dict[int, _Asking] = {}
        self._last_request = 0
        self._openers: list[int] = []
        self._look_at = inf
        self._heard: list[int] = []
        """Answers that are not confirmed yet."""
        self._hear_at = inf
        self._now = 0.0
        self._out: list[Effect] = []

    @property
    def wake_at(self) -> float:
        deadline = self._deadlines[0][0] if self._deadlines else inf
        look = self._look_at if self._pending or self._asking else inf
        return min(self._finder.wake_at, deadline, look, self._hear_at if self._finder.linked else inf)

    @property
    def waiting(self) -> int:
        """Tasks that are not answered."""
        return len(self._pending)

    @property
    def owes(self) -> bool:
        """Are there answers that it could confirm, and has not?"""
        return bool(self._heard) and self._finder.linked

    def handle(self, event: object, now: float) -> list[Effect]:
        self._out, self._now = [], now
        was = self._finder.linked
        if not isinstance(event, SubmitCalled):
            self._out += self._finder.handle(event, now)
        if self._finder.linked and not was:
            self._begin_again()
        if isinstance(event, Received):
            act = _ACTS.get(type(event.message))
            if act is not None and event.peer == DISPATCHER:
                act(self, event.message)
        else:
            call = _CALLS.get(type(event))
            if call is not None:
                call(self, event)
        self._pursue()
        return self._out

    def timed_out(self, seconds: float, now: float) -> Exception:
        return self._finder.timed_out(seconds, now, f"{len(self._pending)} tasks of this client are not answered")

    # --- what its owner says

    def _submit(self, call: SubmitCalled) -> None:
        self._last += 1
        asked = call.asked
        asked = Asked(
            self._last,
            asked.kind,
            asked.model,
            asked.items,
            asked.latency,
            asked.quality,
            asked.privacy,
            asked.budget,
            asked.deadline,
        )
        self._pending[self._last] = _Pending(call.ticket, asked, call.payload)
        self._numbers[call.ticket] = self._last
        self._unsaid.append(self._last)
        if asked.deadline < inf:
            heapq.heappush(self._deadlines, (self._now + asked.deadline + GRACE, self._last))
        if self._look_at == inf:
            self._look_at = self._now + RETRY

    def _ask(self, call: AskCalled) -> None:
        self._last_request += 1
        self._asking[self._last_request] = _Asking(call.ticket, call.make(self.incarnation, self._last_request))
        self._look_at = min(self._look_at, self._now + RETRY)

    def _open(self, call: OpenCalled) -> None:
        self._openers.append(call.ticket)

    def _cancelled(self, call: Cancelled) -> None:
        """Nobody waits for this any more; a task is done all the same, and its answer is confirmed."""
        number = self._numbers.pop(call.ticket, None)
        if number is not None:
            self._pending.pop(number, None)
            self._over((number,))
        for request in [each for each, asking in self._asking.items() if asking.ticket == call.ticket]:
            del self._asking[request]
        if call.ticket in self._openers:
            self._openers.remove(call.ticket)

    # --- what the dispatcher says

    def _taken(self, message: Taken) -> None:
        if message.client == self.incarnation:
            for number in message.numbers:
                pending = self._pending.get(number)
                if pending is not None:
                    pending.taken = True
            self._over(message.numbers)

    def _over(self, numbers: tuple[int, ...]) -> None:
        """These are on their way no more."""
        for said in self._under_way:
            said.difference_update(numbers)
        self._under_way = [said for said in self._under_way if said]

    def _busy(self, message: Busy) -> None:
        if message.client != self.incarnation:
            return
        for number in message.numbers:
            pending = self._pending.get(number)
            if pending is not None and not pending.taken:
                error = QueueFull(
                    "the dispatcher's queue is full",
                    retry_after=message.after,
                    hint=f"submit again in {message.after:.2g} s, or start more executors",
                )
                self._end(number, Fail(pending.ticket, error))
        self._over(message.numbers)

    def _answers(self, message: Answers) -> None:
        if message.client != self.incarnation:
            return
        for told, output in zip(message.answers, message.buffers, strict=True):
            pending = self._pending.get(told.number)
            if pending is None:
                continue
            if told.code:
                self._end(told.number, Fail(pending.ticket, TaskFailed(told.text)))
            else:
                self._end(told.number, Resolve(pending.ticket, Reply(self.incarnation, told, output)))
        numbers = tuple(told.number for told in message.answers)
        self._over(numbers)
        self._heard += numbers
        self._hear_at = min(self._hear_at, self._now + HEAR if len(self._heard) < MOST else self._now)

    def _hear(self, _: HearCalled) -> None:
        self._hear_at = self._now

    def _end(self, number: int, effect: Effect) -> None:
        pending = self._pending.pop(number)
        self._numbers.pop(pending.ticket, None)
        self._out.append(effect)

    def _answered(self, message: Counted | Uploaded | Published | Governed | Recollected) -> None:
        if message.client == self.incarnation:
            self._reply(message.request, message)

    def _fetched(self, message: Chunk) -> None:
        """Of weights, which are asked for by what they are."""
        for request, asking in list(self._asking.items()):
            asked = asking.message
            if isinstance(asked, Fetch) and (asked.weights, asked.offset) == (message.weights, message.offset):
                self._reply(request, message)

    def _told(self, message: Answer) -> None:
        self._reply(message.request, message)

    def _reply(self, request: int, message: Any) -> None:
        asking = self._asking.pop(request, None)
        if asking is not None:
            self._out.append(Resolve(asking.ticket, message))

    def _refused(self, message: Refused) -> None:
        asking = self._asking.pop(message.request, None)
        if asking is not None:
            self._out.append(Fail(asking.ticket, ConfigError(message.text)))

    # --- what is due

    def _begin_again(self) -> None:
        """What was on an earlier connection may be lost."""
        self._under_way.clear()
        self._unsaid = list(self._pending)
        for asking in self._asking.values():
            asking.said_at = -inf
        while self._openers:
            self._out.append(Resolve(self._openers.pop(), None))

    def _pursue(self) -> None:
        if self._finder.error is not None:
            self._fail_all(self._finder.error)
        while self._deadlines and self._deadlines[0][0] <= self._now:
            _, number = heapq.heappop(self._deadlines)
            pending = self._pending.get(number)
            if pending is not None:
                text = f"not done within {pending.asked.deadline:g} s, and the dispatcher does not say why"
                self._end(number, Fail(pending.ticket, TaskFailed(text, hint="shoal tasks ls")))
                self._over((number,))
        if not self._finder.linked:
            if self._now >= self._look_at:
                self._look_at = self._now + RETRY
            return
        if self._now >= self._look_at:
            self._look_at = self._now + RETRY
            self._look()
        while self._unsaid and len(self._under_way) < WINDOW:
            self._say()
        if self._now >= self._hear_at:
            self._hear_at = inf
            for start in range(0, len(self._heard), MOST):
                self._out.append(Send(DISPATCHER, Heard(self.incarnation, tuple(self._heard[start : start + MOST]))))
            self._heard = []
        for asking in self._asking.values():
            if self._now >= asking.said_at + RETRY:
                asking.said_at = self._now
                self._out.append(Send(DISPATCHER, asking.message))

    def _look(self) -> None:
        """What was said and not taken is said again, and after a while what was."""
        lost = [
            number
            for number, pending in self._pending.items()
            if pending.said_at > -inf and self._now - pending.said_at >= (ASK_AGAIN if pending.taken else RETRY)
        ]
        if lost:
            self._over(tuple(lost))
            self._unsaid = lost + [
                number for number in self._unsaid if number in self._pending and self._pending[number].said_at == -inf
            ]

    def _say(self) -> None:
        """One message of what waits."""
        chosen: list[_Pending] = []
        nbytes = at = 0
        for number in self._unsaid:
            pending = self._pending.get(number)
            if pending is not None:
                nbytes += len(pending.payload)
                if chosen and (len(chosen) == MOST or nbytes > MOST_BYTES):
                    break
                pending.said_at = self._now
                chosen.append(pending)
            at += 1
        del self._unsaid[:at]
        if chosen:
            self._under_way.append({pending.asked.number for pending in chosen if not pending.taken})
            self._under_way = [said for said in self._under_way if said]
            tasks, payloads = tuple(each.asked for each in chosen), tuple(each.payload for each in chosen)
            self._out.append(Send(DISPATCHER, Submit(self.incarnation, tasks, payloads)))

    def _fail_all(self, error: ShoalError | Exception) -> None:
        for number in list(self._pending):
            self._end(number, Fail(self._pending[number].ticket, error))
        for asking in self._asking.values():
            self._out.append(Fail(asking.ticket, error))
        self._asking.clear()
        while self._openers:
            self._out.append(Fail(self._openers.pop(), error))

    def check(self) -> None:
        """The invariants; tests call it after every event."""
        assert set(self._numbers.values()) <= set(self._pending)
        assert len(self._under_way) <= WINDOW
        assert all(said and said <= self._pending.keys() for said in self._under_way)


def inquiry(what: str) -> Callable[[int, int], Message]:
    """A question, for `AskCalled`."""
    return lambda _, request: Inquire(request, what)


_ACTS: dict[type[Any], Callable[[Submitter, Any], None]] = {
    Taken: Submitter._taken,
    Busy: Submitter._busy,
    Answers: Submitter._answers,
    Counted: Submitter._answered,
    Uploaded: Submitter._answered,
    Published: Submitter._answered,
    Governed: Submitter._answered,
    Recollected: Submitter._answered,
    Chunk: Submitter._fetched,
    Answer: Submitter._told,
    Refused: Submitter._refused,
}
_CALLS: dict[type[Any], Callable[[Submitter, Any], None]] = {
    SubmitCalled: Submitter._submit,
    AskCalled: Submitter._ask,
    OpenCalled: Submitter._open,
    HearCalled: Submitter._hear,
    Cancelled: Submitter._cancelled,
}
