"""The coordinator's table of shards: who holds which index, what each has reported (SPEC §3.1, §3.3.4).

Rules
- An index is held by one incarnation. It changes hands when its holder is silent for a lease, or when a new process has
  bound the very address of the old one.
- Before there is a layout nothing is at stake: a silent shard is forgotten soon, and the others close ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from ..protocol.effects import Peer
from ..protocol.messages import Report, ShardJoin
from ..protocol.records import Place

MAX_SHARDS = 1024
REPLACED_AFTER = 2.5
"""Seconds of silence, of a shard that reports each second, after which its address may be another's."""


@dataclass(slots=True)
class Held:
    """A shard as the coordinator knows it."""

    place: Place
    peer: Peer
    heard_at: float
    epoch: int = 0
    digest: str = ""
    filled: bool = False
    opened: bool = False
    floor: int = 0
    holds: bool = False
    highest: int = 0
    clocks: dict[int, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    told: int = 0
    """The epoch of the newest view that was sent."""
    survivor: bool = False
    """Did it come with a model of before our start?"""
    told_at: float = -inf
    model_sent_at: float = -inf


class Shards:
    """`lease` is in seconds, `wanted` the least number of shards that a layout waits for."""

    def __init__(self, lease: float, wanted: int) -> None:
        self._lease = lease
        self.wanted = wanted
        self.fixed = 0
        """The number of shards in the layout, once there is one."""
        self.digest = ""
        self.idle: frozenset[int] = frozenset()
        """Those of the layout that have no blocks: no worker enters there."""
        self._held: dict[int, Held] = {}

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(self._held[index].place for index in sorted(self._held))

    @property
    def ready(self) -> bool:
        """Are the indices 0, 1, … filled up to what is wanted?"""
        return len(self._held) >= max(self.fixed, self.wanted) and set(self._held) == set(range(len(self._held)))

    @property
    def agreed(self) -> bool:
        """Has every shard of the layout computed it as we did?"""
        return self.fixed > 0 and all(
            i in self._held and self._held[i].digest == self.digest for i in range(self.fixed)
        )

    @property
    def resuming(self) -> bool:
        """Do shards hold a model that nobody has described to us yet?"""
        return not self.fixed and any(held.survivor for held in self)

    @property
    def opened(self) -> bool:
        """Has every shard of the layout begun its first clock?"""
        return self.fixed > 0 and all(held.opened for index, held in self._held.items() if index < self.fixed)

    @property
    def unfilled(self) -> tuple[int, ...]:
        return tuple(index for index, held in sorted(self._held.items()) if index < self.fixed and not held.filled)

    @property
    def counted(self) -> int:
        """How many workers are counted in, at the shard that knows of most."""
        return max((len(held.clocks) for index, held in self._held.items() if index < self.fixed), default=0)

    @property
    def floor(self) -> int:
        """The least clock at any shard that has blocks."""
        return min((held.floor for i, held in self._held.items() if i < self.fixed and i not in self.idle), default=0)

    def reached(self, epoch: int) -> int | None:
        """The highest clock that anybody has reached, once all shards of the layout hold in the view of `epoch`.

        One that was restarted knows it when it has heard from everybody, which is when it opens (SPEC §6.1.5).
        """
        if self.unready(epoch):
            return None
        return max((held.highest for index, held in self._held.items() if index < self.fixed), default=0)

    def unready(self, epoch: int) -> list[int]:
        """The shards of the layout that do not hold in the view of `epoch`, or have not begun."""
        held = [self._held.get(index) for index in range(self.fixed)]
        return [i for i, one in enumerate(held) if not (one and one.holds and one.opened and one.epoch >= epoch)]

    def known(self, incarnation: int) -> Held | None:
        return next((held for held in self._held.values() if held.place.incarnation == incarnation), None)

    def is_lost(self, held: Held, now: float) -> bool:
        return now - held.heard_at >= self._lease

    def join(self, join: ShardJoin, peer: Peer, now: float) -> tuple[Held | None, bool]:
        """A shard asks for its place. Returns (its entry or None for a spare, has the table changed)."""
        held = self.known(join.incarnation)
        if held is not None:
            held.peer, held.heard_at = peer, now
            return held, False
        index = self._choose(join, now)
        if index is None:
            return None, False
        if not self.fixed and join.digest:
            self.wanted = max(self.wanted, min(join.shards, MAX_SHARDS))
        place = Place(index, join.incarnation, join.host, join.port, join.key)
        self._held[index] = Held(place, peer, now, survivor=bool(join.digest))
        return self._held[index], True

    def _choose(self, join: ShardJoin, now: float) -> int | None:
        survivor = join.digest and (not self.fixed or (join.digest == self.digest and join.index < self.fixed))
        if survivor and 0 <= join.index < MAX_SHARDS and self._free(join.index, join, now):
            return join.index
        room = range(self.fixed or min(max(self.wanted, len(self._held) + 1), MAX_SHARDS))
        mine = [i for i in room if i in self._held and self._replaces(self._held[i], join, now)]
        if mine:
            return mine[0]
        return next((index for index in room if self._free(index, join, now)), None)

    def _free(self, index: int, join: ShardJoin, now: float) -> bool:
        held = self._held.get(index)
        return held is None or self.is_lost(held, now) or self._replaces(held, join, now)

    def _replaces(self, held: Held, join: ShardJoin, now: float) -> bool:
        """Has a new process bound the address of one that says nothing any more?"""
        same = (held.place.host, held.place.port) == (join.host, join.port)
        return same and (not self.fixed or now - held.heard_at >= REPLACED_AFTER)

    def close_ranks(self, now: float) -> list[Held]:
        """Before there is a layout: forget the silent, and those whose index is now too high; these, returned, must join again."""
        silent = [] if self.fixed else [held for held in self if now - held.heard_at >= REPLACED_AFTER]
        for held in silent:
            del self._held[held.place.index]
        misplaced = [held for held in self if silent and held.place.index >= len(self)]
        for held in misplaced:
            del self._held[held.place.index]
        return misplaced

    def report(self, held: Held, report: Report, peer: Peer, now: float) -> None:
        held.peer, held.heard_at = peer, now
        held.epoch, held.digest, held.filled = report.epoch, report.digest, report.filled
        held.opened, held.floor = report.opened, report.floor
        held.holds, held.highest = report.held, report.highest
        held.clocks = dict(report.clocks)
        held.counters = dict(report.counters)
