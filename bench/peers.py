"""`shoal bench peers`: seconds of a push and of a pull, shoal beside those who could do the same work, in one run.

What is timed, and who takes part, says `shoal.bench.rivals`.

Rules
- Each contestant is processes of its own, started once for a size, and stopped while others have their turn: some burn a core
  while they wait. How much of a core each uses with nothing to do is measured before that, and said.
- Turns go round, each time beginning with the next one, so that noise hits all alike. A turn is a round that is not timed and some
  that are, of which it gives the median. What is printed is the median of the turns. The first turns are a warm-up.
- At the end all weights must be, element by element, what the pushes have made: who has not done the work has no figures.
- Who is not installed, is too slow, or fails, has a reason instead of figures; the others go on without it.
- How busy others kept the machine meanwhile is measured, and said.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import click

from ..protocol.errors import ConfigError, ShoalError
from .peertable import OURS, draw, show
from .pushpull import machine, read_sizes
from .rivals import CONTESTANTS
from .seats import Seat
from .table import size_text
from .turns import Others, opened, rotated, short

SIZES = (400, 40_000, 4_000_000, 100_000_000)
WARM_UP = 2
BYTES_OF_ROUNDS = 4 * 10**7
"""Bytes that a turn moves each way, unless the least rounds are more or the most rounds are less."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
LOOK, LOOKS = 1.0, 4
"""Seconds over which idle processes are looked at, and how often at most."""
LITTLE = 0.01
"""Cores. Who uses less with nothing to do has started, and would disturb nobody."""
START, TURN = 120.0, 60.0
"""Seconds that a contestant has to begin, and for a turn."""

Commands = Mapping[str, Sequence[str]]


def main(sizes: str = "", repeat: int = 9, as_json: bool = False, save: str = "") -> int:
    """Measure, and print.

    Args:
        sizes: as typed; empty for 400 B to 100 MB.
        repeat: turns of each that count.
        save: a path without its ending, for the JSON, a PNG and an SVG; empty for none.

    Raises:
        BadFlag: `sizes` cannot be read. ConfigError: `save` needs matplotlib, which is not installed. ShoalError: shoal itself has
            failed; what was found of the others is printed before.
    """
    wanted = read_sizes(sizes) if sizes.strip() else SIZES
    if save:
        need_matplotlib()
    found = []
    for number, nbytes in enumerate(wanted, 1):
        click.echo(f"measuring {size_text(nbytes)} ({number} of {len(wanted)})", err=True)
        found.append(measured(nbytes, repeat, commands(nbytes), look=LOOK))
    report = {
        "machine": machine(),
        "versions": {name: number for size in found for name, number in size.pop("versions").items()},
        "repeat": repeat,
        "commands": {name: ["python", *command[1:-1], "BYTES"] for name, command in commands(0).items()},
        "sizes": found,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    if save:
        Path(save).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report, Path(save))
    for size in found:
        if OURS in size["without"]:
            raise ShoalError(f"shoal itself has no figures for {size_text(size['bytes'])}: {size['without'][OURS]}")
    return 0


def commands(nbytes: int) -> Commands:
    """What runs each contestant."""
    return {name: (sys.executable, "-P", "-m", "shoal.bench.rivals", name, str(nbytes)) for name in CONTESTANTS}


def measured(
    nbytes: int, repeat: int, contestants: Commands, *, start: float = START, turn: float = TURN, look: float = LOOK
) -> dict[str, Any]:
    """One size.

    Args:
        contestants: commands by name, each as `shoal.bench.seats` wants it. start, turn: seconds that each has. look: seconds over
            which idle processes are looked at.

    Returns:
        `bytes`; `rounds` of a turn; `others`, cores that the rest of the machine used; `contestants`: by name, for each of
        `push, pull, view, step` that it does, seconds as `{"seconds", "fastest", "slowest"}` over turns, with `idle`, cores, and
        `pushes` that were checked; `without`: who has no figures, and why; `versions` of what they have loaded.
    """
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, BYTES_OF_ROUNDS // nbytes))
    taken: dict[str, list[dict[str, list[float]]]] = {name: [] for name in contestants}
    versions: dict[str, str] = {}
    pushes, idle, others = {}, {}, Others()
    with opened() as field:
        for name, command in contestants.items():
            with field.excused(name):
                seat = field.enter(name, command)
                said = seat.answer(start)
                if "ready" not in said:
                    raise ShoalError(str(said.get("absent", said)))
                versions |= said.get("versions", {})
                idle[name] = _idle(seat, look)
                seat.rest()
        for repetition in range(WARM_UP + repeat):
            for name in rotated(list(field.seats), repetition):
                with field.excused(name, f", in turn {repetition + 1}"):
                    with others.beside(field.seats[name]):
                        taken[name].append(field.seats[name].ask({"rounds": rounds}, turn))
                    field.seats[name].rest()
        for name in list(field.seats):
            with field.excused(name):
                checked = field.seats[name].ask({"check": True}, turn)
                if checked["wrong"]:
                    raise ShoalError(f"{checked['pushes']} pushes have left {checked['wrong']} elements wrong")
                pushes[name] = checked["pushes"]
                field.seats.pop(name).close()
    return {
        "bytes": nbytes,
        "rounds": rounds,
        "others": short(others.cores),
        "contestants": {
            name: _figures(taken[name][WARM_UP:]) | {"idle": short(idle[name]), "pushes": pushes[name]}
            for name in contestants
            if name in pushes
        },
        "without": field.without,
        "versions": versions,
    }


def _figures(turns: list[dict[str, list[float]]]) -> dict[str, Any]:
    found = {}
    for way in ("push", "pull", "view", "step"):
        if medians := [median(turn[way]) for turn in turns if way in turn]:
            figures = {"seconds": median(medians), "fastest": min(medians), "slowest": max(medians)}
            found[way] = {name: short(seconds) for name, seconds in figures.items()}
    return found


def _idle(seat: Seat, seconds: float) -> float:
    """Cores that a contestant uses while nobody asks it anything: the least of some looks, for some (Ray) are still starting."""
    least = inf
    for _ in range(LOOKS):
        used, started = seat.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        least = min(least, (seat.cpu_seconds() - used) / (time.perf_counter() - started))
        if least < LITTLE:
            break
    return least


def need_matplotlib() -> None:
    """Raises: ConfigError: it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--save needs matplotlib, which is not installed", hint="pip install matplotlib") from None
