"""What a push and a pull cost as a cluster grows: along one axis at a time, the rest held still.

The axes
- shards: 1, 2, 4, with 10 MB. workers: 1 to 64, of which one works, with 1 MB. tensors: 1 to 100,000, 40 MB together.
  bytes: 1 kB to 1 GB.

What is timed: as in `shoal bench pushpull`, push and pull through `worker.buffers`, `push_own` and `pull_own` with arrays of the
caller's own; and once, for each point, `register`, first values and torch's own start included.

Rules
- A fresh cluster for each point. Medians; the first repetitions are a warm-up.
- A point for which there is no memory is left out, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import click
import numpy as np

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.rules import SGD
from . import limits
from .footprint import no_room
from .pushpull import WARM_UP, measure
from .table import size_text

MOST_ROUNDS = 30
BYTES_OF_ROUNDS = 10**7
COPIES = 8
"""How often a model lies in memory at most: the caller's, the worker's, the shard's and its snapshot."""
ONE = {"shards": 1, "workers": 1, "tensors": 1, "bytes": 0}
POINTS: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "shards": ({"bytes": 10_000_000}, (1, 2, 4)),
    "workers": ({"bytes": 1_000_000}, (1, 4, 16, 64)),
    "tensors": ({"bytes": 40_000_000}, (1, 100, 10_000, 100_000)),
    "bytes": ({}, tuple(10**power for power in range(3, 10))),
}
"""By axis: what is held still, and the values."""
WAYS = ("push", "pull", "push_own", "pull_own")


def cost_rows(axis: str, values: tuple[int, ...] = (), repeat: int = 9) -> list[dict[str, Any]]:
    """Seconds along one axis.

    Returns:
        Rows with `shards, workers, tensors, bytes`, and in seconds `register, push, pull, push_own, pull_own`; or with the reason,
        `skipped`.
    """
    still, usual = POINTS[axis]
    rows = []
    for value in values or usual:
        point = ONE | still | {axis: value}
        click.echo(f"cost: {axis} {size_text(value) if axis == 'bytes' else value}", err=True)
        why = no_room(point["bytes"], COPIES + point["workers"])
        rows.append(point | ({"skipped": why} if why else _measured(point, repeat)))
    return rows


def _measured(point: dict[str, int], repeat: int) -> dict[str, float]:
    with _running(point) as (calls, register):
        seconds = measure([calls], repeat, max(1, min(MOST_ROUNDS, BYTES_OF_ROUNDS // point["bytes"])))
    return {"register": float(f"{register:.4g}")} | {way: float(f"{seconds[way]:.4g}") for way in WAYS}


@contextmanager
def _running(point: dict[str, int]) -> Iterator[tuple[limits.Calls, float]]:
    """A cluster of this shape; what is timed of it, and what it took to register."""
    tensors = point["tensors"]
    each = [len(part) for part in np.array_split(np.empty(point["bytes"] // 4, np.bool_), tensors)]
    with ExitStack() as stack:
        cluster = stack.enter_context(
            LocalCluster(bind="127.0.0.1", shards=point["shards"], mode="async", staleness=math.inf, min_workers=1)
        )
        worker = stack.enter_context(connect(cluster.join, wait_timeout=limits.TIMEOUT))
        arrays = {f"layer{number}": np.ones(elements, np.float32) for number, elements in enumerate(each)}
        started = time.perf_counter()
        worker.register(arrays, optimizer=SGD(lr=limits.LR))
        register = time.perf_counter() - started
        for _ in range(point["workers"] - 1):
            idle = stack.enter_context(connect(cluster.join, wait_timeout=limits.TIMEOUT))
            idle.register(arrays, optimizer=SGD(lr=limits.LR))
        for _ in range(WARM_UP):  # lent arrays hold anything until they are written
            for gradient in worker.buffers.gradients.values():
                gradient[...] = 1
            worker.push(worker.buffers.gradients).result()
        yield (
            {
                "push": lambda: worker.push(worker.buffers.gradients).result(),
                "pull": lambda: worker.pull(out=worker.buffers.weights),
                "push_own": lambda: worker.push(arrays).result(),
                "pull_own": lambda: worker.pull(out=arrays),
            },
            register,
        )
