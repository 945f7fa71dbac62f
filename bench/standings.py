"""What `shoal bench stragglers` found, for people: tables and a drawing.

Rules
- A table on a terminal; the same as plain lines, never folded, anywhere else.
- matplotlib is imported when something is to be drawn, and not before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .table import PLAIN_WIDTH

WAYS = {"sync": "sync", "ddp": "DDP, gloo"}


def way_text(case: dict[str, Any]) -> str:
    return WAYS.get(case["way"], f"staleness {case['way']}")


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    machine, plan = report["machine"], report["plan"]
    console.print(
        Text(
            f"{machine['cpus']} CPUs, {machine['platform']}\n"
            f"Python {machine['python']}, torch {machine['torch']}, pyzmq {machine['pyzmq']} (libzmq {machine['libzmq']}), "
            f"shoal {machine['shoal']}\n"
            f"1 shard; a step takes {plan['compute'] * 1e3:g} ms of emulated computing, "
            f"the last worker's {plan['slow']:g} times that;\n"
            f"races of {plan['seconds']:g} s, medians of {plan['repeat']}; target loss {plan['target']:g}\n"
        )
    )
    head: tuple[str, ...]
    head = ("workers", "way", "lr", "steps/s", "to target", "loss", "staleness seen", "delay, median", "delay, 90 %")
    rows = [(str(c["workers"]), way_text(c), *_row(c), seen_text(c["staleness"]), *_delay(c)) for c in report["bounds"]]
    _table(console, head, rows)
    head = ("workers", "remedy", "lr", "steps/s", "to target", "loss", "delay, median", "delay, 90 %")
    _table(console, head, [(str(c["workers"]), c["remedy"], *_row(c), *_delay(c)) for c in report["remedies"]])


def _row(case: dict[str, Any]) -> tuple[str, ...]:
    reached, loss = case["to_target"], case["loss"]
    return (
        f"{case['lr']:g}",
        f"{case['steps_per_second']:.0f}",
        "not reached" if reached is None else f"{reached:.2f} s",
        "not finite" if loss is None else f"{loss:.3g}",
    )


def _delay(case: dict[str, Any]) -> tuple[str, str]:
    delays = {int(k): v for k, v in case["delay"].items()}
    return ("", "") if not delays else (str(quantile(delays, 0.5)), str(quantile(delays, 0.9)))


def quantile(histogram: dict[int, int], part: float) -> int:
    """The least value that so much of a histogram is at or below."""
    wanted, found = part * sum(histogram.values()), 0
    for value in sorted(histogram):
        found += histogram[value]
        if found >= wanted:
            return value
    raise ValueError("an empty histogram")


def seen_text(histogram: dict[str, int]) -> str:
    """The share of each staleness: `0: 61 %, 1: 39 %`; many of them in ranges."""
    total, counts = sum(histogram.values()), {int(k): v for k, v in histogram.items()}
    if not total:
        return ""
    edges = [(k, k) for k in range(4)] + [(4, 8), (9, 63), (64, 64)]
    shares = [(low, high, sum(v for k, v in counts.items() if low <= k <= high) / total) for low, high in edges]
    names = {(4, 8): "4-8", (9, 63): "9-63", (64, 64): "64+"}
    return ", ".join(f"{names.get((a, b), a)}: {share:.0%}" for a, b, share in shares if share >= 0.005)


def _table(console: Console, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in head:
        table.add_column(name, justify="left" if name in ("way", "remedy", "staleness seen") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


# --- the drawing


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw a report to `file`.png and `file`.svg: a row for the bounds, a row for the remedies, as far as there are."""
    from matplotlib.figure import Figure

    rows = [part for part in ("bounds", "remedies") if report[part]]
    figure = Figure(figsize=(13, 4.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for part, row in zip(rows, axes, strict=True):
        _draw_bounds(report, row) if part == "bounds" else _draw_remedies(report, row)
    plan = report["plan"]
    figure.suptitle(
        f"One worker takes {plan['slow']:g} times as long; {plan['compute'] * 1e3:g} ms a step, emulated by sleeping; "
        f"medians of {plan['repeat']}"
    )
    for suffix, extra in ((".png", {"dpi": 110}), (".svg", {"metadata": {"Date": None}})):
        figure.savefig(file.with_name(file.name + suffix), **extra)


def _draw_bounds(report: dict[str, Any], axes: Any) -> None:
    most = max(case["workers"] for case in report["bounds"])
    shown = [case for case in report["bounds"] if case["workers"] == most]
    colours = [f"C{number}" for number in range(len(shown))]
    _bars(axes[0], f"steps/s, {most} workers", shown, colours, [case["steps_per_second"] for case in shown])
    _curves(axes[1], report, shown, [way_text(case) for case in shown])
    axes[1].set_title(f"loss over all data, {most} workers")
    for case, colour in zip(shown, colours, strict=True):
        if case["delay"]:
            _steps(axes[2], case["delay"], colour, way_text(case))
    axes[2].set(
        title="delay of a push, in updates of its block", xlabel="updates since it was read", ylabel="share of pushes"
    )
    axes[2].legend(fontsize="small")


def _draw_remedies(report: dict[str, Any], axes: Any) -> None:
    rates = sorted({case["lr"] for case in report["remedies"]})
    for axis, rate in zip(axes, rates[: len(axes)], strict=False):
        shown = [case for case in report["remedies"] if case["lr"] == rate]
        _curves(axis, report, shown, [case["remedy"] for case in shown])
        axis.set_title(f"staleness inf, {shown[0]['workers']} workers, lr {rate:g}")
    for axis in axes[len(rates) :]:
        axis.set_axis_off()


def _bars(
    axis: Any, title: str, shown: Sequence[dict[str, Any]], colours: Sequence[str], values: Iterable[float]
) -> None:
    names = [way_text(case) for case in shown]
    bars = axis.barh(names, list(values), color=colours)
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.invert_yaxis()
    axis.set_title(title)
    axis.margins(x=0.15)


def _curves(axis: Any, report: dict[str, Any], shown: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for case, name in zip(shown, names, strict=True):
        at, loss = zip(*case["curve"], strict=True)
        axis.plot(at, [float("nan") if value is None else value for value in loss], label=name, linewidth=1.3)
    axis.axhline(report["plan"]["target"], color="0.6", linewidth=0.8, linestyle="--")
    axis.set(xlabel="seconds", ylabel="loss", yscale="log")
    axis.legend(fontsize="small")


def _steps(axis: Any, histogram: dict[str, int], colour: str, name: str) -> None:
    total, most = sum(histogram.values()), max(map(int, histogram))
    axis.plot(
        range(most + 1),
        [histogram.get(str(k), 0) / total for k in range(most + 1)],
        color=colour,
        label=name,
        linewidth=1.3,
    )
