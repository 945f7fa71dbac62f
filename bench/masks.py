"""What a client's part of a masked round costs: quantise an update and add its masks, beside the keystream's own limit.

What runs
- `client`: the update is looked through for NaN, quantised and masked, with one mask for each neighbour and its own.
- `limit`: as many masks as there are neighbours, as AES-256-GCM of zeros in the same pieces and nothing else done with them, and
  one copy of the update. Less than that no client can do.

Rules
- One thread. All contenders take turns, so that noise hits all alike; medians. The first turns are a warm-up.
- All memory is preallocated and was written to: the first touch of new pages costs more than the masks.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import click
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..protocol.secure.fixed import UNIFORM, Quantiser, finite
from ..protocol.secure.masks import CHUNK_BYTES, Masks
from ..protocol.secure.noise import Array
from ..protocol.secure.scale import Scale
from .pushpull import machine
from .table import time_text

ELEMENTS = 25_000_000
NEIGHBOURS = 10
WARM_UP = 1
CLIP = 0.1


def main(elements: int = ELEMENTS, neighbours: int = NEIGHBOURS, repeat: int = 5, as_json: bool = False) -> int:
    """Measure, and print.

    Args:
        elements: float32 of the update. neighbours: with whom the client has a mask each.
    """
    update = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
    update *= CLIP / 10
    report = {
        "machine": machine(),
        "elements": elements,
        "neighbours": neighbours,
        "repeat": repeat,
        "moduli": [modulus(update, neighbours, bits, repeat) for bits in (32, 16)],
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        show(report)
    return 0


def modulus(update: Array, neighbours: int, bits: int, repeat: int) -> dict[str, Any]:
    """Median seconds of the client, the limit, and what the client's are made of."""
    keys = [secrets.token_bytes(32) for _ in range(neighbours + 1)]
    half = neighbours // 2
    masks = Masks(keys[half:], keys[:half])
    scale = Scale(bits, CLIP, 1.0, neighbours + 1)
    quantiser = Quantiser(scale, UNIFORM)
    out, copied = np.zeros(len(update), scale.dtype), np.zeros_like(update)
    limit = keystream(keys[:neighbours], out.nbytes)

    def client() -> None:
        finite(update)
        masks.encode(update, quantiser, out)

    def least() -> None:
        limit()
        np.copyto(copied, update)

    seconds = measure(
        {
            "client": client,
            "limit": least,
            "quantise": lambda: quantiser.write(update, out),
            "masks": lambda: masks.apply(out),
        },
        repeat,
    )
    return {"bits": bits, "seconds": seconds, "ratio": seconds["client"] / seconds["limit"]}


def keystream(keys: list[bytes], nbytes: int) -> Callable[[], None]:
    """Makes so many bytes of stream of each key, over and over in the same memory."""
    ciphers = [AESGCM(key) for key in keys]
    zeros, room = memoryview(bytes(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES + 16))

    def run() -> None:
        for chunk, start in enumerate(range(0, nbytes, CHUNK_BYTES)):
            size, nonce = min(CHUNK_BYTES, nbytes - start), chunk.to_bytes(12, "big")
            for cipher in ciphers:
                cipher.encrypt_into(nonce, zeros[:size], None, room[: size + 16])

    return run


def measure(contenders: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + repeat):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if turn >= WARM_UP:
                taken[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in taken.items()}


def show(report: dict[str, Any]) -> None:
    """Print a report to standard output."""
    about = report["machine"]
    click.echo(f"{about['cpus']} CPUs, {about['platform']}, shoal {about['shoal']}")
    click.echo(
        f"{report['elements']:,} float32, {report['neighbours']} neighbours, one thread, medians of {report['repeat']}"
    )
    for row in report["moduli"]:
        times = ", ".join(f"{name} {time_text(seconds)}" for name, seconds in row["seconds"].items())
        click.echo(f"{row['bits']} bits: {times}; client / limit {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
