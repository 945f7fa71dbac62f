"""What server processes use: memory while a worker pushes and pulls, and processor time while workers do nothing.

Rules
- A server's memory is what it holds alone (anonymous pages, and files that it has mapped), above a twin's: a server of the same
  kind that serves a model of one number in the same way. torch imports its compiler with the first optimizer, some 70 MB: the twin
  has done that, too.
- Regions that a worker shares are the worker's memory, however many processes map them. They are shown, and not counted.
- The peak is the kernel's own where nothing is shared; else it is looked for each 2 ms.
- Processor time is the kernel's, in nanoseconds, of all threads of a process, ZeroMQ's too.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.errors import ConfigError
from ..protocol.join import read_join
from ..protocol.rules import SGD, Adam, Rule
from ..worker.client import Worker
from .table import size_text

RULES: dict[str, tuple[Rule, int]] = {
    "sgd": (SGD(lr=1e-6), 0),
    "sgd, momentum": (SGD(lr=1e-6, momentum=0.9), 1),
    "adam": (Adam(lr=1e-6), 2),
}
"""By name, and how many numbers a parameter has as optimizer state."""
TRANSPORTS = ("shm", "tcp")
SIZES = (100_000_000, 400_000_000)
LIMIT = 1.15
IDLE = (1, 33)
IDLE_SECONDS = 20.0
IDLE_LIMIT = 1e-3
ROUNDS = 6
LOOK_EVERY = 0.002
TIMEOUT = 120.0


def memory_rows(
    sizes: Sequence[int] = SIZES, rules: Sequence[str] = tuple(RULES), transports: Sequence[str] = TRANSPORTS
) -> list[dict[str, Any]]:
    """Peak and steady bytes of one shard, for each size, rule and transport.

    Returns:
        Rows with `transport, rule, bytes, peak, steady, shared` in bytes, and `peak_ratio, steady_ratio` to parameters + optimizer
        state + one snapshot. With `skipped`, a text, instead of figures where there is no room.
    """
    rows = []
    for transport in transports:
        for rule in rules:
            twin = _used(1, rule, transport)["steady"]
            for nbytes in sizes:
                row: dict[str, Any] = {"transport": transport, "rule": rule, "bytes": nbytes}
                click.echo(f"memory: {size_text(nbytes)}, {rule}, {transport}", err=True)
                why = no_room(nbytes, 4 + RULES[rule][1])
                rows.append(row | ({"skipped": why} if why else _above(_used(nbytes // 4, rule, transport), twin, row)))
    return rows


def _above(used: dict[str, float], twin: float, row: dict[str, Any]) -> dict[str, float]:
    wanted = row["bytes"] * (2 + RULES[row["rule"]][1])
    found = {name: used[name] - twin for name in ("peak", "steady")}
    ratios = {f"{name}_ratio": float(f"{amount / wanted:.4g}") for name, amount in found.items()}
    return found | {"shared": used["shared"], "twin": twin} | ratios


def _used(elements: int, rule: str, transport: str) -> dict[str, float]:
    """Bytes of a shard that holds so many float32 numbers, pushed and pulled some times."""
    with LocalCluster(bind="127.0.0.1", shards=1, mode="async", staleness=math.inf, min_workers=1) as cluster:
        (pid,) = cluster.pids["shards"]
        with (
            _watched(pid) as peak,
            Worker(read_join(cluster.join), wait_timeout=TIMEOUT, transport=transport) as worker,
        ):
            worker.register({"w": np.zeros(elements, np.float32)}, optimizer=RULES[rule][0])
            for _ in range(ROUNDS):
                gradients = worker.buffers.gradients
                gradients["w"][:] = 1
                worker.push(gradients).result()
                worker.pull(out=worker.buffers.weights)
            now = resident(pid)
        return {"peak": peak[0], "steady": now["own"], "shared": now["shared"]}


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """The most that a process held, in bytes; known at the end."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(LOOK_EVERY):
            with suppress(OSError):
                most[0] = max(most[0], resident(pid)["own"])

    thread = threading.Thread(target=look, name="bench memory", daemon=True)
    thread.start()
    try:
        yield most
        now = resident(pid)
        if now["shared"] < 1 << 20:
            most[0] = max(most[0], now["peak"])
    finally:
        over.set()
        thread.join()


def resident(pid: int) -> dict[str, int]:
    """Bytes that a process holds alone (`own`), shares (`shared`), and has ever held of both (`peak`).

    Raises:
        ConfigError: not on Linux, which is where these figures are.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        raise ConfigError("a server's memory is read from /proc, which is not here", hint="on Linux") from None
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines if "kB" in line)
    }
    return {"own": found["RssAnon"] + found["RssFile"], "shared": found["RssShmem"], "peak": found["VmHWM"]}


def no_room(nbytes: int, copies: int) -> str:
    """Why a model cannot be measured here, or "". `copies`: how often it lies in memory, all processes together."""
    import psutil  # type: ignore[import-untyped]

    free, wanted = psutil.virtual_memory().available, int(1.1 * copies * nbytes)
    return f"needs {size_text(wanted)}, {size_text(free)} are free" if wanted > free else ""


# --- doing nothing


def idle_rows(counts: Sequence[int] = IDLE, seconds: float = IDLE_SECONDS, shards: int = 2) -> dict[str, Any]:
    """Shares of a core that servers use while so many workers, counted in, do nothing.

    Args:
        counts: ascending, two or more.

    Returns:
        `rows` (workers, coordinator, shards: together), and `per_worker`: of all servers, from the first and the last row.
    """
    rows = []
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(bind="127.0.0.1", shards=shards, mode="async", staleness=math.inf, min_workers=1)
        )
        pids = (cluster.pids["coordinator"], *cluster.pids["shards"])
        workers: list[Worker] = []
        for wanted in counts:
            while len(workers) < wanted:
                workers.append(stack.enter_context(connect(cluster.join)))
                workers[-1].register({"w": np.zeros(1000 * shards, np.float32)}, optimizer=SGD(lr=1e-6))
                workers[-1].pull()
            click.echo(f"idle: {wanted} workers, {seconds:g} s", err=True)
            before, started = [used_seconds(pid) for pid in pids], time.monotonic()
            time.sleep(seconds)
            taken = time.monotonic() - started
            coordinator, *others = ((used_seconds(pid) - then) / taken for pid, then in zip(pids, before, strict=True))
            rows.append({"workers": wanted, "coordinator": coordinator, "shards": sum(others)})
    first, last = rows[0], rows[-1]
    more = sum(float(last[name]) - float(first[name]) for name in ("coordinator", "shards"))
    return {"rows": rows, "shards": shards, "seconds": seconds, "per_worker": more / (counts[-1] - counts[0])}


def used_seconds(pid: int) -> float:
    """Processor time of a process so far.

    Raises:
        ConfigError: the kernel does not say.
    """
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    except OSError:
        raise ConfigError("this system does not say in /proc what a thread has used", hint="on Linux") from None
    return total / 1e9
