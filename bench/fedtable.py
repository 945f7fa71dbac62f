"""What `shoal bench federated` found, for people: tables, and a plot of what grows with clients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .table import PLAIN_WIDTH, size_text, time_text

NAMES = {"shoal": "shoal", "flower": "Flower SecAgg+"}
WHOLE = {"clear": "shoal, clear", "secagg": "shoal, masked", "flower": "Flower, clear, gRPC server"}


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    about = report["machine"]
    click.echo(
        f"{about['cpus']} CPUs, {about['platform']}, shoal {about['shoal']}; medians of {report['repeat']} turns\n"
    )
    for part, write in (("client", _client), ("sum", _sum), ("rounds", _rounds), ("scale", _scale)):
        if part in report:
            write(console, report[part])


def _client(console: Console, found: dict[str, Any]) -> None:
    head = f"client, {found['elements']:,} float32, {found['neighbours']} neighbours"
    rows = [
        (f"{row['bits']} bits", *map(time_text, row["seconds"].values()), f"{row['ratio']:.2f}")
        for row in found["moduli"]
    ]
    _table(console, (head, *found["moduli"][0]["seconds"], "client / limit"), rows)


def _sum(console: Console, found: list[dict[str, Any]]) -> None:
    rows = []
    for size in found:
        for name, title in NAMES.items():
            if name in size:
                row, ours = size[name], size["shoal"]
                times = (f"{time_text(row[key])} ({row[key] / ours[key]:.2g}x)" for key in ("client", "server"))
                sizes = (size_text(round(row[key] / size["elements"], 2)) for key in ("said", "heard"))
                rows.append((f"{size['clients']} x {size['elements']:,}", title, *times, *sizes, f"{row['error']:.1e}"))
    head = ("secure sum", "", "client", "servers", "sent / element", "received / element", "largest error")
    _table(console, head, rows)
    if not any("flower" in size for size in found):
        console.print(Text("Flower is not installed here: make bench-federated installs it in a place of its own\n"))


def _rounds(console: Console, found: dict[str, Any]) -> None:
    head = (f"rounds, {found['clients']} workers, {found['elements']:,} float32", "a round", "of shoal, clear")
    base = found["seconds"]["clear"]
    rows = [(WHOLE[name], time_text(taken), f"{taken / base:.2f}") for name, taken in found["seconds"].items()]
    _table(console, head, rows)


def _scale(console: Console, found: dict[str, Any]) -> None:
    head = ("simulated: clients", "neighbours", "a client", "its bytes", "its messages", "coordinator", "a shard")
    rows = [
        (
            f"{row['clients']:,}",
            str(row["neighbours"]),
            time_text(row["client_seconds"]),
            size_text(row["client_bytes"]),
            f"{row['messages_per_client']:.1f}",
            time_text(row["coordinator_seconds"]),
            time_text(row["shard_seconds"]),
        )
        for row in found["growth"]
    ]
    _table(console, head, rows)
    lost = found["dropouts"]
    said = (
        f"simulated: {lost['rounds']:,} rounds of {lost['clients']} clients, each drops out with {lost['dropout']:.0%}",
        f"{lost['released']:,} released, {lost['abandoned']:,} abandoned, largest error {lost['largest_error']:.1e}",
        f"each {lost['messages_per_round']:.0f} messages, coordinator {time_text(lost['coordinator_seconds_per_round'])}\n",
    )
    console.print(Text("\n".join(said)))


def _table(console: Console, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def draw(report: dict[str, Any], path: Path) -> None:
    """What grows with simulated clients, as `path`.png and `path`.svg; nothing where that part was not measured."""
    if "scale" not in report:
        return
    import matplotlib
    from matplotlib.figure import Figure

    rows = report["scale"]["growth"]
    clients = [row["clients"] for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")
    seconds, traffic = figure.subplots(1, 2)
    for key, title in (
        ("client_seconds", "a client"),
        ("shard_seconds", "a shard"),
        ("coordinator_seconds", "coordinator"),
    ):
        seconds.plot(clients, [row[key] for row in rows], marker="o", markersize=4, label=title)
    seconds.set(
        xscale="log", yscale="log", xlabel="clients", ylabel="seconds of a round", title="processor time, simulated"
    )
    traffic.plot(
        clients, [row["client_bytes"] / 1000 for row in rows], marker="o", markersize=4, label="kB of a client"
    )
    traffic.plot(
        clients, [row["messages_per_client"] for row in rows], marker="o", markersize=4, label="messages per client"
    )
    traffic.set(xscale="log", yscale="log", xlabel="clients", title="traffic of a round, 1,000 elements, simulated")
    for pane in (seconds, traffic):
        pane.grid(alpha=0.3)
        pane.legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "shoal"}):
        figure.savefig(path.with_suffix(".png"), dpi=110)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
