"""A shard's end of a stream: what was received in order, what was applied, what was refused (SPEC §5).

Rules
- A number is queued once and applied once, in order, whatever the network repeats or reorders.
- What does not fit is dropped; the sender keeps it and sends it again.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from ..protocol.frames import payload_bytes
from ..protocol.messages import Operation

MAX_WAITING_BYTES = 64 * 1024 * 1024
MAX_WAITING = 2048
REMEMBERED_REFUSALS = 8


class Verdict(Enum):
    """What became of an operation on arrival."""

    QUEUED = "queued"
    REPEATED = "repeated"
    GAP = "gap"
    FULL = "full"


class Inbox:
    """The operations of one worker incarnation."""

    def __init__(self) -> None:
        self.applied = 0
        self.refusals: deque[tuple[int, str, str]] = deque(maxlen=REMEMBERED_REFUSALS)
        self._waiting: deque[tuple[Operation, int]] = deque()
        """With their bytes."""
        self._waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def head(self) -> Operation | None:
        """The next operation to apply."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def received(self) -> int:
        """The highest number received in order, applied or waiting."""
        return self.applied + len(self._waiting)

    def take(self, operation: Operation) -> Verdict:
        """An operation has arrived."""
        expected = self.received + 1
        if operation.seq != expected:
            return Verdict.REPEATED if operation.seq < expected else Verdict.GAP
        size = payload_bytes(operation)
        if self._waiting and (len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES):
            return Verdict.FULL
        self._waiting.append((operation, size))
        self._waiting_bytes += size
        return Verdict.QUEUED

    def applied_head(self, refusal: tuple[str, str] | None = None) -> None:
        """The head was applied, or refused with a code and a text."""
        operation, size = self._waiting.popleft()
        self._waiting_bytes -= size
        self.applied = operation.seq
        if refusal:
            self.refusals.append((operation.seq, *refusal))
