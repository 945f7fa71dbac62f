"""`shoal bench growth`: what happens as a cluster grows.

What there is, by name
- shards, workers, tensors, bytes: the cost of a push and a pull along that axis (`shoal.bench.cost`).
- memory: what a shard holds beside parameters + optimizer state + one snapshot; idle: what workers who do nothing cost the
  servers (`shoal.bench.footprint`).
- simulated: 10 to 1,000 workers and 64 shards, real cores on a virtual clock (`shoal.bench.virtual`).

Rules
- What is simulated says so wherever it is shown.
- A figure that was not taken is left out with its reason, never guessed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..launch.settings import BadFlag
from ..protocol.errors import ConfigError
from . import footprint
from .cost import POINTS, WAYS, cost_rows
from .pushpull import machine
from .table import PLAIN_WIDTH, size_text, time_text

SIMULATED_WORKERS = (10, 100, 1000)
SIMULATED_SHARDS = 64
KINDS_SHOWN = 6
PARTS = (*POINTS, "memory", "idle", "simulated")


def main(only: str = "", repeat: int = 9, as_json: bool = False, plot: str = "") -> int:
    """Measure, and print.

    Args:
        only: some of PARTS, with commas; empty for all.
        repeat: repetitions of what is timed.
        plot: a path without its ending, for a PNG and an SVG; empty for none.

    Raises:
        BadFlag: there is no such part. ConfigError: no matplotlib for a plot, or not on Linux. ShoalError: a process did not start.
    """
    wanted = [name.strip() for name in only.split(",")] if only.strip() else list(PARTS)
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise BadFlag(f"--only {unknown[0]!r} is not one of {', '.join(PARTS)}")
    pyplot = _pyplot() if plot else None  # before the minutes that it takes to measure
    report: dict[str, Any] = {
        "machine": machine(),
        "transport": os.environ.get("SHOAL_TRANSPORT") or "auto",
        "repeat": repeat,
    }
    report["cost"] = {axis: cost_rows(axis, repeat=repeat) for axis in POINTS if axis in wanted}
    report["memory"] = footprint.memory_rows() if "memory" in wanted else []
    report["idle"] = footprint.idle_rows() if "idle" in wanted else {}
    report["simulated"] = simulated() if "simulated" in wanted else []
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    if pyplot is not None:
        draw(report, plot, pyplot)
    return 0


def simulated(workers: Iterable[int] = SIMULATED_WORKERS, shards: int = SIMULATED_SHARDS) -> list[dict[str, Any]]:
    """Clusters of these many workers, after a small one: torch's own start is no message's cost."""
    from .virtual import simulate

    simulate(2, 2, steps=1)
    found = []
    for count in workers:
        click.echo(f"simulated: {count} workers, {shards} shards", err=True)
        found.append(simulate(count, shards))
    return found


# --- for people


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    about = report["machine"]
    console.print(
        f"{about['cpus']} CPUs, {about['platform']}, torch {about['torch']}, shoal {about['shoal']}\n"
        f"transport {report['transport']}, medians of {report['repeat']}\n"
    )
    for axis, rows in report["cost"].items():
        _print(
            console, (axis, "payload", *(way.replace("_", ", ") for way in WAYS), "register"), map(_cost(axis), rows)
        )
    if report["memory"]:
        console.print("a shard's memory beside parameters + optimizer state + one snapshot (at most 1.15)")
        head: tuple[str, ...] = ("", "rule", "parameters", "peak", "of", "steady", "of", "shared with the worker")
        _print(console, head, map(_memory, report["memory"]))
    if report["idle"]:
        idle = report["idle"]
        console.print(f"idle workers: shares of a core, over {idle['seconds']:g} s")
        used = [(f"{r['workers']}", f"{r['coordinator']:.3%}", f"{r['shards']:.3%}") for r in idle["rows"]]
        _print(
            console,
            ("workers", "coordinator", f"{idle['shards']} shards"),
            [*used, ("each", f"{idle['per_worker']:.4%}", "of a core, all servers (at most 0.1 %)")],
        )
    if report["simulated"]:
        console.print("SIMULATED: the real cores on a virtual clock, each server a core of its own, no sockets")
        head = ("workers x shards", "", "server", "in/s", "out/s", "in", "out", "busy", "wait, median", "99 %", "most")
        _print(console, head, (row for run in report["simulated"] for row in _simulated(run)))
        _print(
            console,
            ("what a message costs", "workers", "kind", "median", "of the time"),
            (row for run in report["simulated"] for row in _kinds(run)),
        )


def _print(console: Console, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, "\n")


def _cost(axis: str) -> Callable[[dict[str, Any]], tuple[str, ...]]:
    def row(point: dict[str, Any]) -> tuple[str, ...]:
        name = "" if axis == "bytes" else f"{point[axis]:,}"
        if "skipped" in point:
            return name, size_text(point["bytes"]), f"left out: {point['skipped']}"
        return name, size_text(point["bytes"]), *(time_text(point[way]) for way in (*WAYS, "register"))

    return row


def _memory(row: dict[str, Any]) -> tuple[str, ...]:
    head = (row["transport"], row["rule"], size_text(row["bytes"]))
    if "skipped" in row:
        return *head, f"left out: {row['skipped']}"
    amounts = {name: f"{row[name] / 1e6:.0f} MB" for name in ("peak", "steady", "shared")}
    ratios = (f"{row[f'{name}_ratio']:.2f}" for name in ("peak", "steady"))
    return *head, amounts["peak"], next(ratios), amounts["steady"], next(ratios), amounts["shared"]


def _simulated(run: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for phase, found in run["phases"].items():
        for server in ("coordinator", "shard", "busiest_shard"):
            load = found[server]
            yield (
                f"{run['workers']:,} x {run['shards']}",
                phase,
                server.replace("_", " "),
                *(f"{load[name]:,.0f}" for name in ("heard", "said")),
                *(f"{load[name] / 1e3:,.0f} kB/s" for name in ("bytes_heard", "bytes_said")),
                f"{load['busy']:.1%}",
                *(time_text(load[name]) for name in ("wait_median", "wait_99", "wait_most")),
            )


def _kinds(run: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for server, phases in run["costs"].items():
        for phase, kinds in phases.items():
            total = sum(cost["total"] for cost in kinds.values())
            for kind, cost in list(kinds.items())[:KINDS_SHOWN]:
                share = f"{cost['total'] / total:.0%}"
                yield f"{server}, {phase}", f"{run['workers']:,}", kind, time_text(cost["median"]), share


# --- pictures


def _pyplot() -> Any:
    """
    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed", hint="pip install 'shoal[bench]', or matplotlib alone"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "shoal", "svg.fonttype": "none"}
    from matplotlib import pyplot

    return pyplot


def draw(report: dict[str, Any], path: str, pyplot: Any) -> None:
    """A pane for each axis and part that was measured: `path`.png and `path`.svg."""
    drawn = [(axis, _draw_cost(axis, rows)) for axis, rows in report["cost"].items()]
    if report["memory"]:
        drawn.append(("a shard's memory / (parameters + state + snapshot)", _draw_memory(report["memory"])))
    if report["simulated"]:
        drawn.append(("SIMULATED: share of a core while training", _draw_simulated(report["simulated"])))
    if not drawn:
        return
    figure, panes = pyplot.subplots(-(-len(drawn) // 2), 2, figsize=(11, 3.6 * -(-len(drawn) // 2)), squeeze=False)
    for pane, (title, fill) in zip(panes.flat, drawn, strict=False):
        pane.set_title(title)
        pane.grid(alpha=0.3)
        fill(pane)
    for pane in panes.flat[len(drawn) :]:
        pane.set_visible(False)
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(f"{path}.{ending}", dpi=120, metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)


def _draw_cost(axis: str, rows: list[dict[str, Any]]) -> Callable[[Any], None]:
    taken = [row for row in rows if "skipped" not in row]

    def fill(pane: Any) -> None:
        for way in WAYS:
            pane.loglog([row[axis] for row in taken], [1e3 * row[way] for row in taken], marker="o", label=way)
        pane.set_ylabel("milliseconds")
        times = [1e3 * row[way] for row in taken for way in WAYS] or [1.0]
        pane.set_ylim(min(times) / 3, max(times) * 3)  # at least a decade: noise must not fill the picture
        pane.legend()

    return fill


def _draw_memory(rows: list[dict[str, Any]]) -> Callable[[Any], None]:
    taken = [row for row in rows if "skipped" not in row]

    def fill(pane: Any) -> None:
        names = [f"{row['transport']} {row['rule']}\n{size_text(row['bytes'])}" for row in taken]
        pane.barh(names, [row["peak_ratio"] for row in taken])
        pane.axvline(footprint.LIMIT, color="black", linestyle="--")
        pane.tick_params(axis="y", labelsize=6)

    return fill


def _draw_simulated(runs: list[dict[str, Any]]) -> Callable[[Any], None]:
    def fill(pane: Any) -> None:
        for server in ("coordinator", "shard"):
            busy = [run["phases"]["training"][server]["busy"] for run in runs]
            pane.loglog([run["workers"] for run in runs], busy, marker="o", label=server)
        pane.set_xlabel("workers")
        pane.legend()

    return fill


if __name__ == "__main__":  # the same flags, the same messages
    import sys

    from ..cli import main as command

    sys.argv[1:1] = ["bench", "growth"]
    command()
