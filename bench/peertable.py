"""What `shoal bench peers` found, for people: tables and a drawing.

Rules
- In brackets: a contestant's time / shoal's. Above 1 shoal is ahead; it is said as well where it is not.
- A table on a terminal; the same as plain lines, never folded, anywhere else. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .table import PLAIN_WIDTH, size_text, time_text

OURS, LIMIT = "shoal", "memory"
TITLES = {
    "shoal": "shoal",
    "shoal-own": "shoal, own arrays",
    "shoal-tcp": "shoal, TCP",
    "torch-rpc": "torch RPC",
    "ray": "Ray actor",
    "zmq": "raw ZeroMQ",
    "gloo": "gloo, by hand",
    "gloo-all-reduce": "gloo all-reduce",
    "memory": "(limit: memory)",
}
WAYS = {
    "push": "push",
    "pull": "pull, into the worker's buffers",
    "view": "pull, left where the library hands it out",
    "step": "push and pull",
}


def title(name: str) -> str:
    return TITLES.get(name, name)


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    machine = report["machine"]
    known = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    console.print(Text(f"{machine['cpus']} CPUs, {machine['platform']}\nPython {machine['python']}, {known}"))
    console.print(Text(f"medians of {report['repeat']} turns; in brackets theirs / shoal's: above 1 shoal is ahead\n"))
    for way, words in WAYS.items():
        table = Table(box=None, pad_edge=False, header_style="dim")
        for number, head in enumerate((words, *(size_text(size["bytes"]) for size in report["sizes"]))):
            table.add_column(head, justify="right" if number else "left", no_wrap=True)
        for name in names(report):
            cells = [cell(size, name, way) for size in report["sizes"]]
            if any(cells):
                table.add_row(title(name), *cells)
        console.print(table, "\n")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("", "idle, of a core"):
        table.add_column(head, justify="right" if head else "left")
    for name in names(report):
        table.add_row(title(name), f"{idle(report, name):.1%}")
    console.print(table, "\n")
    for line in (*behind(report), *missing(report), *loads(report)):
        console.print(Text(line))


def names(report: dict[str, Any]) -> list[str]:
    """Who has figures at any size."""
    return list(dict.fromkeys(name for size in report["sizes"] for name in size["contestants"]))


def cell(size: dict[str, Any], name: str, way: str) -> str:
    """A time, and the factor; "" where there is none."""
    found = size["contestants"].get(name, {}).get(way)
    if not found:
        return ""
    ratio = factor(size, name, way)
    return time_text(found["seconds"]) + (f" ({ratio:.2g}x)" if ratio and name != OURS else "")


def factor(size: dict[str, Any], name: str, way: str) -> float:
    """A contestant's time / shoal's; 0 where one of them has none. shoal's pull lies where it is handed out."""
    theirs = size["contestants"].get(name, {}).get(way)
    mine = size["contestants"].get(OURS, {}).get("pull" if way == "view" else way)
    return float(theirs["seconds"] / mine["seconds"]) if mine and theirs else 0.0


def idle(report: dict[str, Any], name: str) -> float:
    """Cores that a contestant used at most with nothing to do."""
    return float(max(size["contestants"][name]["idle"] for size in report["sizes"] if name in size["contestants"]))


def behind(report: dict[str, Any]) -> list[str]:
    """Where somebody is ahead of shoal."""
    found = []
    for size in report["sizes"]:
        for way, words in WAYS.items():
            rivals = [name for name in size["contestants"] if not name.startswith((OURS, LIMIT))]
            factors = {name: factor(size, name, way) for name in rivals}
            ahead = [f"{title(name)} {ratio:.2g}" for name, ratio in factors.items() if 0 < ratio < 1]
            if ahead:
                found.append(f"behind at {size_text(size['bytes'])}, {words}: of shoal's time take {', '.join(ahead)}")
    return found


def missing(report: dict[str, Any]) -> list[str]:
    """Who has no figures, and why."""
    return [
        f"without {title(name)} at {size_text(size['bytes'])}: {why}"
        for size in report["sizes"]
        for name, why in size["without"].items()
    ]


def loads(report: dict[str, Any]) -> list[str]:
    """How busy others kept the machine."""
    return [
        f"cores that the rest of the machine kept busy at {size_text(size['bytes'])}: {size['others']:.2f}"
        for size in report["sizes"]
    ]


def draw(report: dict[str, Any], path: Path) -> None:
    """Times over sizes, both logarithmic, with a bar from the fastest turn to the slowest: `path`.png and `path`.svg."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    panes = figure.subplots(1, 2, sharey=True)
    for pane, way in zip(panes, ("push", "pull"), strict=True):
        for number, name in enumerate(names(report)):
            found = [
                (size["bytes"], size["contestants"][name][way])
                for size in report["sizes"]
                if way in size["contestants"].get(name, {})
            ]
            if not found:
                continue
            middle = [1e3 * times["seconds"] for _, times in found]
            spread = [
                [1e3 * (times["seconds"] - times["fastest"]) for _, times in found],
                [1e3 * (times["slowest"] - times["seconds"]) for _, times in found],
            ]
            line = "--" if name.startswith(f"{OURS}-") else ":" if name == LIMIT else "-"
            pane.errorbar(
                [nbytes for nbytes, _ in found], middle, spread, label=title(name), marker="o", markersize=4, capsize=2,
                elinewidth=0.8, linewidth=2.5 if name == OURS else 1.2, linestyle=line,
                color="k" if name == LIMIT else f"C{number}",
            )  # fmt: skip
        pane.set(xscale="log", yscale="log", xlabel="bytes", title=WAYS[way])
        pane.grid(alpha=0.3)
    panes[0].set_ylabel("milliseconds")
    panes[0].legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "shoal"}):
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
