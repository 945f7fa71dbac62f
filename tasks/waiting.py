"""Tasks that wait: equal ones together, the oldest first, and none after its deadline.

Rules
- Tasks that ask for the same of the same kind are one group: what is decided for the first of them holds for the others.
- How many wait, and of how many bytes, is known at any time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from ..protocol.schema import Buffer
from ..protocol.tasking import Asked
from .book import Id
from .parcels import Parcel

Key = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Item:
    """A task, or a part of one that was split.

    Attributes:
        came, until: in the loop's seconds; `until` is its deadline. tries: how often executors have ended with it.
        parcel: that it is a part of. over: answered, or not wanted any more. reason: why it went where it is.
    """

    id: Id
    asked: Asked
    payload: Buffer
    came: float
    until: float = inf
    tries: int = 0
    parcel: Parcel | None = None
    part: int = 0
    over: bool = False
    reason: str = ""

    @property
    def unwanted(self) -> bool:
        """Is it, or the whole that it is a part of, answered?"""
        return self.over or (self.parcel is not None and bool(self.parcel.whole.over))

    @property
    def items(self) -> int:
        return self.parcel.sizes[self.part] if self.parcel else self.asked.items

    @property
    def key(self) -> Key:
        a = self.asked
        return a.kind, a.model, a.latency, a.quality, a.privacy, a.budget, a.deadline, self.items


class Waiting:
    """The queue."""

    def __init__(self) -> None:
        self._groups: dict[Key, deque[Item]] = {}
        self.count = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return self.count

    def add(self, item: Item, first: bool = False) -> None:
        """`first`: it has waited before."""
        group = self._groups.setdefault(item.key, deque())
        if first:
            group.appendleft(item)
        else:
            group.append(item)
        self.count += 1
        self.nbytes += len(item.payload)

    def groups(self) -> Iterator[deque[Item]]:
        """Those with something in them, that with the oldest first item first. What is over is not in them."""
        for key in list(self._groups):
            group = self._groups[key]
            while group and group[0].unwanted:
                self._left(group.popleft())
            if not group:
                del self._groups[key]
        yield from sorted(self._groups.values(), key=lambda group: group[0].came)

    def take(self, group: deque[Item]) -> Item:
        """The first of a group that has one."""
        item = group.popleft()
        self._left(item)
        while group and group[0].unwanted:
            self._left(group.popleft())
        return item

    def drop(self, items: Collection[Item]) -> None:
        """These wait no more, wherever in the queue they are."""
        for item in items:
            self._groups[item.key].remove(item)
            self._left(item)

    def _left(self, item: Item) -> None:
        self.count -= 1
        self.nbytes -= len(item.payload)


class Deadlines:
    """When which tasks are not wanted any more."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Id, Item]] = []

    def add(self, item: Item) -> None:
        if item.until < inf:
            heapq.heappush(self._heap, (item.until, item.id, item))

    def passed(self, now: float) -> Iterator[Item]:
        """Those whose moment has come and that are not over."""
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].over):
            item = heapq.heappop(self._heap)[2]
            if not item.over:
                yield item

    @property
    def next(self) -> float:
        return self._heap[0][0] if self._heap else inf
