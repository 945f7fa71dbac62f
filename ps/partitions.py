"""The leases on ranges of a data set (SPEC §9).

Rules
- Every range of an epoch is leased to one life at a time until somebody has completed it.
- The lowest unfinished epoch comes first, and in it what a dead worker gave back.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import Enum
from itertools import count

from ..protocol.messages import Declare

MAX_JOBS = 4096


@dataclass(slots=True)
class Range:
    """Examples `[start, stop)` of an epoch's order, leased. `done` examples from the start are complete."""

    lease: int
    incarnation: int
    epoch: int
    start: int
    stop: int
    done: int = 0


class Answer(Enum):
    """Why a claim got no range."""

    LATER = "all that is left is leased to others"
    NEVER = "every epoch asked for is complete"


@dataclass(slots=True)
class Job:
    """One data set. Epochs before `first` were done in an earlier run of the coordinator."""

    name: str
    length: int
    batch: int
    size: int
    seed: int
    first: int
    epoch: int
    """The epoch being given out."""
    cursor: int = 0
    returned: list[tuple[int, int, int]] = field(default_factory=list)
    leased: dict[int, Range] = field(default_factory=dict)
    completed: int = 0
    """Partitions, over all epochs."""
    lost: int = 0
    released: int = 0

    @property
    def oldest(self) -> int:
        """The first epoch of which something is left to do."""
        under_way = [held.epoch for held in self.leased.values()]
        return min([self.epoch, *under_way, *(epoch for epoch, _, _ in self.returned[:1])])

    def begin_at(self, epoch: int) -> None:
        """Somebody knows that every earlier epoch is done: a coordinator before us has said so (SPEC §9.5)."""
        if epoch > self.epoch:
            self.first = self.epoch = epoch
            self.cursor = 0
        self.returned = [entry for entry in self.returned if entry[0] >= epoch]
        heapq.heapify(self.returned)

    def take(self, incarnation: int, epochs: int, numbers: count[int]) -> Range | Answer:
        """The next range of an epoch below `epochs`."""
        if self.returned and self.returned[0][0] < epochs:
            epoch, start, stop = heapq.heappop(self.returned)
            self.released += 1
        elif self.epoch < epochs and self.length:
            epoch, start = self.epoch, self.cursor
            stop = min(start + self.size, self.length)
            self.cursor = stop
            if stop == self.length:
                self.epoch, self.cursor = self.epoch + 1, 0
        elif any(held.epoch < epochs for held in self.leased.values()):
            return Answer.LATER
        else:
            return Answer.NEVER
        held = Range(next(numbers), incarnation, epoch, start, stop)
        self.leased[held.lease] = held
        return held

    def give_back(self, held: Range) -> None:
        """Its holder does no more of it: what it had not done is free again."""
        del self.leased[held.lease]
        if held.start + held.done < held.stop:
            heapq.heappush(self.returned, (held.epoch, held.start + held.done, held.stop))
            self.lost += 1
        else:
            self.completed += 1


class Partitions:
    """All jobs of a run."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self._numbers = count(1)

    def declare(self, asked: Declare) -> str:
        """Fix a job, or compare with it. Returns what does not fit, or ""."""
        job = self.jobs.get(asked.job)
        if job is None:
            if asked.batch < 1 or asked.size < 1 or asked.size % asked.batch:
                return f"a partition of {asked.size} examples is not a multiple of the batch of {asked.batch}"
            if len(self.jobs) >= MAX_JOBS:
                return f"{MAX_JOBS} data sets are declared already"
            self.jobs[asked.job] = Job(
                asked.job, asked.length, asked.batch, asked.size, asked.seed, first=asked.epoch, epoch=asked.epoch
            )
            return ""
        for what, mine, yours in (
            ("examples", job.length, asked.length),
            ("examples a batch", job.batch, asked.batch),
            ("as seed", job.seed, asked.seed),
        ):
            if mine != yours:
                return f"data set {asked.job!r} has {mine} {what} for the worker that came first, {yours} here"
        job.begin_at(asked.epoch)
        return ""

    def claim(self, incarnation: int, name: str, epochs: int) -> Range | Answer | None:
        """The next range for a worker; None if there is no such job."""
        job = self.jobs.get(name)
        return job.take(incarnation, epochs, self._numbers) if job else None

    def progress(self, incarnation: int, lease: int, done: int) -> None:
        """A worker has completed `done` examples of a range that it holds."""
        for job in self.jobs.values():
            held = job.leased.get(lease)
            if held and held.incarnation == incarnation:
                held.done = max(held.done, min(done, held.stop - held.start))

    def complete(self, incarnation: int, lease: int, done: int) -> None:
        """A worker has done `done` examples of a range and does no more of it.

        A lease that it does not hold is no news: it was completed before, or given back.
        """
        for job in self.jobs.values():
            held = job.leased.get(lease)
            if held and held.incarnation == incarnation:
                held.done = max(held.done, min(done, held.stop - held.start))
                job.give_back(held)

    def end(self, incarnation: int) -> None:
        """A life has ended."""
        for job in self.jobs.values():
            for held in [held for held in job.leased.values() if held.incarnation == incarnation]:
                job.give_back(held)
