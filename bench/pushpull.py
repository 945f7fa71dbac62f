"""`shoal bench pushpull`: seconds of a push and of a pull, beside the limits of the machine in the same run.

What is timed, for each size, with one coordinator, some shards and one worker (this process) on this machine
- push: `worker.push(worker.buffers.gradients).result()`, from the call until every shard has applied it and said so.
- pull: `worker.pull(out=worker.buffers.weights)` after a push, so that every block has changed, until the values are there.
- push_streamed: seconds a push of several in a row, each waited for when the next is under way: it is looked through for NaN
  while the one before is applied. What a training loop sees that does not wait either.
- push_own, pull_own: the same with arrays of the caller's own, which cost one copy more.
- the limits: see `shoal.bench.limits`.

Rules
- The model is one float32 tensor of the size. A fresh server for each size: a server trains one model.
- A repetition runs all contenders one after the other, each for some rounds (many where the size is small); it gives the median of
  its rounds. What is printed is the median of the repetitions. So noise hits all alike.
- The first repetitions are a warm-up: they count for nobody.
- How the bytes travel is chosen as always: `SHOAL_TRANSPORT=tcp` measures what workers on other machines have.
- A ratio is limit / ours: 1 is as fast as the limit, 0.5 takes twice as long.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import click
import numpy as np

from .. import __version__
from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..launch.settings import BadFlag
from ..protocol.rules import SGD, Adam
from . import limits
from .table import show, size_text

SIZES = tuple(10**power for power in range(2, 9))
LARGEST = 10**9
OPTIMIZERS = {"sgd": SGD(lr=limits.LR), "adam": Adam(lr=limits.LR)}
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6}
WARM_UP = 2
MOST_ROUNDS = 100
BYTES_OF_ROUNDS = 10**7
"""Bytes that a contender moves in a repetition, unless one round is more or the most rounds are less."""
STREAM = 8
"""Pushes in one call of `push_streamed`."""
WAYS = ("push", "push_streamed", "pull", "push_own", "pull_own")


def main(sizes: str = "", repeat: int = 9, shards: int = 1, optimizer: str = "sgd", as_json: bool = False) -> int:
    """Measure, and print.

    Args:
        sizes: as typed: "100,10kB,2.5MB"; empty for 100 B to 100 MB.
        repeat: repetitions.
        optimizer: what the shards do with a push: `sgd` or `adam`.

    Raises:
        BadFlag: `sizes` cannot be read. ShoalError: a process did not start or does not answer.
    """
    wanted = read_sizes(sizes)
    found = []
    for number, nbytes in enumerate(wanted, 1):
        click.echo(f"measuring {size_text(nbytes)} ({number} of {len(wanted)})", err=True)
        found.append(figures(nbytes, measure_size(nbytes, repeat, shards, optimizer)))
    report = {
        "machine": machine(),
        "transport": os.environ.get("SHOAL_TRANSPORT") or "auto",
        "shards": shards,
        "optimizer": optimizer,
        "repeat": repeat,
        "sizes": found,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def read_sizes(typed: str) -> tuple[int, ...]:
    """Sizes in bytes, in the order given.

    Raises:
        BadFlag: one of them is not a size, or not one that can be measured.
    """
    return tuple(dict.fromkeys(map(_read_size, typed.split(",")))) if typed.strip() else SIZES


def _read_size(typed: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|MB|)\s*", typed, re.ASCII)
    if not found:
        raise BadFlag(f"--sizes: {typed.strip()!r} is not a size such as 100, 10kB or 2.5MB")
    size = float(found[1]) * UNITS[found[2]]
    if not 4 <= size <= LARGEST or size % 4:
        raise BadFlag(
            f"--sizes: {typed.strip()!r} must be a multiple of 4 B (the payload is float32), up to {size_text(LARGEST)}"
        )
    return int(size)


def measure_size(nbytes: int, repeat: int, shards: int, optimizer: str = "sgd") -> dict[str, float]:
    """Seconds of every contender."""
    with ExitStack() as stack:
        contenders = [
            stack.enter_context(contender)
            for contender in (
                ours(nbytes, shards, optimizer),
                limits.memory(nbytes, optimizer),
                limits.tcp(nbytes),
                limits.zeromq(nbytes),
            )
        ]
        seconds = measure(contenders, repeat, max(1, min(MOST_ROUNDS, BYTES_OF_ROUNDS // nbytes)))
        return seconds | {"push_streamed": seconds["push_streamed"] / STREAM}


@contextmanager
def ours(nbytes: int, shards: int, optimizer: str = "sgd") -> Iterator[limits.Calls]:
    """A cluster and a worker, and what is timed of it: `push` and `pull`."""
    gradient, out = np.ones(nbytes // 4, np.float32), np.ones(nbytes // 4, np.float32)
    with (
        LocalCluster(bind="127.0.0.1", shards=shards, mode="async", staleness=math.inf, min_workers=1) as cluster,
        connect(cluster.join, wait_timeout=limits.TIMEOUT) as worker,
    ):
        worker.register({"w": out}, optimizer=OPTIMIZERS[optimizer])
        filled = []
        for _ in range(3):  # lent arrays hold anything until they are written
            worker.buffers.gradients["w"][:] = 1
            filled.append(worker.push(worker.buffers.gradients))
        for ticket in filled:
            ticket.result()

        def streamed() -> None:
            last = worker.push(worker.buffers.gradients)
            for _ in range(STREAM - 1):
                before, last = last, worker.push(worker.buffers.gradients)
                before.result()
            last.result()

        yield {
            "push": lambda: worker.push(worker.buffers.gradients).result(),
            "push_streamed": streamed,
            "pull": lambda: worker.pull(out=worker.buffers.weights),
            "push_own": lambda: worker.push({"w": gradient}).result(),
            "pull_own": lambda: worker.pull(out={"w": out}),
        }


def measure(contenders: Sequence[limits.Calls], repeat: int, rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    medians: defaultdict[str, list[float]] = defaultdict(list)
    for repetition in range(WARM_UP + repeat):
        for calls in contenders:
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    started = time.perf_counter()
                    call()
                    taken[name].append(time.perf_counter() - started)
            if repetition >= WARM_UP:
                for name, seconds in taken.items():
                    medians[name].append(median(seconds))
    return {name: median(seconds) for name, seconds in medians.items()}


def figures(nbytes: int, seconds: dict[str, float]) -> dict[str, Any]:
    """One size, as the JSON says it."""

    def speed(name: str) -> dict[str, float]:
        return {"seconds": _short(seconds[name]), "mb_per_s": _short(nbytes / seconds[name] / 1e6)}

    def ratios(way: str) -> dict[str, float]:
        wire = way.partition("_")[0]
        beside = {"of_copy": "copy", "of_update": "update", "of_tcp": f"tcp_{wire}", "of_zmq": f"zmq_{wire}"}
        return {name: _short(seconds[limit] / seconds[way]) for name, limit in beside.items()}

    ways = {way: speed(way) | ratios(way) for way in WAYS}
    return {"bytes": nbytes, **ways, "limits": {name: speed(name) for name in seconds if name not in WAYS}}


def _short(number: float) -> float:
    """Four digits that count: the rest is noise."""
    return float(f"{number:.4g}")


def machine() -> dict[str, Any]:
    """What the figures are of."""
    import torch
    import zmq

    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
        "shoal": __version__,
    }


if __name__ == "__main__":  # the same flags, the same messages
    from ..cli import main as command

    sys.argv[1:1] = ["bench", "pushpull"]
    command()
