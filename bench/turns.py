"""Contestants of a benchmark that take turns, each in processes of its own (`shoal.bench.seats`).

Rules
- Turns go round, each time beginning with the next one, so that noise hits all alike.
- Who is not installed, is too slow, or fails, has a reason instead of figures; the others go on without it.
- How busy others kept the machine meanwhile is measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from ..protocol.errors import ShoalError
from .seats import Seat, kept


class Field:
    """Those who still take part, and why the others do not."""

    def __init__(self, mark: str, folder: Path) -> None:
        self._mark, self._folder = mark, folder
        self.seats: dict[str, Seat] = {}
        self.without: dict[str, str] = {}

    def enter(self, name: str, command: Sequence[str]) -> Seat:
        """Starts a contestant."""
        number = str(len(self.seats) + len(self.without))
        folder = self._folder / number
        folder.mkdir()
        self.seats[name] = Seat(command, f"{self._mark}.{number}", folder)
        return self.seats[name]

    @contextmanager
    def excused(self, name: str, when: str = "") -> Iterator[None]:
        """Who fails within is ended, with the reason, and the rest goes on."""
        try:
            yield
        except ShoalError as error:
            self.without[name] = f"{error}{when}"
            self.seats.pop(name).close(kill=True)


@contextmanager
def opened() -> Iterator[Field]:
    """A field; who is still on it in the end is ended."""
    with kept() as (mark, folder):
        field = Field(mark, folder)
        try:
            yield field
        finally:
            for seat in field.seats.values():
                seat.close(kill=True)


def rotated(names: list[str], by: int) -> list[str]:
    """The same, beginning with another one each time."""
    at = by % len(names) if names else 0
    return [*names[at:], *names[:at]]


class Others:
    """Cores that the rest of the machine keeps busy while contestants have their turns."""

    def __init__(self) -> None:
        self._busy = self._seconds = 0.0

    @property
    def cores(self) -> float:
        """The mean over all turns."""
        return max(0.0, self._busy / self._seconds) if self._seconds else 0.0

    @contextmanager
    def beside(self, seat: Seat) -> Iterator[None]:
        """Counts what the machine does within, but for the contestant and this process."""
        used, started = _machine_seconds() - seat.cpu_seconds() - time.process_time(), time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
        self._busy += _machine_seconds() - seat.cpu_seconds() - time.process_time() - used


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def short(number: float) -> float:
    """Four digits that count: the rest is noise."""
    return float(f"{number:.4g}")
