"""What training over a codec reaches: Fashion-MNIST (60,000 + 10,000 images), 269,322 parameters, two workers over TCP.

    sudo apt-get install dataset-fashion-mnist
    python -m shoal.bench.accuracy
    python -m shoal.bench.accuracy --codecs raw/raw,int8/bf16 --repeat 3 --data FOLDER

It starts a server and two workers (this same module) for each codec and repetition, and prints by codec the test accuracy and the
bytes of a step. Workers of one machine would share memory, where nothing is encoded: so `SHOAL_TRANSPORT` is tcp.

Rules
- All is as in raw but for the codecs: data, first weights, learning rate, staleness. The workers' order is not fixed, and the
  repetitions show how much that alone does.
- The images are read from the files of the Debian package; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import click
import numpy as np

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.errors import ConfigError, ShoalError

DATA = "/usr/share/datasets/fashion-mnist"
WAYS = "raw/raw,bf16/bf16,fp16/fp16,int8/int8,topk:0.1/bf16,topk:0.01/bf16"
WORKERS, STALENESS, EPOCHS, BATCH, HIDDEN = 2, 3, 5, 100, (256, 256)
OPTIMIZERS = {"sgd": 0.1, "adamw": 1e-3}
"""And their learning rates."""
HEAD = """| push / pull | test accuracy | least to most | test loss | pushed in a step | pulled in a step |
|---|---|---|---|---|---|"""


def load(folder: str, part: str) -> tuple[Any, Any]:
    """Images as float32 `[n, 784]` in 0 to 1, and labels as int64 `[n]`. `part`: train or t10k."""

    def read(what: str, skip: int) -> Any:
        path = Path(folder) / f"{part}-{what}-ubyte.gz"
        if not path.is_file():
            raise ConfigError(f"{path} is not there", hint="apt-get install dataset-fashion-mnist, or --data FOLDER")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=skip)

    return read("images-idx3", 16).reshape(-1, 784) / np.float32(255), read("labels-idx1", 8).astype(np.int64)


def train(folder: str, optimizer: str) -> None:
    """One worker: trains, and prints as JSON what it has done and what it reaches on the test images."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    sizes = (784, *HIDDEN, 10)
    layers: list[torch.nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [torch.nn.Linear(wide, narrow), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    examples = tuple(map(torch.from_numpy, load(folder, "train")))
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    with connect() as worker:
        opt = worker.optimizer(kind(model.parameters(), lr=OPTIMIZERS[optimizer]), model)
        for x, y in worker.partition(examples, BATCH, EPOCHS):
            opt.zero_grad()
            functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            opt.step()
        stats = worker.stats
    images, labels = map(torch.from_numpy, load(folder, "t10k"))
    with torch.no_grad():
        outputs = model(images)
    reached = {
        "accuracy": (outputs.argmax(1) == labels).float().mean().item(),
        "loss": functional.cross_entropy(outputs, labels).item(),
    }
    print(json.dumps(reached | {name: getattr(stats, name) for name in ("steps", "bytes_pushed", "bytes_pulled")}))


def run(push: str, pull: str, folder: str, optimizer: str) -> dict[str, float]:
    """One training. Returns the mean accuracy and loss of the workers' last weights, and their counters together."""
    command = [sys.executable, "-m", "shoal.bench.accuracy", "--work", "--optimizer", optimizer, "--data", folder]
    with LocalCluster(bind="127.0.0.1", shards=1, mode="async", staleness=STALENESS, min_workers=WORKERS) as cluster:
        codecs = {"SHOAL_TRANSPORT": "tcp", "SHOAL_PUSH_CODEC": push, "SHOAL_PULL_CODEC": pull, "OMP_NUM_THREADS": "1"}
        env = os.environ | codecs | {"SHOAL_JOIN": cluster.join}
        workers = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(WORKERS)]
        said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise ShoalError(f"a worker with {push}/{pull} failed")
    found = [json.loads(line) for line in said]
    return {name: (mean if name in ("accuracy", "loss") else sum)([one[name] for one in found]) for name in found[0]}


@click.command()
@click.option("--codecs", default=WAYS, show_default=True, help="PUSH/PULL,…")
@click.option("--data", default=DATA, show_default=True, help="The folder of the four files.")
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="sgd", show_default=True)
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1))
@click.option("--work", is_flag=True, hidden=True)
def main(codecs: str, data: str, optimizer: str, repeat: int, work: bool) -> None:
    """Train with each codec, and print a table."""
    if work:
        return train(data, optimizer)
    load(data, "t10k")
    click.echo(HEAD)
    for way in codecs.split(","):
        push, _, pull = way.partition("/")
        runs = [run(push, pull or "raw", data, optimizer) for _ in range(repeat)]
        accuracies = [one["accuracy"] for one in runs]
        steps = sum(one["steps"] for one in runs)
        pushed, pulled = (sum(one[f"bytes_{what}"] for one in runs) / steps / 1e3 for what in ("pushed", "pulled"))
        click.echo(
            f"| {push} / {pull} | {mean(accuracies):.4f} | {min(accuracies):.4f} to {max(accuracies):.4f} "
            f"| {mean(one['loss'] for one in runs):.4f} | {pushed:,.1f} kB | {pulled:,.1f} kB |"
        )


if __name__ == "__main__":
    main()
