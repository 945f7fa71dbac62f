"""What happened in a simulated run, and the checkers of the design's guarantees (DESIGN §5).

Each update adds 1 to an element of its own in every shard's block (a one-hot gradient of -1 under SGD with lr 1), so the values
that a pull returns say exactly which updates they contain, and how often.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import inf

from shoal.protocol.records import Phase


class Violation(AssertionError):
    """A guarantee is broken."""


@dataclass
class Update:
    """One push: its element, who made it at which clock, for which data, and what became of it."""

    element: int
    incarnation: int
    clock: int
    examples: float
    epoch: int
    start: int
    stop: int
    pushed_at: float
    acked_at: float = inf
    failed: bool = False
    lost_with: str = ""
    """The error that told of its loss, where one did."""


@dataclass
class Life:
    """One incarnation of a worker, as an observer from above sees it."""

    name: str
    incarnation: int
    started_at: float
    start_clock: int
    counted: list[tuple[float, float]] = field(default_factory=list)
    """When it was counted in everywhere: intervals [from, to)."""
    ended_at: float = inf


@dataclass
class PullDone:
    """A pull that was answered. `values` by shard; `own` are the elements that the reader had pushed before it asked."""

    incarnation: int
    clock: int
    asked_at: float
    answered_at: float
    values: dict[int, list[float]]
    own: tuple[int, ...]
    counted: bool
    """Was the reader itself counted in?"""


@dataclass
class CutDone:
    """A consistent cut: `values` by shard; by worker's incarnation, below which clock its steps should be in it."""

    asked_at: float
    done_at: float
    values: dict[int, list[float]]
    clocks: dict[int, int]
    closed: int


@dataclass
class History:
    """Everything that checkers look at."""

    phases: dict[int, Phase]
    """What steps were made in, by the clock from which on."""
    sharing: bool = False
    rounding: float = 0.0
    """What a pull's codec may make of a value, relative to it; a shard that was filled again from what was pulled has it so."""
    updates: dict[int, Update] = field(default_factory=dict)
    lives: dict[int, Life] = field(default_factory=dict)
    pulls: list[PullDone] = field(default_factory=list)
    waits: list[tuple[str, float, float]] = field(default_factory=list)
    """(worker, asked at, answered at) of every pull."""
    cuts: list[CutDone] = field(default_factory=list)
    refilled: dict[int, list[tuple[float, set[int]]]] = field(default_factory=lambda: defaultdict(list))
    """When a later life of a shard was filled, by index, and with which elements: what else the earlier one held is lost."""

    put: set[int] = field(default_factory=set)
    """Elements of updates of federated rounds."""

    def mode(self, clock: int) -> str:
        return self._at(clock).mode

    def bound(self, clock: int) -> float:
        """The staleness bound of a pull at this clock."""
        phase = self._at(clock)
        return {"sync": 0.0, "federated": inf}.get(phase.mode, phase.staleness)

    def _at(self, clock: int) -> Phase:
        return self.phases[max(first for first in self.phases if first <= clock)]

    def may_lack(self, update: Update, shard: int, at: float) -> bool:
        """Did a crash of the shard, before `at`, take this update with it (DESIGN §5: no checkpoint, no promise)?

        One that was reported as lost because of one shard may be missing at the others, too: its memory was given up.
        """
        return (self.sharing and update.failed) or any(
            filled <= at and (update.pushed_at <= filled or update.lost_with == "ServerLost")
            for filled, _ in self.refilled.get(shard, ())
        )

    def by_life(self) -> dict[int, list[Update]]:
        found: dict[int, list[Update]] = defaultdict(list)
        for update in self.updates.values():
            found[update.incarnation].append(update)
        return found


def check_staleness(history: History) -> None:
    """Guarantee 1: a pull at clock c holds every update with clock <= c - s - 1 of every live worker, and the reader's own."""
    by_life = history.by_life()
    for pull in history.pulls:
        for element in pull.own:
            update = history.updates[element]
            if _lacking(history, update, pull):
                if history.mode(update.clock) == "sync" and update.clock >= pull.clock:
                    continue  # its step is not closed yet
                raise Violation(f"a pull at {pull.answered_at:.3f} lacks the reader's own update {element}")
        bound = history.bound(pull.clock)
        if not pull.counted or bound == inf:
            continue
        least = pull.clock - int(bound)
        for life in history.lives.values():
            whole = any(a <= pull.asked_at and pull.answered_at < b for a, b in life.counted)
            if not whole or life.ended_at <= pull.answered_at:
                continue
            mine = by_life[life.incarnation]
            reached = life.start_clock + sum(update.pushed_at <= pull.answered_at for update in mine)
            if reached < least:
                raise Violation(
                    f"a pull at clock {pull.clock} was answered at {pull.answered_at:.3f} "
                    f"while {life.name} was at {reached}, bound {bound}"
                )
            for update in mine:
                if update.clock < least and _lacking(history, update, pull):
                    raise Violation(
                        f"a pull at clock {pull.clock} (bound {bound}) at {pull.answered_at:.3f} lacks update {update.element} "
                        f"of {life.name} at clock {update.clock}"
                    )


def _lacking(history: History, update: Update, pull: PullDone) -> bool:
    """Is an update missing in what a shard answered, though that shard should have it?"""
    return any(
        values[update.element] == 0 and not history.may_lack(update, shard, pull.answered_at)
        for shard, values in pull.values.items()
    )


def check_cuts(history: History) -> None:
    """Guarantee 8: a cut has, at every shard, of every live worker exactly the steps below one clock; and all that was acknowledged
    before it was asked for."""
    for cut in history.cuts:
        for update in history.updates.values():
            life = history.lives.get(update.incarnation)
            live = life is not None and life.started_at < cut.done_at < life.ended_at
            averaged = history.mode(update.clock) == "sync"
            below = cut.closed if averaged else cut.clocks.get(update.incarnation, 0)
            wanted, old = update.clock < below, update.acked_at < cut.asked_at and not averaged
            for shard, values in cut.values.items():
                there, lost = values[update.element] != 0, history.may_lack(update, shard, cut.done_at)
                # A shard that was filled again has averages of before in its weights, and begins to count anew.
                if there and not wanted and (not lost if averaged else live):
                    raise Violation(
                        f"a cut at {cut.done_at:.3f} has step {update.clock} of a worker, and ends below {below}"
                    )
                if live and not there and not lost and (wanted or old):
                    raise Violation(
                        f"a cut at {cut.done_at:.3f} lacks step {update.clock} of a worker, and ends below {below}"
                    )


def check_once(history: History, final: dict[int, list[float]]) -> None:
    """Guarantee 2: an acknowledged update is applied once at every shard, any other at most once."""
    for shard, values in final.items():
        _check_means(history, shard, values)
        for update in history.updates.values():
            if history.mode(update.clock) == "sync":
                continue
            times = values[update.element]
            if times not in (0.0, 1.0):
                raise Violation(f"shard {shard}: update {update.element} was applied {times:g} times")
            if update.acked_at < inf and times != 1.0 and not history.may_lack(update, shard, inf):
                raise Violation(f"shard {shard}: update {update.element} was acknowledged and is not there")
        strangers = [i for i, value in enumerate(values) if value and i not in history.updates and i not in history.put]
        if strangers:
            raise Violation(f"shard {shard}: elements {strangers[:5]} changed though nobody pushed them")


def _check_means(history: History, shard: int, values: list[float]) -> None:
    """In sync mode the updates of one step share a weight of 1, in proportion to their examples.

    A shard that was restarted may go through a step again, for a worker that the step before the crash had not seen.
    """
    steps: dict[tuple[int, int], list[Update]] = defaultdict(list)
    for update in history.updates.values():
        if history.mode(update.clock) != "sync":
            continue
        if values[update.element]:
            survived = sum(update.element in elements for _, elements in history.refilled.get(shard, ()))
            steps[update.clock, survived].append(update)
        elif update.acked_at < inf and not history.may_lack(update, shard, inf):
            raise Violation(f"shard {shard}: update {update.element} was acknowledged and is not in any average")
    for (clock, _), updates in steps.items():
        total = sum(update.examples for update in updates)
        for update in updates:
            expected, found = update.examples / total, values[update.element]
            if abs(expected - found) > 1e-4 + history.rounding * expected:
                raise Violation(
                    f"shard {shard}: in step {clock}, update {update.element} weighs {found:.4f}, not {expected:.4f}"
                )


def check_coverage(history: History, length: int, epochs: int) -> None:
    """Guarantee 4: in each epoch every example is in a range whose update was acknowledged, or lost with a crashed shard."""
    for epoch in range(epochs):
        covered = bytearray(length)
        for update in history.updates.values():
            with_its_shard = update.lost_with == "ServerLost" and bool(history.refilled)
            if update.epoch == epoch and (update.acked_at < inf or with_its_shard):
                covered[update.start : update.stop] = b"\1" * (update.stop - update.start)
        if not all(covered):
            raise Violation(f"epoch {epoch}: example {covered.index(0)} was completed by nobody")


def check_release(history: History, bound: float) -> None:
    """Guarantee 5: nobody is held up longer than a lease (and what `bound` grants beyond) by the dead."""
    for name, asked, answered in history.waits:
        if answered - asked > bound:
            raise Violation(f"{name} waited {answered - asked:.1f} s for a pull asked at {asked:.1f}, over {bound:.1f}")
