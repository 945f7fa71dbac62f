"""Messages of a round that are sent again until they are noted (SPEC §14.2). Pure; both sides use it.

Rules
- To one receiver there is one message of a type at a time: a newer one takes the place of the older.
- What an answer says need not be noted: a note waits a little, and is not sent if the answer is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from .rounds import (
    Advertise,
    Arrived,
    Consent,
    Consents,
    Deal,
    Finish,
    Finished,
    Invite,
    Measure,
    Measured,
    Noted,
    Recall,
    Recalled,
    Relay,
    Roster,
    RoundMessage,
    Ruling,
    Survivors,
    Unmask,
)

EVERY = 1.0
"""Seconds from one copy to the next."""
WAIT = 0.25
"""Seconds for which a note may wait for the answer that says the same."""
ANSWERS: dict[type[Any], tuple[type[Any], ...]] = {
    Advertise: (Invite,),
    Roster: (Advertise,),
    Deal: (Roster,),
    Relay: (Deal,),
    Consent: (Survivors, Relay),
    Consents: (Consent,),
    Unmask: (Survivors, Consents, Relay),
    Recalled: (Recall,),
    Measured: (Measure,),
    Ruling: (Arrived,),
    Finished: (Finish,),
}
"""What a message notes, of the same session."""


@dataclass(slots=True)
class _Owed:
    message: RoundMessage
    due: float


class Repeats:
    """What is not noted yet, by receiver and type. What it costs does not grow with how much is owed, but once in `EVERY`."""

    def __init__(self) -> None:
        self._owed: dict[int, dict[int, _Owed]] = {}
        self._kinds: Counter[int] = Counter()
        self._notes: dict[tuple[int, int], _Owed] = {}
        """What this side has accepted and not noted, by sender and type."""
        self._next = inf
        """Nothing is due before."""

    def __len__(self) -> int:
        return self._kinds.total()

    def put(self, to: int, message: RoundMessage, now: float) -> RoundMessage:
        """Keep a message until it is noted. It is to be sent now."""
        for kind in ANSWERS.get(type(message), ()) if self._notes else ():
            self._notes.pop((to, kind.TYPE), None)
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

    def owe(self, to: int, message: RoundMessage, now: float) -> None:
        """To note this message, unless what answers it is `put` soon."""
        self._notes[to, message.TYPE] = _Owed(note(message), now + WAIT)
        self._next = min(self._next, now + WAIT)

    def answered(self, to: int, answer: RoundMessage) -> None:
        """What has come settles what it answers."""
        for kind in ANSWERS.get(type(answer), ()):
            owed = self._owed.get(to, {}).get(kind.TYPE)
            if owed is not None and owed.message.session == answer.session:
                self._settle(to, kind.TYPE)

    def _settle(self, to: int, kind: int) -> None:
        del self._owed[to][kind]
        self._kinds[kind] -= 1
        if not self._owed[to]:
            del self._owed[to]

    def drop(self, condition: Callable[[RoundMessage], bool] = lambda message: True) -> None:
        """Forget what is owed of these, or all of it; and all notes."""
        self._notes.clear()
        for to, kind in [
            (to, k) for to, theirs in self._owed.items() for k, o in theirs.items() if condition(o.message)
        ]:
            self._settle(to, kind)

    def forget(self, to: int) -> None:
        """Whoever it is, it is told nothing more."""
        for kind in list(self._owed.get(to, ())):
            self._settle(to, kind)
        for key in [key for key in self._notes if key[0] == to]:
            del self._notes[key]

    def owed(self, to: int) -> bool:
        """Is anything not noted by this receiver?"""
        return to in self._owed

    def owes(self, kind: type[Any]) -> bool:
        """Is a message of this kind not noted yet, by anybody?"""
        return self._kinds[kind.TYPE] > 0

    def due(self, now: float) -> Iterator[tuple[int, RoundMessage]]:
        """What is to be sent now: again, or notes that have waited."""
        if now < self._next:
            return
        noted = [
            (to, self._notes.pop((to, kind)).message) for (to, kind), o in list(self._notes.items()) if o.due <= now
        ]
        late = [(to, owed) for to, theirs in self._owed.items() for owed in theirs.values() if owed.due <= now]
        for _, owed in late:
            owed.due = now + EVERY
        dues = [owed.due for theirs in self._owed.values() for owed in theirs.values()]
        self._next = min(dues + [owed.due for owed in self._notes.values()], default=inf)
        yield from noted
        for to, owed in late:
            yield to, owed.message

    @property
    def wake_at(self) -> float:
        """When to look next; nothing need be due then."""
        return self._next if self._owed or self._notes else inf


def number(message: RoundMessage) -> int:
    """The message's own number; 0 if it has none."""
    return getattr(message, "number", 0)


def note(message: RoundMessage) -> Noted:
    """What its receiver answers."""
    return Noted(message.incarnation, message.session, message.TYPE, number(message))
