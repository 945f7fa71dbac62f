"""Joins that cannot be answered yet: there are too few shards, or a live worker has the name (SPEC §3.1).

Rules
- A worker repeats its join each second; one that is not repeated is forgotten, for its process may be dead.
- Both lists are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..protocol.effects import Peer
from ..protocol.messages import Join

MOST = 16_384
LASTS = 5.0
"""Seconds for which a join counts."""


class Lobby:
    """Joins by incarnation: `wait` for shards, `contest` for a name."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, Peer, Join]] = {}
        self._contesting: dict[int, tuple[Peer, Join]] = {}

    def wait(self, peer: Peer, join: Join, now: float) -> None:
        """Until there are shards."""
        if len(self._waiting) < MOST or join.incarnation in self._waiting:
            self._waiting[join.incarnation] = (now, peer, join)

    def waiting(self, now: float) -> list[tuple[Peer, Join]]:
        """Those who wait still, in order of their coming. The list is empty after."""
        found, self._waiting = self._waiting, {}
        return [(peer, join) for asked_at, peer, join in found.values() if now - asked_at < LASTS]

    def contest(self, peer: Peer, join: Join) -> bool:
        """Until the holder of the name has renewed its lease, or lost it. False if there is no room."""
        if len(self._contesting) >= MOST and join.incarnation not in self._contesting:
            return False
        self._contesting[join.incarnation] = (peer, join)
        return True

    def contesting(self, name: str) -> Iterator[tuple[Peer, Join]]:
        """Those who wait for this name, taken off the list."""
        for incarnation in [inc for inc, (_, join) in self._contesting.items() if join.name == name]:
            yield self._contesting.pop(incarnation)
