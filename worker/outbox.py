"""A worker's end of a stream: numbered operations, kept until acknowledged (SPEC §5).

Rules
- At most a window of them is under way; the rest waits here.
- Nothing is renumbered: a new stream begins with a new outbox.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..protocol.frames import payload_bytes
from ..protocol.messages import Operation

WINDOW_BYTES = 16 * 1024 * 1024
WINDOW = 1024


@dataclass(slots=True)
class _Kept:
    operation: Operation
    ticket: int
    size: int


class Outbox:
    """The operations toward one shard incarnation."""

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque()
        self._last = 0
        self._sent = 0
        """The highest number sent since the last rewind."""
        self._under_way = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def last(self) -> int:
        """The highest number given."""
        return self._last

    @property
    def next(self) -> int:
        """The number of the next operation."""
        return self._last + 1

    @property
    def sent(self) -> int:
        return self._sent

    @property
    def unsent(self) -> bool:
        """Is there anything that has not been sent, or is to be sent again?"""
        return self._sent < self._last

    @property
    def acknowledged(self) -> int:
        return self._last - len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(kept.size for kept in self._kept)

    def add(self, operation: Operation, ticket: int = 0) -> None:
        """Keep an operation, numbered `next`. `ticket` 0: nobody waits for it."""
        self._last += 1
        assert operation.seq == self._last
        self._kept.append(_Kept(operation, ticket, payload_bytes(operation)))

    def due(self) -> list[Operation]:
        """What may be sent now; it counts as sent."""
        found: list[Operation] = []
        if self._sent == self._last:
            return found
        first = self._last - len(self._kept) + 1
        while self._sent < self._last:
            kept = self._kept[max(self._sent + 1, first) - first]
            count = kept.operation.seq - first
            if count and (count >= WINDOW or self._under_way + kept.size > WINDOW_BYTES):
                break
            found.append(kept.operation)
            self._under_way += kept.size
            self._sent = kept.operation.seq
        return found

    def acknowledge(self, seq: int) -> list[tuple[int, int]]:
        """Everything up to `seq` is applied. Returns (number, ticket) of each that was kept."""
        done = []
        while self._kept and self._kept[0].operation.seq <= seq:
            kept = self._kept.popleft()
            if kept.operation.seq <= self._sent:
                self._under_way -= kept.size
            done.append((kept.operation.seq, kept.ticket))
        self._sent = max(self._sent, min(seq, self._last))
        return done

    def rewind(self, received: int = 0) -> int:
        """Everything after `received` must be sent again. Returns how many that are."""
        back = max(received, self.acknowledged)
        again = max(0, self._sent - back)
        if again:
            self._sent = back
            self._under_way = sum(k.size for k in self._kept if k.operation.seq <= back)
        return again

    def tickets(self) -> set[int]:
        return {kept.ticket for kept in self._kept if kept.ticket}
