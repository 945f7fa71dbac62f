"""What `shoal bench pushpull` found, for people.

Rules
- A table on a terminal; the same as plain lines, never folded, anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 200


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    machine, shards = report["machine"], report["shards"]
    console.print(
        Text(
            f"{machine['cpus']} CPUs, {machine['platform']}\n"
            f"Python {machine['python']}, torch {machine['torch']}, pyzmq {machine['pyzmq']} (libzmq {machine['libzmq']}), "
            f"shoal {machine['shoal']}\n"
            f"{shards} shard{'s' * (shards > 1)}, 1 worker, updates by {report['optimizer']}, medians of {report['repeat']}; "
            "a ratio is limit / ours: 1.00 is as fast as the limit\n"
        )
    )
    for way in ("push", "push_streamed", "pull", "push_own", "pull_own"):
        head: tuple[str, ...] = (
            way.replace("_", ", "),
            *("size", "time", "MB/s", "of copy", "of update", "of TCP", "of ZeroMQ"),
        )
        _table(console, head, (_row(size, size[way]) for size in report["sizes"]))
    names = ("copy", "update", "tcp_push", "tcp_pull", "zmq_push", "zmq_pull")
    head = ("limits", "size", "copy", "update", "TCP push", "TCP pull", "ZeroMQ push", "ZeroMQ pull")
    _table(console, head, (("", *_limits(size, names)) for size in report["sizes"]))


def _row(size: dict[str, Any], way: dict[str, float]) -> tuple[str, ...]:
    ratios = (f"{way[name]:.2f}" for name in ("of_copy", "of_update", "of_tcp", "of_zmq"))
    return "", size_text(size["bytes"]), time_text(way["seconds"]), speed_text(way["mb_per_s"]), *ratios


def _limits(size: dict[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    return size_text(size["bytes"]), *(time_text(size["limits"][name]["seconds"]) for name in names)


def _table(console: Console, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in head:
        table.add_column(name, justify="right" if name != head[0] else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def size_text(nbytes: float) -> str:
    """Decimal: 100 B, 10 kB, 2.5 MB."""
    for unit, factor in (("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.10g} {unit}"
    return f"{nbytes:g} B"


def time_text(seconds: float) -> str:
    """Three digits that count: 142 µs, 1.25 ms."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{_three(seconds / factor)} {unit}"
    return f"{_three(seconds / 1e-6)} µs"


def speed_text(mb_per_s: float) -> str:
    return _three(mb_per_s)


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
