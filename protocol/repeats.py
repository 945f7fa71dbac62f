"""Messages of a round that are sent again until they are noted (SPEC §14.2). Pure; both sides use it.

Rules
- To one receiver there is one message of a type at a time: a newer one takes the place of the older.
"""

from __future__ import annotations

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
    """What is not noted yet, by receiver and type."""

    def __init__(self) -> None:
        self._owed: dict[tuple[int, int], _Owed] = {}

    def __len__(self) -> int:
        return len(self._owed)

    def put(self, to: int, message: RoundMessage, now: float) -> RoundMessage:
        """Keep a message until it is noted. It is to be sent now."""
        self._owed[to, message.TYPE] = _Owed(message, now + EVERY)
        return message

    def noted(self, to: int, note: Noted) -> RoundMessage | None:
        """The message that this settles, if it was owed: one with another number is not."""
        owed = self._owed.get((to, note.kind))
        if owed is None or owed.message.session != note.session or number(owed.message) != note.number:
            return None
        del self._owed[to, note.kind]
        return owed.message

    def drop(self, condition: Callable[[int, RoundMessage], bool] = lambda to, message: True) -> None:
        """Forget what is owed to these, or all of it."""
        for key in [key for key, owed in self._owed.items() if condition(key[0], owed.message)]:
            del self._owed[key]

    def owed(self, to: int) -> bool:
        """Is anything not noted by this receiver?"""
        return any(receiver == to for receiver, _ in self._owed)

    def owes(self, kind: type[Any]) -> bool:
        """Is a message of this kind not noted yet, by anybody?"""
        return any(number == kind.TYPE for _, number in self._owed)

    def due(self, now: float) -> Iterator[tuple[int, RoundMessage]]:
        """What is to be sent again now."""
        for (to, _), owed in list(self._owed.items()):
            if owed.due <= now:
                owed.due = now + EVERY
                yield to, owed.message

    @property
    def wake_at(self) -> float:
        return min((owed.due for owed in self._owed.values()), default=inf)


def number(message: RoundMessage) -> int:
    """The message's own number; 0 if it has none."""
    return getattr(message, "number", 0)


def note(message: RoundMessage) -> Noted:
    """What its receiver answers."""
    return Noted(message.incarnation, message.session, message.TYPE, number(message))
