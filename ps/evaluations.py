"""Evaluations under way, and their results (SPEC §17): who makes the cut, who has which part of the held-out data.

Rules
- A part is leased to one life at a time; its sums count once, whole, when its holder gives them.
- Every part of an evaluation is measured on one cut. If nobody can read that any more, all is measured anew on another.
- What is asked is answered at once: nobody waits in here.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from ..protocol.evaluating import (
    DONE,
    LATER,
    MAKE,
    MOST_RESULTS,
    Apportioned,
    Assess,
    Assessed,
    Cut,
    Evaluated,
    Review,
    Reviewed,
    Sums,
)
from ..protocol.federated import SUM
from ..protocol.messages import Message, Refused

KINDS = frozenset({Assess, Cut, Sums, Review})
MAX_SETS = 64
"""Held-out sets of a run."""
MAX_RESULTS = 4096
MAX_SUMS = 64
"""Names of sums in one evaluation."""
PATIENCE = 60.0
"""Seconds after which a part, or the making of a cut, goes to whoever asks, though its holder lives."""
MOST_CUTS = 5
"""Cuts of one evaluation, before it is given up."""
EXAMPLES = "examples"


@dataclass(slots=True)
class _Part:
    start: int
    stop: int
    holder: int
    since: float


@dataclass(slots=True)
class _Running:
    """One evaluation. `due` is the clock that it was asked for, 0 for a version of now."""

    number: int
    due: int
    began: float
    maker: int
    since: float
    cut: Cut | None = None
    cuts: int = 0
    free: deque[tuple[int, int]] = field(default_factory=deque)
    leased: dict[int, _Part] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    examples: int = 0
    lost: int = 0
    workers: set[int] = field(default_factory=set)
    able: set[int] = field(default_factory=set)
    unable: set[int] = field(default_factory=set)
    """Those who have the cut, as far as they have said, and those who could not read it."""


@dataclass(slots=True)
class _Set:
    """A held-out set, and what was evaluated on it."""

    length: int
    size: int
    due: int = 0
    """The highest clock that was evaluated."""
    number: int = 0
    """Of the last evaluation that is over."""
    result: int = 0
    """The number of its result, 0 if it was given up."""
    key: str = ""
    """Of the parameters that it was of."""
    running: _Running | None = None


class Evaluations:
    """Of one run."""

    def __init__(self) -> None:
        self.sets: dict[str, _Set] = {}
        self.results: deque[Evaluated] = deque(maxlen=MAX_RESULTS)
        self.news: list[str] = []
        """What people should read of."""
        self._numbers, self._leases = count(1), count(1)

    def handle(self, message: Message, now: float) -> Message:
        """The answer to one of `KINDS`."""
        who = (message.incarnation, message.request)  # type: ignore[union-attr]
        match message:
            case Assess():
                return self._assess(message, now)
            case Cut():
                self._made(message)
            case Sums():
                if self._measured(message, now):
                    return Assessed(*who, DONE, self.results[-1].number)
            case Review(since=since):
                found = [each for each in self.results if each.number >= since]
                return Reviewed(*who, tuple(found[:MOST_RESULTS]))
        return Assessed(*who, LATER, 0)

    def _assess(self, asked: Assess, now: float) -> Message:
        who = (asked.incarnation, asked.request)
        known = self.sets.get(asked.name)
        if known is None:
            if not asked.length or not asked.size or len(self.sets) >= MAX_SETS:
                text = f"a held-out set of {asked.length} examples in parts of {asked.size}, of at most {MAX_SETS} sets"
                return Refused(asked.request, "mismatch", text)
            known = self.sets[asked.name] = _Set(asked.length, asked.size)
        elif known.length != asked.length:
            text = f"held-out set {asked.name!r} has {known.length} examples for the worker that came first, {asked.length} here"
            return Refused(asked.request, "mismatch", text)
        run = known.running
        if (
            not asked.due and not asked.after
        ):  # whoever wants the version of now: of which evaluation it must be the next
            before = known.number if run is None else run.number - (run.cut is None)
            return Assessed(*who, LATER, before)
        if (known.due >= asked.due) if asked.due else (known.number >= asked.after):
            return Assessed(*who, DONE, known.result)
        if run is None:
            number = next(self._numbers)
            run = known.running = _Running(number, asked.due, now, asked.incarnation, now)
        if run.cut is None:
            if run.maker in (0, asked.incarnation) or now - run.since >= PATIENCE:
                run.maker, run.since = asked.incarnation, now
                return Assessed(*who, MAKE, run.number)
            return Assessed(*who, LATER, run.number)
        return self._part(run, asked, now) or Assessed(*who, LATER, run.number)

    def _part(self, run: _Running, asked: Assess, now: float) -> Apportioned | None:
        late = [lease for lease, part in run.leased.items() if now - part.since >= PATIENCE]
        for lease in late:
            self._give_back(run, lease)
        assert run.cut is not None
        if asked.incarnation in run.unable or not run.free:
            if now - run.since >= PATIENCE:  # whoever has the cut has lost interest
                run.able.clear()
                self._look_for_readers(asked.name, run)
            return None
        start, stop = run.free.popleft()
        lease, run.since = next(self._leases), now
        run.leased[lease] = _Part(start, stop, asked.incarnation, now)
        return Apportioned(asked.incarnation, asked.request, lease, run.cut.incarnation, run.cut.cut, start, stop)

    @staticmethod
    def _give_back(run: _Running, lease: int) -> None:
        part = run.leased.pop(lease)
        run.free.appendleft((part.start, part.stop))
        run.lost += 1

    def _made(self, cut: Cut) -> None:
        known = self.sets.get(cut.name)
        run = known.running if known else None
        if known is None or run is None or run.maker != cut.incarnation or run.cut is not None:
            return
        run.cuts += 1
        if cut.why:
            return self._anew(cut.name, known, run, cut.why)
        if cut.key == known.key and cut.key:  # nothing has changed since the last: it has this result
            return self._end(known, run, known.result, known.key)
        run.cut = cut
        run.able.add(cut.incarnation)
        run.free.extend((at, min(at + known.size, known.length)) for at in range(0, known.length, known.size))

    def _look_for_readers(self, name: str, run: _Running, why: str = "those who had the cut are gone") -> None:
        if run.cut is not None and run.free and not run.leased and not run.able and run.unable:
            self._anew(name, self.sets[name], run, why)

    def _anew(self, name: str, known: _Set, run: _Running, why: str) -> None:
        """Nothing that was measured counts: another cut must be made, or it is given up."""
        run.maker, run.cut, run.examples = 0, None, 0
        for held in (run.free, run.leased, run.sums, run.workers, run.able, run.unable):
            held.clear()
        if run.cuts >= MOST_CUTS:
            self._end(known, run, 0, "")
            self.news.append(f"evaluation {run.number} of {name!r} was given up after {run.cuts} cuts: {why}")

    def _measured(self, said: Sums, now: float) -> bool:
        """Was it the last part?"""
        for name, known in self.sets.items():
            run = known.running
            part = run.leased.get(said.lease) if run else None
            if run is None or part is None or part.holder != said.incarnation:
                continue  # it was counted before, or given to another
            if said.why:
                self._give_back(run, said.lease)
                run.unable.add(said.incarnation)
                run.able.discard(said.incarnation)
                self._look_for_readers(name, run, said.why)
                return False
            del run.leased[said.lease]
            run.since = now
            run.workers.add(said.incarnation)
            run.able.add(said.incarnation)
            run.examples += part.stop - part.start
            for what, value in said.sums:
                if what in run.sums or len(run.sums) < MAX_SUMS:
                    run.sums[what] = run.sums.get(what, 0.0) + value
            if not run.free and not run.leased:
                self._over(name, known, run, now)
                return True
        return False

    @staticmethod
    def _end(known: _Set, run: _Running, result: int, key: str) -> None:
        known.due, known.number, known.running = max(known.due, run.due), run.number, None
        known.result, known.key = result, key

    def _over(self, name: str, known: _Set, run: _Running, now: float) -> None:
        assert run.cut is not None
        self._end(known, run, run.number, run.cut.key)
        how = (len(run.workers), run.lost, round(now - run.began, 6), tuple(run.sums.items()))
        self._record(Evaluated(run.number, name, run.cut.mode, run.cut.clock, run.examples, *how))

    def _record(self, result: Evaluated) -> None:
        self.results.append(result)
        means = {what: total / result.examples for what, total in result.sums}
        told = ", ".join(f"{what} {mean:.6g}" for what, mean in means.items() if math.isfinite(mean))
        unit = "round" if result.mode == "federated" else "clock"
        self.news.append(f"{result.name} at {unit} {result.clock}: {told} over {result.examples} examples")

    def summed(self, round_: int, clients: int, metrics: dict[str, float]) -> None:
        """Sums that came out of a federated round, by `SUM`, the set's name, a colon, and what was measured."""
        found: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            set_, _, what = name.removeprefix(SUM).rpartition(":")
            if name.startswith(SUM) and set_:
                found.setdefault(set_, {})[what] = value
        for set_, sums in found.items():
            examples = sums.pop(EXAMPLES, 0.0)
            if examples >= 1 and math.isfinite(examples):
                number = next(self._numbers)
                self._record(
                    Evaluated(number, set_, "federated", round_, int(examples), clients, 0, 0.0, tuple(sums.items()))
                )

    def end(self, incarnation: int) -> None:
        """A life has ended: what it had is free again."""
        for name, known in self.sets.items():
            run = known.running
            if run is None:
                continue
            if run.maker == incarnation and run.cut is None:
                run.maker = 0
            for lease in [lease for lease, part in run.leased.items() if part.holder == incarnation]:
                self._give_back(run, lease)
            run.able.discard(incarnation)
            self._look_for_readers(name, run)

    @property
    def under_way(self) -> list[dict[str, object]]:
        """For status."""
        return [
            {"name": name, "clock": run.cut.clock if run.cut else run.due, "examples": run.examples, "of": known.length}
            for name, known in self.sets.items()
            if (run := known.running)
        ]
