"""`shoal bench codecs`: what each codec costs, loses and saves (SPEC §12).

What is measured, on float32 numbers that are normally distributed, and in blocks of 4 MiB, as they travel
- encode, decode: seconds for all of them, by one thread, into warm memory. A raw vector is handed on as it is.
- bytes an element; the error's root mean square beside that of the numbers, and the largest error beside the largest number.
  For `topk` that is the error of one push: what it leaves out is sent later.
- push, pull: seconds over TCP on loopback, with one server and one worker, as in `shoal bench pushpull`: what a worker of another
  machine would have if the network cost nothing. What a codec saves on a slower network is its bytes.

Rules
- A repetition runs all codecs one after the other; what is printed is the median. The first repetitions are a warm-up.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..launch.cluster import LocalCluster
from ..launch.settings import BadFlag
from ..protocol.codecs import NAMES, TOPK, Codec, push_codec
from ..protocol.coding import Vector, decode, encode
from ..protocol.join import read_join
from ..protocol.layout import BLOCK_BYTES
from ..protocol.rules import SGD
from ..worker.client import Worker
from . import limits
from .pushpull import WARM_UP, machine
from .table import PLAIN_WIDTH, time_text

ELEMENTS = 10_000_000
CODECS = (*NAMES[:TOPK], "topk:0.01", "topk:0.1")
Calls = dict[str, Callable[[], object]]


def main(elements: int = ELEMENTS, codecs: Sequence[str] = CODECS, repeat: int = 9, as_json: bool = False) -> int:
    """Measure, and print.

    Args:
        codecs: as a user names them for pushes.

    Raises:
        BadFlag: there is no such codec. ShoalError: a process did not start or does not answer.
    """
    try:
        chosen = list(dict.fromkeys(map(push_codec, codecs)))
    except ValueError as error:
        raise BadFlag(f"--codecs {error}") from None
    values = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
    with ExitStack() as stack:
        contenders: dict[str, Calls] = {}
        for codec in chosen:
            click.echo(f"starting {codec}", err=True)
            contenders[str(codec)] = coding(codec, values) | stack.enter_context(wire(codec, values))
        seconds = measure(contenders, repeat)
    found = [{"codec": str(codec), **loss(codec, values), "seconds": seconds[str(codec)]} for codec in chosen]
    report = {"machine": machine(), "elements": elements, "repeat": repeat, "codecs": found}
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def blocks(vector: Vector) -> list[Vector]:
    step = BLOCK_BYTES // 4
    return [vector[start : start + step] for start in range(0, len(vector), step)]


def coding(codec: Codec, values: Vector) -> Calls:
    """Encoding and decoding alone."""
    memory = [np.empty(codec.size(len(block)), np.uint8) for block in blocks(values)]
    payloads = [bytearray(encode(codec, block, torch)) for block in blocks(values)]
    out = np.empty_like(values)

    def encoded() -> None:
        for block, room in zip(blocks(values), memory, strict=True):
            encode(codec, block, torch, room)

    def decoded() -> None:
        for payload, block in zip(payloads, blocks(out), strict=True):
            decode(codec.number, payload, len(block), block, torch)

    return {"encode": encoded, "decode": decoded}


@contextmanager
def wire(codec: Codec, values: Vector) -> Iterator[Calls]:
    """A cluster and a worker that share no memory: a push of these values, and a pull of what it has changed."""
    pulls = Codec() if codec.number == TOPK else codec
    with (
        LocalCluster(bind="127.0.0.1", shards=1, mode="async", staleness=math.inf, min_workers=1) as cluster,
        Worker(
            read_join(cluster.join), wait_timeout=limits.TIMEOUT, transport="tcp", push_codec=codec, pull_codec=pulls
        ) as worker,
    ):
        worker.register({"w": np.zeros_like(values)}, optimizer=SGD(lr=limits.LR))
        for _ in range(3):  # lent arrays hold anything until they are written
            worker.buffers.gradients["w"][:] = values
            worker.push(worker.buffers.gradients).result()
        yield {
            "push": lambda: worker.push(worker.buffers.gradients).result(),
            "pull": lambda: worker.pull(out=worker.buffers.weights),
        }


def measure(contenders: dict[str, Calls], repeat: int) -> dict[str, dict[str, float]]:
    """Median seconds of each call of each contender."""
    taken: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in contenders}
    for repetition in range(WARM_UP + repeat):
        for name, calls in contenders.items():
            for what, call in calls.items():
                started = time.perf_counter()
                call()
                if repetition >= WARM_UP:
                    taken[name][what].append(time.perf_counter() - started)
    return {name: {what: median(times) for what, times in found.items()} for name, found in taken.items()}


def loss(codec: Codec, values: Vector) -> dict[str, float]:
    """What arrives of these values: bytes an element, and errors relative to their root mean square and to the largest."""
    nbytes, square, most = 0, 0.0, 0.0
    for block in blocks(values):
        payload = encode(codec, block, torch)
        error = decode(codec.number, payload, len(block)) - block
        nbytes += len(payload)
        square += float(np.sum(np.square(error), dtype=np.float64))
        most = max(most, float(np.abs(error).max()))
    return {
        "bytes_per_element": nbytes / len(values),
        "rms_error": math.sqrt(square / float(np.sum(np.square(values), dtype=np.float64))),
        "max_error": most / float(np.abs(values).max()),
    }


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    about = report["machine"]
    console.print(
        f"{about['cpus']} CPUs, {about['platform']}, torch {about['torch']}, shoal {about['shoal']}\n"
        f"{report['elements']:,} float32, 1 shard, 1 worker, TCP on loopback, medians of {report['repeat']}\n"
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, head in enumerate(
        ("codec", "bytes/element", "RMS error", "max error", "encode", "decode", "push", "pull")
    ):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in report["codecs"]:
        errors = (f"{row[name]:.2g}" for name in ("rms_error", "max_error"))
        times = (time_text(row["seconds"][name]) for name in ("encode", "decode", "push", "pull"))
        table.add_row(row["codec"], f"{row['bytes_per_element']:.4g}", *errors, *times)
    console.print(table)


if __name__ == "__main__":  # the same flags, the same messages
    import sys

    from ..cli import main as command

    sys.argv[1:1] = ["bench", "codecs"]
    command()
