"""`shoal tasks` for people."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .report import human_bytes, human_seconds

PLAIN_WIDTH = 200
"""Columns where no terminal says how many there are."""


def print_tasks(found: list[dict[str, Any]]) -> None:
    """A line for each task, on standard output."""
    if not found:
        Console().print(Text('no tasks yet; shoal.connect(role="client").submit(kind, inputs) makes one'))
        return
    table = _table("id", "came", "kind", "state", "answered by", "on", "took", "reward")
    for each in found:
        by = f"{each['model']} {each['version']}" if each["model"] else "-"
        took = "-" if each["seconds"] is None else human_seconds(each["seconds"])
        reward = "-" if each["reward"] is None else f"{each['reward']:.3g}"
        cells = (
            each["id"],
            _time(each["came"]),
            each["kind"],
            each["state"],
            by,
            each["executor"] or "-",
            took,
            reward,
        )
        table.add_row(*map(Text, cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table)


def print_why(found: dict[str, Any]) -> None:
    """One task, on standard output."""
    console = Console(highlight=False)
    label = f"  data {found['privacy']}" if found["privacy"] else ""
    console.print(Text(f"task {found['id']}  {found['kind']}{label}  came {_time(found['came'])}: {found['state']}"))
    if found["why"]:
        console.print(Text(found["why"]), soft_wrap=True)
    if found["error"] and found["error"] != found["why"]:
        console.print(Text(found["error"], style="yellow"), soft_wrap=True)


def print_dispatcher(found: dict[str, Any]) -> None:
    """How it is, on standard output."""
    console = Console(highlight=False)
    waiting = (
        f"{found['waiting']:,} tasks wait ({human_bytes(found['waiting_bytes'])}), {found['at_work']:,} are at work"
    )
    console.print(Text(f"{waiting}; policy {found['policy']}"))
    table = _table("executor", "serves", "loaded", "may see", "done", "queue")
    for each in found["executors"]:
        sees = "what its versions may" if each["data"] is None else " ".join(each["data"]) or "unlabelled"
        loaded = ", ".join(each["loaded"]) or "nothing yet"
        cells = (each["name"], ", ".join(each["models"]), loaded, sees, f"{each['done']:,}")
        table.add_row(*map(Text, cells), Text(human_seconds(each["queue_seconds"])))
    if found["executors"]:
        console.print(table)
    else:
        console.print(Text("no executor is here: worker.serve({name: predict}) makes a worker one", style="yellow"))
    for each in found["executors"]:
        for version, why in each["failed"].items():
            console.print(Text(f"{each['name']} cannot serve {version}: {why}", style="yellow"), soft_wrap=True)
    for name, model in found["models"].items():
        trial = model["trial"]
        tried = f", version {trial['version']} tried on {trial['share']:.0%}" if trial else ""
        console.print(Text(f"{name}: version {model['promoted'] or 'none'} promoted{tried}"))
    for each in found["quality"]:
        of = f"{each['model']} on {each['kind']}"
        console.print(Text(f"{of}: quality {each['mean']:.3f} after {each['feedback']} rewards"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, no_wrap=number == 0)
    return table


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
