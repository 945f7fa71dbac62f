"""A worker's requests to the coordinator: numbered, repeated until answered, carried over to a new incarnation (SPEC §7).

Rules
- A request keeps its number while it is repeated; under a new incarnation it gets a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from ..protocol.evaluating import Apportioned, Assessed, Reviewed
from ..protocol.messages import Complete, Completed, Declare, Declared, Exhausted, Leased, Left, Message, Registered
from .calls import DeclareCalled

RETRY = 1.0
ANSWERS = frozenset({Registered, Declared, Leased, Exhausted, Completed, Left, Assessed, Apportioned, Reviewed})
"""What the coordinator says to requests, beside refusals."""


@dataclass(slots=True)
class Ask:
    """A request that is under way. `make(incarnation, request)` writes it."""

    ticket: int
    make: Callable[[int, int], Message]
    lasting: bool
    """Does it mean the same under a new incarnation?"""
    idle: bool = False
    """Has the worker nothing to do until it is answered?"""
    job: str = ""
    """The data set that it is about."""
    sent_at: float = -inf
    sent: int = 0


class Desk:
    """The requests under way, by number."""

    def __init__(self) -> None:
        self._asks: dict[int, Ask] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._asks)

    def add(self, ask: Ask) -> int:
        self._last += 1
        self._asks[self._last] = ask
        return self._last

    def add_first(self, ask: Ask) -> None:
        """A request that the others rest on."""
        others, self._asks = self._asks, {}
        self.add(ask)
        self._asks |= others

    def get(self, request: int) -> Ask | None:
        return self._asks.get(request)

    def answered(self, request: int) -> Ask | None:
        """The request has its answer; None if it had one before."""
        return self._asks.pop(request, None)

    def due(self, incarnation: int, now: float) -> list[Message]:
        """What is to be sent now, for the first time or again."""
        found = []
        for request, ask in self._asks.items():
            if now - ask.sent_at >= RETRY:
                ask.sent_at = now
                ask.sent += 1
                found.append(ask.make(incarnation, request))
        return found

    def hurry(self) -> None:
        """The connection was made anew: send everything again."""
        for ask in self._asks.values():
            ask.sent_at = -inf

    def carry_over(self) -> list[Ask]:
        """A new incarnation begins. Returns what was dropped."""
        asks, self._asks = list(self._asks.values()), {}
        for ask in asks:
            if ask.lasting:
                ask.sent_at, ask.sent = -inf, 0
                self.add(ask)
        return [ask for ask in asks if not ask.lasting]

    def drop(self, ticket: int) -> None:
        """Nobody waits for this ticket any more."""
        for request in [r for r, ask in self._asks.items() if ask.ticket == ticket]:
            del self._asks[request]

    def tickets(self) -> list[int]:
        return [ask.ticket for ask in self._asks.values() if ask.ticket]


def declaration(call: DeclareCalled, ticket: int) -> Ask:
    """Of a data set."""

    def make(incarnation: int, request: int) -> Message:
        return Declare(incarnation, request, call.job, call.length, call.batch, call.size, call.seed, call.epoch)

    return Ask(ticket, make, lasting=True)


def completion(lease: int, done: int) -> Ask:
    """So much of a lease is done, and no more will be."""
    return Ask(0, lambda incarnation, request: Complete(incarnation, request, lease, done), lasting=False)


def value_of(answer: Message) -> object:
    """What an answer says to whoever has asked."""
    if isinstance(answer, Declared):
        return answer.size
    return None if isinstance(answer, Exhausted | Completed) else answer
