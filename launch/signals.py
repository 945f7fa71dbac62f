"""Ctrl-C and its like, as a flag that loops look at.

Rules
- The first signal asks for an orderly end; the second one says not to wait.
- The handlers that were there before are put back.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SLICE = 0.05
"""Seconds within which a signal is seen. An event would wake at once, and can lock up when a handler interrupts its `wait`."""


class Stopper:
    """A context manager. `signal` is the number of the first signal that came, 0 before; `hurry` is set by the second."""

    def __init__(self) -> None:
        self.signal = 0
        self.hurry = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has said that it is to live on
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self.hurry = True
        else:
            self.signal = number

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until a signal. True if one has come."""
        _sleep(seconds, lambda: bool(self.signal))
        return bool(self.signal)

    def patient(self, seconds: float) -> bool:
        """Wait so long, unless a second signal says to hurry. False then."""
        _sleep(seconds, lambda: self.hurry)
        return not self.hurry

    @property
    def code(self) -> int:
        """The exit code that says which signal it was."""
        return 128 + self.signal


def _sleep(seconds: float, over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not over() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, SLICE))
