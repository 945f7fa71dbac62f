"""The checkers of the simulation are worth something: each notices the fault that it is there for.

Rules
- A fault is one subclass of a real core. The checker of that guarantee must complain within `ENOUGH` schedules, and the sound
  cores must pass the very schedule in which it did.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from history import Violation, check_coverage, check_cuts, check_once, check_release, check_staleness
from simapp import Cluster, Job
from simnet import Faults
from test_simulation import judge, play

from shoal.protocol.effects import Effect, Received
from shoal.protocol.evaluating import Sums
from shoal.protocol.messages import Claim, Leased, Message, Pull, Push
from shoal.ps.coordinator import Coordinator
from shoal.ps.members import Life
from shoal.ps.shard import Shard
from shoal.ps.weights import Weights

ENOUGH = 25


class OneTooFar(Shard):
    """The bound is off by one."""

    def _within(self, incarnation: int, clock: int) -> bool:
        return super()._within(incarnation, clock - 1)


class Hasty(Shard):
    """A pull does not wait for the reader's own pushes."""

    def handle(self, event: Any, now: float) -> list[Effect]:
        if isinstance(event, Received) and isinstance(event.message, Pull):
            event = Received(event.peer, replace(event.message, after=0))
        return super().handle(event, now)


class Forgetful(Shard):
    """A push that comes again is applied again."""

    def handle(self, event: Any, now: float) -> list[Effect]:
        again = False
        if isinstance(event, Received) and isinstance(event.message, Push):
            inbox = self._inboxes.get(event.message.incarnation)
            again = inbox is not None and event.message.seq <= inbox.applied and event.message.shard == self.incarnation
        effects = super().handle(event, now)
        if again and self.weights is not None and self.weights.filled:
            self.weights.apply(event.message, 1)
        return effects


class Careless(Shard):
    """Now and then a push is acknowledged and not applied."""

    def _gradients(self, push: Push, clock: int | None) -> None:
        if push.seq % 5:
            super()._gradients(push, clock)


class Unweighted(Shard):
    """The average does not look at the examples."""

    def _push(self, push: Push) -> None:
        super()._push(replace(push, examples=1.0))


class Twice(Shard):
    """A step is applied twice."""

    def _close_step(self, weights: Weights) -> None:
        average = weights._average
        super()._close_step(weights)
        weights._average = average
        super()._close_step(weights)


class Negligent(Coordinator):
    """What a dead worker held counts as done instead of being leased again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        end = self.partitions.end

        def finish(incarnation: int) -> None:
            for job in self.partitions.jobs.values():
                for lease, held in list(job.leased.items()):
                    if held.incarnation == incarnation:
                        self.partitions.complete(incarnation, lease, held.stop - held.start)
            end(incarnation)

        self.partitions.end = finish  # type: ignore[method-assign]


class Rewriting(Shard):
    """A pull that is repeated is written to the region again."""

    def _values(self, pull: Pull) -> None:
        self._shared._said.clear()
        super()._values(pull)


class Credulous(Shard):
    """What left early counts, whatever its worker says at the end of the step."""

    def _push(self, push: Push) -> None:
        super()._push(replace(push, held=True) if push.advance else push)


class Unready(Shard):
    """What left early is forgotten."""

    def _push(self, push: Push) -> None:
        if self.weights is not None and push.advance:
            self.weights._held.clear()
        super()._push(push)


class Restless(Shard):
    """It goes on while a cut is made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cuts.must_wait = lambda push: False  # type: ignore[method-assign]


class Halfway(Shard):
    """It takes a step for whole of which only a part has come."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        applied = self.cuts.applied
        self.cuts.applied = lambda operation, at_once: applied(operation, False)  # type: ignore[method-assign]


class Presumptuous(Shard):
    """A restarted shard does not wait for those who may run on."""

    def _open(self) -> None:
        self._unheard.clear()
        super()._open()


class Skipping(Coordinator):
    """What a restarted coordinator is told of is the newest epoch under way, not the oldest."""

    def _try_claim(self, life: Life, message: Claim) -> Message | None:
        answer = super()._try_claim(life, message)
        return replace(answer, oldest=answer.epoch) if isinstance(answer, Leased) else answer


class Twofold(Coordinator):
    """The first part of an evaluation that is measured is given to somebody else as well."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        measured = self.evaluations._measured

        def twice(said: Sums, now: float) -> bool:
            for known in self.evaluations.sets.values():
                run = known.running
                if run is not None and not run.examples and said.lease in run.leased and not said.why:
                    part = run.leased[said.lease]
                    run.free.append((part.start, part.stop))
            return measured(said, now)

        self.evaluations._measured = twice  # type: ignore[method-assign]


class Patient(Coordinator):
    """The dead are evicted three leases late."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.members._lease *= 4


def staleness(cluster: Cluster) -> None:
    check_staleness(cluster.history)


def once(cluster: Cluster) -> None:
    check_once(cluster.history, cluster.final_values())


def cuts(cluster: Cluster) -> None:
    check_cuts(cluster.history)


def evaluations(cluster: Cluster) -> None:
    cluster.check_evaluations()


def coverage(cluster: Cluster) -> None:
    check_coverage(cluster.history, cluster.job.length, cluster.job.epochs)


CRASHES: dict[str, Any] = {"kinds": ("server",), "workers": 4, "min_workers": 1}
"""A server must crash at the wrong moment: such faults show in one schedule of twelve."""
UNEVEN = Job(length=30, batch=4, size=4, epochs=2)
CUTS: dict[str, Any] = {"cuts": 8, "mode": "async", "workers": 4, "shards": 3, "job": Job(80, 4, 4, 1)}
FAULTS: dict[str, tuple[dict[str, Any], Callable[[Cluster], None], str]] = {
    "one too far": ({"make_shard": OneTooFar, "mode": "async", "staleness": 1.0}, staleness, r"lacks update|while w\d"),
    "one too far in sync": ({"make_shard": OneTooFar, "mode": "sync"}, staleness, r"lacks|while w\d"),
    "own updates missing": ({"make_shard": Hasty, "mode": "async"}, staleness, "lacks the reader's own"),
    "no deduplication": (
        {"make_shard": Forgetful, "mode": "async", "sharing": False},
        once,
        r"was applied -?\d+ times",
    ),
    "acknowledged, not applied": ({"make_shard": Careless, "mode": "async"}, once, "acknowledged and is not there"),
    "not in the average": ({"make_shard": Careless, "mode": "sync"}, once, "is not in any average"),
    "examples ignored": ({"make_shard": Unweighted, "mode": "sync", "job": UNEVEN}, once, r"weighs"),
    "changed since it left": ({"make_shard": Credulous, "mode": "async", "sharing": False}, once, "applied|changed"),
    "what left is lost": (
        {"make_shard": Unready, "mode": "async", "sharing": False},
        once,
        "acknowledged and is not there",
    ),
    "a step twice": ({"make_shard": Twice, "mode": "sync"}, once, "weighs"),
    "restarted, and sure of itself": (
        {"make_shard": Presumptuous, "mode": "async", "staleness": 0.0, "job": Job(200, 4, 8, 1)} | CRASHES,
        staleness,
        r"lacks update|while w\d",
    ),
    "an epoch skipped": (
        {"make_coordinator": Skipping, "job": Job(12, 4, 4, 6)} | CRASHES,
        coverage,
        "completed by nobody",
    ),
    "a cut of several moments": ({"make_shard": Restless} | CUTS, cuts, "a cut at .* has step"),
    "a cut through a step": ({"make_shard": Halfway, "faults": Faults(delay=0.2)} | CUTS, cuts, "a cut at .* has step"),
    "a part of an evaluation twice": (
        {"make_coordinator": Twofold, "evaluations": 2, "job": Job(80, 4, 4, 1)},
        evaluations,
        "evaluation",
    ),
    "data of the dead": ({"make_coordinator": Negligent}, coverage, "completed by nobody"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str) -> None:
    """By the checker of the guarantee that it breaks; the sound cores pass the same schedule."""
    overrides, check, complaint = FAULTS[fault]
    sound = {name: value for name, value in overrides.items() if not name.startswith("make_")}
    enough = ENOUGH if "kinds" not in overrides else 8 * ENOUGH
    complaints = ((seed, said) for seed in range(enough) if (said := verdict(seed, overrides, check)))
    noticed = dict(islice(complaints, 3))
    assert len(noticed) == 3, f"{enough} schedules, and {len(noticed)} noticed"
    for seed, said in noticed.items():
        assert re.search(complaint, said), said
        judge(play(seed, **sound))


def verdict(seed: int, overrides: dict[str, Any], check: Callable[[Cluster], None]) -> str:
    """What the checker says of this schedule; "" if it has no complaint."""
    broken = play(seed, **overrides)
    broken.run(120.0)
    try:
        check(broken)
    except Violation as violation:
        return str(violation)
    return ""


def test_a_late_write_is_noticed() -> None:
    """A region that changes while its worker reads it: the worker itself sees that, where a pull had to be repeated."""
    noticed = 0
    for seed in range(3 * ENOUGH):
        broken = play(seed, sharing=True, make_shard=Rewriting, faults=Faults(repeat=0.5, delay=0.2))
        broken.sim.strange.clear()
        try:
            broken.run(120.0)
        except Violation as violation:
            noticed += "while nobody waited" in str(violation)

    assert noticed >= 3


@pytest.mark.parametrize(("coordinator", "noticed"), [(Coordinator, False), (Patient, True)])
def test_a_late_eviction_is_noticed(coordinator: type[Coordinator], noticed: bool) -> None:
    """Guarantee 5: with an eviction in time nobody complains, with a late one the checker does."""
    cluster = Cluster(
        7, workers=3, shards=2, staleness=0.0, job=Job(800, 4, 8, 1), min_workers=3, make_coordinator=coordinator
    )
    cluster.sim.at(0.5, lambda: cluster.crash_worker("w0"))
    assert cluster.run()

    if noticed:
        with pytest.raises(Violation, match="waited"):
            check_release(cluster.history, cluster.lease + 1.0)
    else:
        check_release(cluster.history, cluster.lease + 1.0)
