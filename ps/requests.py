"""Workers' requests as a coordinator keeps them: answered once, repeated when asked again, parked while they must wait (SPEC §7).

Rules
- A request that was answered gets the same answer again.
- What is kept of a worker goes with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ..protocol.messages import Claim, Message, Register

REMEMBERED = 64
"""Answers kept of each worker."""

Key = tuple[int, int]
"""The worker's incarnation, and the request's number."""


class Requests:
    """All workers' requests."""

    def __init__(self) -> None:
        self._answers: dict[int, OrderedDict[int, Message]] = {}
        self._parked: OrderedDict[Key, Register | Claim] = OrderedDict()

    def answer_to(self, key: Key) -> Message | None:
        """What was answered, if it is remembered."""
        kept = self._answers.get(key[0])
        return kept.get(key[1]) if kept else None

    def answered(self, key: Key, answer: Message) -> None:
        """It has its answer now."""
        self._parked.pop(key, None)
        kept = self._answers.setdefault(key[0], OrderedDict())
        kept[key[1]] = answer
        while len(kept) > REMEMBERED:
            kept.popitem(last=False)

    def park(self, message: Register | Claim) -> bool:
        """It must wait. True if it waits already."""
        key = (message.incarnation, message.request)
        again = key in self._parked
        self._parked[key] = message
        return again

    def parked(self) -> Iterator[Register | Claim]:
        """Those that wait, the oldest first; some may be answered meanwhile."""
        for key in list(self._parked):
            if key in self._parked:
                yield self._parked[key]

    def end(self, incarnation: int) -> None:
        """A worker is gone."""
        self._answers.pop(incarnation, None)
        for key in [key for key in self._parked if key[0] == incarnation]:
            del self._parked[key]

    @property
    def workers(self) -> set[int]:
        """Of whom anything is kept."""
        return {key[0] for key in self._parked} | set(self._answers)
