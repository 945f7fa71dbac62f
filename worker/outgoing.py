"""Where the parts of the worker's core put their effects, in order."""

from __future__ import annotations

from ..protocol.effects import Effect, Fail, Log, Open, Resolve, Send
from ..protocol.messages import Message
from ..protocol.records import Place


class Outgoing:
    """The effects of one `handle`. Ticket 0 means that nobody waits."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []

    def take(self) -> list[Effect]:
        """What has gathered; the next `handle` begins with nothing."""
        effects, self._effects = self._effects, []
        return effects

    def send(self, peer: int, message: Message) -> None:
        self._effects.append(Send(peer, message))

    def open(self, place: Place) -> None:
        self._effects.append(Open(place.index, place.host, place.port, place.key))

    def resolve(self, ticket: int, value: object) -> None:
        if ticket:
            self._effects.append(Resolve(ticket, value))

    def fail(self, ticket: int, error: Exception) -> None:
        if ticket:
            self._effects.append(Fail(ticket, error))

    def fail_all(self, tickets: list[int], error: Exception) -> None:
        """Fail every ticket of a waiting list, and empty it."""
        for ticket in tickets:
            self.fail(ticket, error)
        tickets.clear()

    def resolve_all(self, tickets: list[int], value: object) -> None:
        for ticket in tickets:
            self.resolve(ticket, value)
        tickets.clear()

    def note(self, level: str, text: str) -> None:
        self._effects.append(Log(level, text))
