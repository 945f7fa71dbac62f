"""`shoal bench federated`: what protection costs a client and the servers, beside others and as clients grow.

Parts
- `client`: its vector work beside the keystream's limit, by `shoal.bench.masks`.
- `sum`: a whole secure sum between its halves, without a network: shoal's and Flower's SecAgg+, in turns.
- `rounds`: whole rounds of a real cluster, clear and masked, and of Flower's gRPC server, in turns; nothing is trained.
- `scale`: more clients than this machine could run, simulated.

Rules
- A contestant that is not installed is left out, and the report says so.
- No party's waiting is counted in `sum`; all of it is in `rounds`.
- Medians; turns alternate, each beginning with the next contestant; the first of each is a warm-up.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from ..launch.settings import BadFlag
from ..protocol.secure.noise import Array
from ..ps.recipe import CAP, Recipe
from . import masks, roundtimes, scale
from .arena import Arena
from .fedtable import draw, show
from .peers import need_matplotlib
from .pushpull import machine

PARTS = ("client", "sum", "rounds", "scale")
CLIENTS = (4, 8)
ELEMENTS = (100_000, 1_000_000, 10_000_000)
ROUND_CLIENTS, ROUND_ELEMENTS, ROUND_COUNT = 4, 100_000, 40
SHARDS = 2
CLIP = 8.0
"""Of updates drawn from -0.5 to 0.5; both clip by it."""
Found = dict[str, Any]


def main(
    only: str = "",
    clients: Sequence[int] = CLIENTS,
    elements: Sequence[int] = ELEMENTS,
    simulated: Sequence[int] = scale.CLIENTS,
    rounds: int = scale.ROUNDS,
    repeat: int = 9,
    as_json: bool = False,
    save: str = "",
) -> int:
    """Measure, and print.

    Args:
        only: names of `PARTS` between commas; empty for all. clients, elements: of `sum`. simulated: clients of `scale`.
        rounds: of `scale`'s rounds with drop-outs. repeat: turns that count. save: a path without its ending, for the JSON
            and the plot; empty for none. Parts that are there from before and are not measured now are kept.

    Raises:
        BadFlag: a part that is not there. ConfigError: `save` needs matplotlib, which is not installed.
    """
    wanted = read_parts(only)
    if save:
        need_matplotlib()
    measures: dict[str, Callable[[], Any]] = {
        "client": lambda: client(repeat),
        "sum": lambda: [secure_sum(n, size, repeat) for size in elements for n in clients],
        "rounds": lambda: whole_rounds(ROUND_CLIENTS, ROUND_ELEMENTS, ROUND_COUNT, repeat),
        "scale": lambda: {"growth": scale.growth(simulated), "dropouts": scale.dropouts(rounds)},
    }
    report: Found = {"machine": machine(), "repeat": repeat}
    for part in wanted:
        click.echo(f"measuring {part}", err=True)
        report[part] = measures[part]()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    if save:
        path = Path(save).with_suffix(".json")
        before = json.loads(path.read_text()) if path.exists() else {}
        report = {part: before[part] for part in PARTS if part in before} | report
        path.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, path)
    return 0


def read_parts(typed: str) -> tuple[str, ...]:
    """Raises: BadFlag: one is not there."""
    names = tuple(name.strip() for name in typed.split(",") if name.strip()) or PARTS
    for name in names:
        if name not in PARTS:
            raise BadFlag(f"there is no part {name!r}", hint=f"--only takes {', '.join(PARTS)}")
    return names


def has_flower() -> bool:
    """Is it installed here?"""
    try:
        import flwr  # noqa: F401
    except ImportError:
        return False
    return True


def client(repeat: int) -> Found:
    """25 million float32 and 10 neighbours, by modulus."""
    update = np.random.default_rng(0).standard_normal(masks.ELEMENTS, dtype=np.float32)
    update *= masks.CLIP / 10
    rows = [masks.modulus(update, masks.NEIGHBOURS, bits, repeat) for bits in (32, 16)]
    return {"elements": masks.ELEMENTS, "neighbours": masks.NEIGHBOURS, "moduli": rows}


def secure_sum(clients: int, elements: int, repeat: int) -> Found:
    """One size: of each contestant the medians over turns.

    Returns:
        `clients`, `elements`, and by contestant `client`, processor seconds of the median client; `server`, of all servers
        together; `slowest`, of the busiest of them, as they run at the same time; `said`, `heard`, bytes of the median client;
        `error`, the largest of an element of the average.
    """
    updates = [np.random.default_rng(i).uniform(-0.5, 0.5, elements).astype(np.float32) for i in range(clients)]
    weights = [1 + i % 3 for i in range(clients)]
    exact = np.average(updates, axis=0, weights=weights)
    contestants = {"shoal": _shoal(updates, weights), **_flower(updates, weights)}
    taken: dict[str, list[Found]] = {name: [] for name in contestants}
    for turn in range(1 + repeat):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            average, found = contestants[name]()
            found["error"] = float(np.abs(average - exact).max())
            if turn:
                taken[name].append(found)
            gc.collect()
    return {
        "clients": clients,
        "elements": elements,
        **{name: {key: median(turn[key] for turn in turns) for key in turns[0]} for name, turns in taken.items()},
    }


def _shoal(updates: list[Array], weights: list[int]) -> Callable[[], tuple[Array, Found]]:
    elements = len(updates[0])
    sizes = tuple(len(part) for part in np.array_split(np.empty(elements, np.uint8), SHARDS))
    recipe = Recipe(
        clip=CLIP, cap=CAP, reference=max(1.0, 2.0 ** round(np.log2(np.mean(weights))))
    )  # as of a second round
    arena = Arena(len(updates), sizes, recipe, lambda number: updates[number], lambda number: float(weights[number]))

    def run() -> tuple[Array, Found]:
        costs = arena.round()
        shards = list(costs.shards.values())
        return costs.average, {
            "client": median(costs.clients.values()),
            "server": costs.coordinator + sum(shards),
            "slowest": max(costs.coordinator, *shards),
            "said": median(costs.said.values()),
            "heard": median(costs.heard.values()),
        }

    return run


def _flower(updates: list[Array], weights: list[int]) -> dict[str, Callable[[], tuple[Array, Found]]]:
    if not has_flower():
        return {}
    from .flower import Sum

    theirs = Sum(updates, weights, CLIP)

    def run() -> tuple[Array, Found]:
        average = theirs.run()
        return average, {
            "client": median(theirs.clients.values()),
            "server": theirs.server,
            "slowest": theirs.server,
            "said": median(theirs.said.values()),
            "heard": median(theirs.heard.values()),
        }

    return {"flower": run}


def whole_rounds(clients: int, elements: int, count: int, repeat: int) -> Found:
    """Seconds of a round: of each contestant the median over turns of the median of `count` rounds, in processes of their own."""
    contestants: dict[str, Callable[[], list[float]]] = {
        protection: (lambda name=protection: roundtimes.rounds(name, clients, elements, count))  # type: ignore[misc]
        for protection in ("clear", "secagg")
    }
    if has_flower():
        from .flower import rounds as theirs

        contestants["flower"] = lambda: theirs(clients, elements, count)
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeat):
        names = list(contestants)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(median(contestants[name]()))
    seconds = {name: median(turns) for name, turns in taken.items()}
    return {"clients": clients, "elements": elements, "rounds": count, "seconds": seconds}
