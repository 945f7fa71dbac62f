"""Messages of a round that are sent again until they are noted (SPEC §14.2). Pure; both sides use it.

Rules
- To one receiver there is one message of a type at a time: a newer one takes the place of the older.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from .rounds import Noted, RoundMessage

EVERY = 1.0
"""Seconds."""


@dataclass(slots=True)
class _Owed:
    message: RoundMessage
    due: float


class Repeats:
    """What is not noted yet, by receiver and type. What it costs does not grow with how much is owed, but once in `EVERY`."""

    def __init__(self) -> None:
        self._owed: dict[int, dict[int, _Owed]] = {}
        self._kinds: Counter[int] = Counter()
        self._next = inf
        """Nothing is due before."""

    def __len__(self) -> int:
        return self._kinds.total()

    def put(self, to: int, message: RoundMessage, now: float) -> RoundMessage:
        """Keep a message until it is noted. It is to be sent now."""
        theirs = self._owed.setdefault(to, {})
        self._kinds[message.TYPE] += message.TYPE not in theirs
        theirs[message.TYPE] = _Owed(message, now + EVERY)
        self._next = min(self._next, now + EVERY)
        return message

    def noted(self, to: int, note: Noted) -> RoundMessage | None:
        """The message that this settles, if it was owed: one with another number is not."""
        owed = self._owed.get(to, {}).get(note.kind)
        if owed is None or owed.message.session != note.session or number(owed.message) != note.number:
            return None
        self._settle(to, note.kind)
        return owed.message

    def _settle(self, to: int, kind: int) -> None:
        del self._owed[to][kind]
        self._kinds[kind] -= 1
        if not self._owed[to]:
            del self._owed[to]

    def drop(self, condition: Callable[[RoundMessage], bool] = lambda message: True) -> None:
        """Forget what is owed of these, or all of it."""
        for to, kind in [
            (to, k) for to, theirs in self._owed.items() for k, o in theirs.items() if condition(o.message)
        ]:
            self._settle(to, kind)

    def forget(self, to: int) -> None:
        """Whoever it is, it is told nothing more."""
        for kind in list(self._owed.get(to, ())):
            self._settle(to, kind)

    def owed(self, to: int) -> bool:
        """Is anything not noted by this receiver?"""
        return to in self._owed

    def owes(self, kind: type[Any]) -> bool:
        """Is a message of this kind not noted yet, by anybody?"""
        return self._kinds[kind.TYPE] > 0

    def due(self, now: float) -> Iterator[tuple[int, RoundMessage]]:
        """What is to be sent again now."""
        if now < self._next:
            return
        late = [(to, owed) for to, theirs in self._owed.items() for owed in theirs.values() if owed.due <= now]
        for _, owed in late:
            owed.due = now + EVERY
        self._next = min((owed.due for theirs in self._owed.values() for owed in theirs.values()), default=inf)
        for to, owed in late:
            yield to, owed.message

    @property
    def wake_at(self) -> float:
        """When to look next; nothing need be due then."""
        return self._next if self._owed else inf


def number(message: RoundMessage) -> int:
    """The message's own number; 0 if it has none."""
    return getattr(message, "number", 0)


def note(message: RoundMessage) -> Noted:
    """What its receiver answers."""
    return Noted(message.incarnation, message.session, message.TYPE, number(message))
