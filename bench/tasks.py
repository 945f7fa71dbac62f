"""`shoal bench tasks`: small tasks a second, and how long each waits at half of that; shoal beside Ray actors, in one run.

What is timed, and who takes part, says `shoal.bench.taskrivals`.

Rules
- Turns as `shoal.bench.turns` has them. First all at full speed; then all at rates that follow from that: each at half of its own,
  all at half of the slowest one's, and at half of the aim where they can.
- What is printed is the median of the turns. The first turn is a warm-up.
- Every answer must be right: who has given a wrong one has no figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..protocol.errors import ShoalError
from .pushpull import machine
from .table import PLAIN_WIDTH, time_text
from .taskrivals import CONTESTANTS, EXECUTORS, WINDOW
from .turns import Field, Others, opened, rotated, short

OURS = "shoal"
TITLES = {"shoal": "shoal", "ray": "Ray actors", "ray-together": "Ray actors, 64 a call"}
AIM, AIM_P99 = 5000.0, 0.020
"""Tasks a second with two executors on two cores, and seconds to 99 % of the answers at half of that."""
WARM_UP = 1
START, PATIENCE = 180.0, 120.0
"""Seconds that a contestant has to begin, and for a turn beside the seconds of it."""

Commands = Mapping[str, Sequence[str]]
Found = dict[str, Any]


def main(repeat: int = 5, seconds: float = 3.0, as_json: bool = False, save: str = "") -> int:
    """Measure, and print.

    Args:
        repeat: turns of each that count. seconds: of a turn. save: a path for the JSON, without its ending; empty for none.

    Raises:
        ShoalError: shoal itself has failed; what was found of the others is printed before.
    """
    report: Found = {
        "machine": machine(),
        "executors": EXECUTORS,
        "window": WINDOW,
        "repeat": repeat,
        "seconds": seconds,
    }
    report |= measured(repeat, seconds, commands())
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    if save:
        Path(save).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    if OURS in report["without"]:
        raise ShoalError(f"shoal itself has no figures: {report['without'][OURS]}")
    return 0


def commands() -> Commands:
    """What runs each contestant."""
    return {name: (sys.executable, "-P", "-m", "shoal.bench.taskrivals", name) for name in CONTESTANTS}


def measured(repeat: int, seconds: float, contestants: Commands, start: float = START) -> Found:
    """All of it.

    Args:
        contestants: commands by name, each as `shoal.bench.seats` wants it. start: seconds that each has to begin.

    Returns:
        `contestants`: by name `tasks_per_s`, as the median, least and most of the turns; `rates`, a list of `rate`, `p50`, `p99`
        and `most`, seconds, medians of the turns; `tasks` that were checked. `without`: who has no figures, and why.
        `others`, cores that the rest of the machine used; `versions` of what was loaded.
    """
    versions: dict[str, str] = {}
    found: dict[str, Found] = {}
    others = Others()
    with opened() as field:
        for name, command in contestants.items():
            with field.excused(name):
                said = field.enter(name, command).answer(start)
                if "ready" not in said:
                    raise ShoalError(str(said.get("absent", said)))
                versions |= said.get("versions", {})
                field.seats[name].rest()
        speeds = _turns(field, others, repeat, seconds, {name: [0.0] for name in field.seats})
        for name in field.seats:
            each = [turn["tasks_per_s"] for turn in speeds[name, 0.0]]
            figures = {"median": median(each), "least": min(each), "most": max(each)}
            found[name] = {"tasks_per_s": {of: short(value) for of, value in figures.items()}, "rates": []}
        slowest = min((each["tasks_per_s"]["median"] for each in found.values()), default=inf)
        rates = {name: _rates(each["tasks_per_s"]["median"], slowest) for name, each in found.items()}
        paced = _turns(field, others, repeat, seconds, rates)
        for name in list(found):
            if name not in field.seats:
                del found[name]
                continue
            for rate in rates[name]:
                turns = paced[name, rate]
                figures = {of: short(median(turn[of] for turn in turns)) for of in ("p50", "p99", "most")}
                found[name]["rates"].append({"rate": rate, **figures})
            taken = [turn for (of, _), turns in (speeds | paced).items() if of == name for turn in turns]
            found[name]["tasks"] = sum(turn["tasks"] for turn in taken)
            field.seats.pop(name).close()
    return {"contestants": found, "without": field.without, "others": short(others.cores), "versions": versions}


def _rates(own: float, slowest: float) -> list[float]:
    """Tasks a second that one is asked for, the fewest first."""
    wanted = {short(own / 2), short(slowest / 2)} | ({AIM / 2} if own > AIM / 2 else set())
    return sorted(wanted)


def _turns(
    field: Field, others: Others, repeat: int, seconds: float, rates: Mapping[str, Sequence[float]]
) -> dict[tuple[str, float], list[Found]]:
    """What each has found at each of its rates, by turn."""
    taken: dict[tuple[str, float], list[Found]] = {(name, rate): [] for name, each in rates.items() for rate in each}
    for turn in range(WARM_UP + repeat):
        for name in rotated(list(field.seats), turn):
            with field.excused(name, f", in turn {turn + 1}"):
                seat = field.seats[name]
                for rate in rates[name]:
                    with others.beside(seat):
                        said = seat.ask({"rate": rate, "seconds": seconds, "seed": turn}, seconds + PATIENCE)
                    if said["wrong"]:
                        raise ShoalError(f"{said['wrong']} of {said['tasks']} answers were wrong")
                    if turn >= WARM_UP:
                        taken[name, rate].append(said)
                seat.rest()
    return taken


def show(report: Found) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    known = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    about = report["machine"]
    console.print(Text(f"{about['cpus']} CPUs, {about['platform']}\nPython {about['python']}, {known}"))
    console.print(
        Text(
            f"{report['executors']} executors, tasks of one row; at full speed {report['window']} under way, then tasks that come "
            f"by themselves; medians of {report['repeat']} turns of {report['seconds']:g} s\n"
        )
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, head in enumerate(("", "tasks/s", "least to most", "at", "median", "99 %", "most")):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for name, figures in report["contestants"].items():
        speed = figures["tasks_per_s"]
        row = [TITLES.get(name, name), f"{speed['median']:,.0f}", f"{speed['least']:,.0f} to {speed['most']:,.0f}"]
        for each in figures["rates"]:
            table.add_row(*row, f"{each['rate']:,.0f}/s", *(time_text(each[of]) for of in ("p50", "p99", "most")))
            row = ["", "", ""]
    console.print(table, "\n")
    for line in (*aims(report), *missing(report)):
        console.print(Text(line))
    console.print(Text(f"cores that the rest of the machine kept busy: {report['others']:.2f}"))


def aims(report: Found) -> list[str]:
    """What was aimed at, and what came of it."""
    mine = report["contestants"].get(OURS)
    if mine is None:
        return []
    speed = mine["tasks_per_s"]["median"]
    said = [f"aim {AIM:,.0f} tasks/s: {'reached' if speed >= AIM else 'not reached'}, {speed:,.0f}"]
    for each in mine["rates"]:
        if each["rate"] == AIM / 2:
            words = "reached" if each["p99"] < AIM_P99 else "not reached"
            said.append(f"aim {time_text(AIM_P99)} at {AIM / 2:,.0f}/s for 99 %: {words}, {time_text(each['p99'])}")
    return said


def missing(report: Found) -> list[str]:
    """Who has no figures, and why."""
    return [f"without {TITLES.get(name, name)}: {why}" for name, why in report["without"].items()]
