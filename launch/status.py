"""`shoal status` for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..protocol.join import CLEAR
from .report import evaluated, human_bytes, number


def show(status: dict[str, Any]) -> None:
    """Print a status to standard output."""
    _training(status)
    tasks = status.get("tasks")
    if tasks and (tasks["executors"] or tasks["models"] or tasks["waiting"]):
        from .tasks import print_dispatcher

        print_dispatcher(tasks)


def _training(status: dict[str, Any]) -> None:
    console = Console(highlight=False)
    bound = f"  staleness {number(status['staleness'])}" if status["mode"] == "async" else ""
    console.print(
        Text(
            f"run {status['run']}  mode {status['mode']}{bound}  security {status['security']}  {status['seconds']:.0f} s"
        )
    )
    if status["insecure"]:
        console.print(
            Text("INSECURE: no keys; whoever reaches the port can read and change the model", style="bold red")
        )
    if status["waiting_for"]:
        console.print(Text(f"waiting for {status['waiting_for']}", style="yellow"))
    rounds = status["rounds"]
    if status["mode"] == "federated":
        wanted = f" of {rounds['wanted']}" if rounds["wanted"] else ""
        state = f"now: {rounds['stage']}" if rounds["stage"] else f"waiting for {rounds['waiting_for'] or 'the next'}"
        text = f"rounds {rounds['completed']}{wanted} complete, {rounds['abandoned']} abandoned, {rounds['workers']} workers"
        console.print(Text(f"{text}  protection {rounds['protection']}  {state}"))
        if rounds["epsilon"] is not None:
            most = f" of {rounds['epsilon_budget']:g}" if rounds["epsilon_budget"] else ""
            console.print(Text(f"epsilon {rounds['epsilon']:.4g}{most} at delta {rounds['delta']:g}"))
        if rounds["protection"] == CLEAR:
            console.print(Text("CLEAR: the servers see every worker's update", style="bold red"))
    totals = status["totals"]
    console.print(
        Text(
            f"clock {status['min_clock']} to {status['max_clock']}  {totals['steps']} steps  "
            f"{human_bytes(totals['bytes_pushed'])} pushed  {human_bytes(totals['bytes_pulled'])} pulled"
        )
    )
    _table(
        console,
        ("worker", "state", "clock", "host", "pid", "renewed"),
        [
            (w["name"], w["state"], w["clock"], w["host"], w["pid"], f"{w['renewed_seconds_ago']:.1f} s ago")
            for w in status["workers"]
        ],
    )
    _table(
        console,
        ("shard", "state", "address", "clock", "in", "out", "updates"),
        [
            (
                s["index"], s["state"], s["address"], s["min_clock"], human_bytes(s["counters"].get("bytes_in", 0)),
                human_bytes(s["counters"].get("bytes_out", 0)), int(s["counters"].get("updates", 0)),
            )
            for s in status["shards"]
        ],
    )  # fmt: skip
    _table(
        console,
        ("data", "examples", "epoch", "leased", "completed", "lost", "leased again"),
        [
            (d["name"], d["examples"], d["epoch"], d["leased"], d["completed"], d["lost"], d["re_leased"])
            for d in status["data"]
        ],
    )
    for last in {each["name"]: each for each in status["evaluations"]}.values():
        console.print(Text(f"held out: {last['name']}  {evaluated(last)}"))
    for now in status["evaluating"]:
        text = f"held out: {now['name']}  clock {now['clock']}: {now['examples']} of {now['of']} examples so far"
        console.print(Text(text, style="dim"))
    for title, found in (("logged", status["logged"]), ("rejected", status["rejected"])):
        if found:
            console.print(Text(f"{title}  " + "  ".join(f"{name} {number(value)}" for name, value in found.items())))


def _table(console: Console, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    if rows:
        table = Table(*head, box=None, pad_edge=False, header_style="dim")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))  # Text: what users named is no markup
        console.print(table)
