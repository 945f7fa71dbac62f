"""Who is in a shard's view: their names, and the order in which they joined (SPEC §3.2, §6.3).

Rules
- A rank, once given, is a worker's own until it has left: it is comparable across views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count

from ..protocol.records import Member


class Roster:
    """By incarnation."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._ranks: dict[int, int] = {}
        self._order = count()

    def __contains__(self, incarnation: int) -> bool:
        return incarnation in self._names

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def update(self, members: Iterable[Member]) -> None:
        """These are here now, in the order of joining; nobody else is."""
        before, self._ranks, self._names = self._ranks, {}, {}
        for member in members:
            rank = before.get(member.incarnation)
            self._ranks[member.incarnation] = next(self._order) if rank is None else rank
            self._names[member.incarnation] = member.name

    def name(self, incarnation: int) -> str:
        return self._names.get(incarnation, "?")

    def rank(self, incarnation: int) -> int:
        """Lower for those who joined before."""
        return self._ranks.get(incarnation, len(self._ranks))
