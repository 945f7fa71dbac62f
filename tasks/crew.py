"""Executors as a dispatcher sees them: what they serve and hold, what is at work there, how quick they are.

Rules
- An executor is here while it offers itself; who is silent for `LEASE` seconds is not, and its work is somebody else's.
- Work under way is repeated to who does not know of it; a batch has one outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf
from statistics import fmean

from ..protocol.effects import Peer
from ..protocol.tasking import Offer, Work
from .allot import Executor
from .latency import Latencies
from .waiting import Item

LEASE = 5.0
MOST_EXECUTORS = 4096
ROOM = 2
"""Batches under way at an executor: one that it works on, and the next."""
AGAIN = 1.5
"""Seconds after which an offer that does not name a batch means that it was lost."""


@dataclass(slots=True)
class Batch:
    """Work under way. `sent_at`: when it was said last."""

    work: Work
    items: list[Item]
    sent_at: float
    began: float

    @property
    def inputs(self) -> int:
        return sum(self.work.items)


@dataclass(slots=True)
class Seat:
    """An executor. `told`: the identities that it was told to hold last."""

    incarnation: int
    peer: Peer
    offer: Offer
    heard_at: float
    batches: dict[int, Batch] = field(default_factory=dict)
    seconds: dict[str, Latencies] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    told_at: float = -inf
    done: int = 0

    @property
    def name(self) -> str:
        return self.offer.name

    @property
    def room(self) -> bool:
        return len(self.batches) < ROOM

    def takes(self, identity: str, guess: float) -> float:
        """Seconds of an input, as a rule."""
        known = self.seconds.get(identity)
        return known.quantile(0.5) if known else guess

    def queue(self, now: float) -> float:
        """Seconds of work that wait there."""
        wanted = 0.0
        for number, batch in enumerate(self.batches.values()):
            length = batch.inputs * self.takes(batch.work.identity, 0.0)
            wanted += max(0.0, length - (now - batch.began)) if number == 0 else length
        return wanted

    def as_executor(self, answers: frozenset[str], now: float) -> Executor:
        """For the pure function that allots."""
        offer = self.offer
        data = None if offer.open else frozenset(offer.data)
        loaded, seconds = frozenset(offer.loaded), self.seconds
        return Executor(self.name, data, loaded, offer.free, self.queue(now), offer.price, seconds, answers)


class Crew:
    """All executors, by incarnation."""

    def __init__(self) -> None:
        self._seats: dict[int, Seat] = {}

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def __len__(self) -> int:
        return len(self._seats)

    def get(self, incarnation: int) -> Seat | None:
        return self._seats.get(incarnation)

    def offered(self, peer: Peer, offer: Offer, now: float) -> Seat | None:
        """An offer has come. None where there are too many executors."""
        seat = self._seats.get(offer.executor)
        if seat is None:
            if len(self._seats) >= MOST_EXECUTORS:
                return None
            seat = self._seats[offer.executor] = Seat(offer.executor, peer, offer, now)
        seat.peer, seat.offer, seat.heard_at = peer, offer, now
        return seat

    def unheard(self, seat: Seat, now: float) -> Iterator[Batch]:
        """Batches that it does not know of, to be said again."""
        for number, batch in seat.batches.items():
            if number not in seat.offer.batches and now - batch.sent_at >= AGAIN:
                batch.sent_at = now
                yield batch

    def expired(self, now: float) -> list[Seat]:
        """Those who are silent for too long; they are gone."""
        return [self.gone(seat) for seat in list(self) if now - seat.heard_at >= LEASE]

    def gone(self, seat: Seat) -> Seat:
        del self._seats[seat.incarnation]
        return seat

    @property
    def wake_at(self) -> float:
        return min((seat.heard_at for seat in self), default=inf) + LEASE

    def measured(self, seat: Seat, batch: Batch, seconds: float) -> None:
        """How long a batch took there."""
        seat.done += len(batch.items)
        if batch.inputs:
            seat.seconds.setdefault(batch.work.identity, Latencies()).add(seconds / batch.inputs)

    def latency(self) -> Mapping[str, float]:
        """Seconds of an input, by version, over all executors."""
        found: dict[str, list[float]] = {}
        for seat in self:
            for identity, known in seat.seconds.items():
                if len(known):
                    found.setdefault(identity, []).append(known.quantile(0.5))
        return {identity: fmean(each) for identity, each in found.items()}
