"""Whose turn it is to send, who is in the sum, who is out: the same at all shards (SPEC §14.4, stage 3). Pure.

Rules
- A client is added when its slices are at all shards, and only then. What was decided of a client is never decided otherwise.
- So few have a turn at once that the shards have room for all their slices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf


class Turns:
    """One session.

    Args:
        ranks: of those who have dealt. shards: how many. room: turns at once. seconds: how long one lasts.
    """

    def __init__(self, ranks: Iterable[int], shards: int, room: int, seconds: float) -> None:
        self._waiting = deque(sorted(ranks))
        self._shards, self._room, self._seconds = shards, room, seconds
        self._ends: dict[int, float] = {}
        """When whose turn is over; inf while it has not been told."""
        self._arrived: dict[int, set[int]] = {}
        self.added: set[int] = set()
        self.dropped: set[int] = set()
        self.number = 0
        """Of the ruling; it rises when shards are to hear it. Who is added waits until somebody needs the room, or all are."""

    @property
    def turns(self) -> tuple[int, ...]:
        return tuple(sorted(self._ends))

    @property
    def over(self) -> bool:
        """Is everybody added or dropped?"""
        return not self._waiting and not self._ends

    @property
    def wake_at(self) -> float:
        return min(self._ends.values(), default=inf)

    def arrived(self, shard: int, ranks: Sequence[int]) -> None:
        """These slices are at a shard."""
        for rank in ranks:
            here = self._arrived.setdefault(rank, set())
            here.add(shard)
            if len(here) == self._shards and rank in self._ends:
                del self._ends[rank]
                self.added.add(rank)
                self.number += self.over

    def drop(self, rank: int) -> None:
        """Somebody is gone; one who has been added stays."""
        if rank in self._ends:
            del self._ends[rank]
        elif rank in self._waiting:
            self._waiting.remove(rank)
        else:
            return
        self.dropped.add(rank)
        self.number += 1

    def told(self, rank: int, now: float) -> None:
        """It knows that it has its turn."""
        if rank in self._ends:
            self._ends[rank] = now + self._seconds

    def go_on(self, now: float, close: bool) -> list[int]:
        """End turns that took too long, and give those that are free.

        Args:
            close: end all of them; nobody else is added.

        Returns:
            Who has a turn now and had none.
        """
        for rank in [rank for rank, end in self._ends.items() if close or end <= now]:
            self.drop(rank)
        for rank in list(self._waiting) if close else []:
            self.drop(rank)
        given = []
        while self._waiting and len(self._ends) < self._room:
            rank = self._waiting.popleft()
            self._ends[rank] = inf
            given.append(rank)
            self.number += 1
        return given
