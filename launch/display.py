"""What people see while a cluster works: a live table on a terminal, a plain line now and then elsewhere.

Rules
- The output of scripts goes to standard output, ours to standard error.
- Lines are gathered and written in batches, so that a script that prints a lot is not slowed by the table.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .report import human_bytes, number

LINE_EVERY = 10.0
MOST_LINES = 10_000
"""Lines kept between two writes; a script that prints faster waits."""


class Display:
    """A context manager. `live` chooses the table; by default it is chosen where standard error is a terminal."""

    def __init__(self, title: str, live: bool | None = None) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._title = title
        self._live_wanted = self.console.is_terminal if live is None else live
        self._live: Live | None = None
        self._lines: deque[str] = deque()
        self._room = threading.Condition()
        self._rates = Rates()
        self._next_line = 0.0
        self._over = False

    def __enter__(self) -> Display:
        if self._live_wanted:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        with self._room:
            self._over = True
            self._room.notify_all()
        if self._live:
            self._live.stop()
            self._live = None

    def write(self, line: str, error: bool = False) -> None:
        """A line of a script's output. From any thread."""
        if not self._live_wanted or self._over:
            stream = sys.stderr if error else sys.stdout
            stream.write(line + "\n")
            stream.flush()
            return
        with self._room:
            self._room.wait_for(lambda: len(self._lines) < MOST_LINES or self._over, timeout=5.0)
            self._lines.append(line)

    def say(self, line: str, style: str = "") -> None:
        """A line of our own."""
        self.flush()
        self.console.print(Text(f"shoal: {line}", style=style), soft_wrap=True)

    def flush(self) -> None:
        with self._room:
            lines, self._lines = list(self._lines), deque()
            self._room.notify_all()
        if lines:
            self.console.print(Text("\n".join(lines)), soft_wrap=True)

    def show(self, status: dict[str, Any]) -> None:
        """The newest status."""
        self._rates.take(status)
        self.flush()
        if self._live:
            self._live.update(self._table(status), refresh=True)
        elif time.monotonic() >= self._next_line and not status["waiting_for"]:
            self._next_line = time.monotonic() + LINE_EVERY
            self.say(self._line(status))

    def _line(self, status: dict[str, Any]) -> str:
        totals, rounds = status["totals"], status["rounds"]
        far = f"clock {status['min_clock']}-{status['max_clock']}"
        if status["mode"] == "federated":
            far = f"rounds {rounds['completed']}" + (f" of {rounds['wanted']}" if rounds["wanted"] else "")
        words = [
            f"{status['seconds']:.0f} s",
            far,
            f"{totals['steps']} steps ({self._rates.total:.1f}/s)",
            *(f"{name} {number(value)}" for name, value in status["logged"].items()),
        ]
        if status["insecure"]:
            words.append("INSECURE")
        return "  ".join(words)

    def _table(self, status: dict[str, Any]) -> Group:
        head = Text(f"{self._title}  ", style="bold")
        bound = f" staleness {number(status['staleness'])}" if status["mode"] == "async" else ""
        if status["mode"] == "federated":
            bound = f" protection {status['rounds']['protection']} rounds {status['rounds']['completed']}"
        head.append(
            f"{status['mode']}{bound}  {status['seconds']:.0f} s  {self._rates.total:.1f} steps/s", style="not bold"
        )
        if status["insecure"]:
            head.append("  INSECURE", style="bold red")
        if status["waiting_for"]:
            head.append(f"  waiting for {status['waiting_for']}", style="yellow")
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, side in (
            ("worker", "left"),
            ("state", "left"),
            ("clock", "right"),
            ("ahead", "right"),
            ("steps/s", "right"),
        ):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        table.add_column("logged")
        for worker in status["workers"][:16]:
            style = {"live": "", "idle": "dim", "left": "dim"}.get(worker["state"], "red")
            logged = "  ".join(f"{k} {number(v)}" for k, v in list(worker["logged"].items())[:4])
            ahead = str(worker["clock"] - status["min_clock"]) if worker["state"] == "live" else ""
            rate = f"{self._rates.of(worker['name']):.1f}" if worker["state"] in ("live", "idle") else ""
            cells = (worker["name"], worker["state"], str(worker["clock"]), ahead, rate, logged)
            table.add_row(*map(Text, cells), style=style)  # Text: what users named is no markup
        if len(status["workers"]) > 16:
            table.add_row(f"… {len(status['workers']) - 16} more")
        servers = Text(
            "  ".join(
                f"shard {s['index']} {s['state']} {human_bytes(s['counters'].get('bytes_in', 0))} in "
                f"{human_bytes(s['counters'].get('bytes_out', 0))} out"
                for s in status["shards"][:8]
            ),
            style="dim",
        )
        return Group(head, table, servers)


class Rates:
    """Steps per second over the last few seconds, by worker and in all."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def take(self, status: dict[str, Any]) -> None:
        steps: dict[str, float] = {}
        for worker in status["workers"]:
            steps[worker["name"]] = steps.get(worker["name"], 0.0) + (worker["stats"].get("steps") or 0.0)
        now = time.monotonic()
        self._seen.append((now, steps))
        while len(self._seen) > 2 and now - self._seen[0][0] > self.SECONDS:
            self._seen.popleft()

    def of(self, name: str) -> float:
        (since, before), (now, after) = self._seen[0], self._seen[-1]
        return max(0.0, (after.get(name, 0.0) - before.get(name, 0.0)) / (now - since)) if now > since else 0.0

    @property
    def total(self) -> float:
        return sum(self.of(name) for name in self._seen[-1][1]) if self._seen else 0.0


def closing_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """The end of a run, as a table."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)
