"""What a peer does not take at the moment: messages, and answers that are made while it takes them (SPEC §6.4.4).

Rules
- In order, and nothing is made before the peer has taken what comes before it: what a slow reader pins is bounded.
- Over a bound the rest is forgotten: the protocol repeats what matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from ..protocol.frames import payload_bytes
from ..protocol.messages import Message

MOST_BYTES = 64 * 1024 * 1024
MOST_MESSAGES = 8192
MOST_STREAMS = 2
"""Answers that one peer may have begun and not taken; the oldest of more is forgotten."""


class Backlog:
    """Of one peer."""

    def __init__(self) -> None:
        self._waiting: deque[Message | Iterator[Message]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of the messages that wait; what is not made yet has none."""
        return self._bytes

    def add(self, message: Message) -> None:
        """After everything that waits."""
        self._bytes += payload_bytes(message)
        self._waiting.append(message)
        if self._bytes > MOST_BYTES or len(self._waiting) > MOST_MESSAGES:
            self._waiting.clear()
            self._bytes = 0

    def stream(self, messages: Iterator[Message]) -> None:
        """After everything that waits, these, each made when its turn comes."""
        streams = [waiting for waiting in self._waiting if isinstance(waiting, Iterator)]
        if len(streams) >= MOST_STREAMS:
            self._waiting.remove(streams[0])
        self._waiting.append(messages)

    def flush(self, take: Callable[[Message], bool]) -> bool:
        """Hand over what is taken. True: nothing waits any more.

        Raises:
            Exception: whatever `take` or the making of a message has raised; the culprit waits no more.
        """
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, Iterator):
                self._waiting.popleft()
                made = next(first, None)
                if made is None:
                    continue
                self._waiting.appendleft(first)
                self._waiting.appendleft(made)
                self._bytes += payload_bytes(made)
            elif not take(first):
                return False
            else:
                self._bytes -= payload_bytes(first)
                self._waiting.popleft()
        return True
