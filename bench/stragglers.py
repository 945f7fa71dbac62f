"""`shoal bench stragglers`: what one slow worker costs, by staleness bound, beside `sync` and torch DDP over gloo.

What is raced
- 2 to 4 worker processes (`shoal.bench.racer`) train the same small network on scikit-learn's digits, with a coordinator and one
  shard; the last of them is slower by a factor.
- The compute time of a step is EMULATED: a sleep, from which the step's own arithmetic is taken off. So several workers on few
  cores do not stand in each other's way, and what is compared is who waits for whom.
- bounds: staleness 0, 1, 3, 8, inf; `sync`; DDP. Every gradient of a batch is an update of its own in `async`; in `sync` and DDP
  they are averaged into one, at a learning rate multiplied by the number of workers (the linear scaling rule, Goyal et al. 2017).
- remedies: staleness inf, at several learning rates, with nothing done about stale gradients, `stale="scale"` (Zhang et al.
  2016), and `"compensate"`, plain and adaptive (Zheng et al. 2017).

What is found, as medians over the repetitions, each with a seed of its own that gives first weights and batches
- steps of all workers together, per second.
- seconds until the loss over all of the data is at the target, seen at racer 0, a fast one. The loss is computed after the race
  from copies of the weights, so that looking costs nothing. None: not in most of the races.
- loss: when the time is over; None if it is no number any more. (DDP makes a number of steps that is fixed before, as its racers
  cannot end one by one; what comes after the time does not count.)
- staleness: how often a pull saw which staleness (own clock minus least clock). delay: how often a push was older than
  its block by how many updates (SPEC §13.2).

Rules
- All ways of one seed run before the next seed begins, so that noise hits all alike. A fresh server for each race.
"""

from __future__ import annotations

import json
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from ..launch.cluster import LocalCluster
from ..launch.settings import BadFlag
from ..protocol.errors import ConfigError, ShoalError
from . import standings
from .limits import GRACE, TIMEOUT
from .pushpull import machine

WORKERS = (2, 3, 4)
PARTS = ("bounds", "remedies")
BOUNDS = ("0", "1", "3", "8", "inf", "sync", "ddp")
REMEDIES: dict[str, Any] = {
    "none": None,
    "scale": "scale",
    "compensate 0.04": [0.04, 0.0],
    "adaptive 2": [2.0, 1.0],
    "adaptive 0.5": [0.5, 1.0],
}
"""As orders say them. The first two numbers are the paper's, the last suits this model."""
RATES = (0.2, 0.6, 0.8)
REPORTED = 3.0
"""Seconds for a shard's last report of its counters to arrive."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. `compute` is a fast worker's seconds a step, `slow` the factor of the last one, `seconds` a race's."""

    workers: tuple[int, ...] = (2, 4)
    parts: tuple[str, ...] = PARTS
    compute: float = 0.01
    slow: float = 4.0
    seconds: float = 6.0
    repeat: int = 3
    lr: float = 0.2
    rates: tuple[float, ...] = RATES
    target: float = 0.3


@dataclass(frozen=True, slots=True)
class Case:
    """One way to train."""

    workers: int
    way: str
    lr: float
    remedy: str = "none"

    def __str__(self) -> str:
        names = {"sync": "sync", "ddp": "DDP, gloo"}
        bound = names.get(self.way, f"staleness {self.way}")
        return f"{self.workers} workers, {bound}, lr {self.lr:g}" + f", {self.remedy}" * (self.remedy != "none")


@dataclass(slots=True)
class Race:
    """What one race came to."""

    steps_per_second: float
    to_target: float
    curve: list[tuple[float, float]]
    staleness: Counter[int] = field(default_factory=Counter)
    delay: Counter[int] = field(default_factory=Counter)


def main(plan: Plan, as_json: bool = False, plot: str = "") -> int:
    """Measure, and print.

    Args:
        plot: where to draw it: PLOT.png and PLOT.svg; nowhere if empty.

    Raises:
        BadFlag: the plan makes no sense. ConfigError: a package is missing. ShoalError: a process did not start or does not answer.
    """
    check(plan, plot)
    report = {"machine": machine(), "plan": described(plan), **measure(plan)}
    if plot:
        standings.draw(report, Path(plot))
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        standings.show(report)
    return 0


def read_workers(typed: str) -> tuple[int, ...]:
    """Numbers of workers, in the order given.

    Raises:
        BadFlag: one of them is not from 2 to 4.
    """
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in typed.split(",")]
    if not set(numbers) <= set(WORKERS):
        raise BadFlag(f"--workers: {typed!r} is not a list of {', '.join(map(str, WORKERS))}, such as 2,4")
    return tuple(dict.fromkeys(numbers))


def read_rates(typed: str) -> tuple[float, ...]:
    """Learning rates, in the order given.

    Raises:
        BadFlag: one of them is no number above 0.
    """
    try:
        rates = tuple(dict.fromkeys(map(float, typed.split(","))))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < math.inf for rate in rates):
        raise BadFlag(f"--rates: {typed!r} is not a list of learning rates, such as 0.1,0.4")
    return rates


def check(plan: Plan, plot: str) -> None:
    """
    Raises:
        BadFlag, ConfigError: it could not be measured, or not be drawn.
    """
    for name in ("compute", "seconds", "lr", "target", "slow"):
        if not 0 < getattr(plan, name) < math.inf:
            raise BadFlag(f"--{name} must be a number above 0, not {getattr(plan, name):g}")
    if plot and not Path(plot).absolute().parent.is_dir():
        raise BadFlag(f"--plot: there is no folder for {plot!r}")
    try:
        import sklearn  # noqa: F401

        if plot:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"this benchmark needs {error.name}", hint="pip install 'shoal[bench]'") from None


def described(plan: Plan) -> dict[str, Any]:
    """The plan, as the JSON says it."""
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def cases(plan: Plan) -> dict[str, list[Case]]:
    """What is raced, by part of the plan."""
    bounds = [
        Case(n, way, plan.lr * (n if way in ("sync", "ddp") else 1))
        for n in plan.workers
        for way in BOUNDS
        if "bounds" in plan.parts
    ]
    most = max(plan.workers)
    remedies = [Case(most, "inf", lr, remedy) for lr in plan.rates for remedy in REMEDIES if "remedies" in plan.parts]
    return {"bounds": bounds, "remedies": remedies}


def measure(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Every case, with its medians."""
    wanted = cases(plan)
    races: dict[Case, list[Race]] = {}
    total, number = plan.repeat * len({case for part in wanted.values() for case in part}), 0
    for seed in range(plan.repeat):
        done: set[Case] = set()
        for workers in plan.workers:
            chosen = [c for part in wanted.values() for c in part if c.workers == workers]
            if not chosen:
                continue
            with racers(workers) as started:
                for case in chosen:
                    if case in done:
                        continue
                    done.add(case)
                    number += 1
                    click.echo(f"{case}, seed {seed} ({number} of {total})", err=True)
                    races.setdefault(case, []).append(race(plan, case, seed, started))
    return {part: [figures(case, races[case], plan) for case in chosen] for part, chosen in wanted.items()}


# --- one race


Racers = Sequence["subprocess.Popen[bytes]"]


@contextmanager
def racers(count: int) -> Iterator[Racers]:
    """Starts the workers' processes, and ends them."""
    command = [sys.executable, "-P", "-m", f"{__package__}.racer"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": _loopback(), "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            started.append(
                subprocess.Popen(
                    [*command, str(number)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends the others
                )
            )
        yield started
    finally:
        for process in started:
            assert process.stdin
            with suppress(BrokenPipeError):  # it has ended by itself
                process.stdin.close()
        for process in started:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout
            process.stdout.close()


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def race(plan: Plan, case: Case, seed: int, started: Racers) -> Race:
    """All racers, once."""
    order = {"way": "shoal", "seed": seed, "lr": case.lr, "seconds": plan.seconds, "stale": REMEDIES[case.remedy]}
    slowest = plan.compute * plan.slow
    with ExitStack() as stack:
        cluster = None
        if case.way == "ddp":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            steps = max(1, math.ceil(plan.seconds / max(slowest, plan.compute)))
            order |= {"way": "ddp", "workers": case.workers, "steps": steps, "store": str(Path(folder) / "store")}
        else:
            settings = {"mode": "sync"} if case.way == "sync" else {"mode": "async", "staleness": float(case.way)}
            cluster = stack.enter_context(
                LocalCluster(bind="127.0.0.1", shards=1, min_workers=case.workers, **settings)
            )
            order |= {"join": cluster.join}
        paces = [plan.compute] * (case.workers - 1) + [slowest]
        found = _together(started, [order | {"compute": pace} for pace in paces], plan.seconds + TIMEOUT)
        steps = sum(one["steps"] for one in found)
        curve = [
            (at, loss if math.isfinite(loss) else math.inf) for at, loss in found[0]["curve"] if at <= plan.seconds
        ]
        made = Race(
            sum(one["steps"] / one["seconds"] for one in found),
            next((at for at, loss in curve if loss <= plan.target), math.inf),
            curve,
        )
        for one in found:
            made.staleness.update({int(k): count for k, count in one["staleness"].items()})
        if cluster is not None and case.way != "sync":
            made.delay = _delays(cluster, steps)
    return made


def _together(started: Racers, orders: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Give each racer its order, and wait for all."""
    try:
        for process, order in zip(started, orders, strict=True):
            assert process.stdin
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
    except OSError as error:
        raise ShoalError(f"a racer has ended: {error}") from error
    waited_for = {process.stdout: number for number, process in enumerate(started) if process.stdout}
    deadline = time.monotonic() + seconds
    found: dict[int, dict[str, Any]] = {}
    while waited_for:
        ready, _, _ = select.select(list(waited_for), [], [], max(0.0, deadline - time.monotonic()))
        lines = [(waited_for.pop(pipe), pipe.readline()) for pipe in ready]
        ended = [number for number, line in lines if not line] if lines else list(waited_for.values())
        if ended:  # one that has ended would leave the others waiting
            said = "has ended" if lines else "does not answer"
            raise ShoalError(f"racer {ended[0]} of {len(started)} {said}", hint="what it has said is above")
        found |= {number: json.loads(line) for number, line in lines}
    return [found[number] for number in range(len(started))]


def _delays(cluster: LocalCluster, pushes: int) -> Counter[int]:
    """What the shard has counted, when all pushes are in its report; or after a while what is."""
    deadline = time.monotonic() + REPORTED
    while True:
        counters = cluster.status()["shards"][0]["counters"]
        found = Counter({int(k[6:]): int(v) for k, v in counters.items() if k.startswith("stale.")})
        if found.total() >= pushes or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


# --- what it comes to


def figures(case: Case, races: Sequence[Race], plan: Plan) -> dict[str, Any]:
    """One case, as the JSON says it."""
    reached = median(one.to_target for one in races)
    ends = [one.curve[-1][1] for one in races]
    return {
        "workers": case.workers,
        "way": case.way,
        "lr": case.lr,
        "remedy": case.remedy,
        "steps_per_second": _short(median(one.steps_per_second for one in races)),
        "to_target": _short(reached),
        "each_to_target": [_short(one.to_target) for one in races],
        "loss": _short(median(ends)),
        "each_loss": [_short(end) for end in ends],
        "staleness": _histogram(one.staleness for one in races),
        "delay": _histogram(one.delay for one in races),
        "curve": median_curve([one.curve for one in races], plan.seconds),
    }


def median_curve(curves: Sequence[Sequence[tuple[float, float]]], seconds: float) -> list[list[float | None]]:
    """Seconds and the median loss at that time, at a hundred times; each curve holds its last value until the next."""
    found = []
    for tick in range(101):
        at = seconds * tick / 100
        values = [next((loss for when, loss in reversed(curve) if when <= at), curve[0][1]) for curve in curves]
        found.append([_short(at), _short(median(values))])
    return found


def _histogram(counters: Iterator[Counter[int]]) -> dict[str, int]:
    total: Counter[int] = Counter()
    for counter in counters:
        total.update(counter)
    return {str(key): total[key] for key in sorted(total)}


def _short(number: float) -> float | None:
    """Four digits that count; None for what is not finite, as JSON has it."""
    return float(f"{number:.4g}") if math.isfinite(number) else None


if __name__ == "__main__":  # the same flags, the same messages
    from ..cli import main as command

    sys.argv[1:1] = ["bench", "stragglers"]
    command()
