"""First together on public data, asynchronously; then each on data of its own, in masked rounds. One cluster, model and script.

    python examples/public_then_private.py

In life the two halves lie on several machines: `shoal server --min-workers 3` on one, this script with SHOAL_JOIN on each owner's,
and, when the public data are learned, `shoal mode federated`.
"""

import os
import threading
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shoal

OWNERS = 3


def data() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Public images, which have no 7, 8 or 9; private ones, which have all; and some to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16.0, dtype=torch.float32), torch.tensor(labels[order])
    public = torch.arange(360, 1000)[y[360:1000] < 7]
    return (x[public], y[public]), (x[1000:], y[1000:]), (x[:360], y[:360])


def step(model: nn.Module, opt: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """The same in both halves: the mode decides what becomes of it."""
    opt.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    opt.step()


def train(worker: shoal.Worker, number: int, learned: threading.Barrier | None = None) -> tuple[float, float]:
    """What one owner does. Returns the accuracy after either half."""
    public, private, (test_x, test_y) = data()
    mine = shoal.split(private, OWNERS, seed=1)[number]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.2), model)

    def accuracy() -> float:
        return (model(test_x).argmax(1) == test_y).float().mean().item()

    for x, y in worker.partition(public, batch_size=16, epochs=6):  # leased: each batch is learned once, by somebody
        step(model, opt, x, y)
    before = accuracy()
    print(f"{worker.name}: test accuracy {before:.3f} after the public data")
    if learned is not None:
        learned.wait()
    while worker.mode != "federated":  # the operator's decision, not this script's
        time.sleep(0.1)
    for round_ in worker.rounds(model, examples=len(mine[1]), require="secagg", count=15):
        for batch in torch.randperm(len(mine[1])).split(16):
            step(model, opt, mine[0][batch], mine[1][batch])
        round_.submit()
    print(f"{worker.name}: test accuracy {accuracy():.3f} after rounds over the private data")
    return before, accuracy()


def main() -> None:
    torch.set_num_threads(1)
    if "SHOAL_JOIN" in os.environ:
        with shoal.connect() as worker:
            train(worker, int(worker.name[1:]) % OWNERS)
        return
    learned = threading.Barrier(OWNERS + 1)

    def owner(number: int) -> None:
        with shoal.connect(cluster.join, name=f"w{number}") as worker:
            train(worker, number, learned)

    with shoal.LocalCluster(shards=2, min_workers=OWNERS) as cluster:
        threads = [threading.Thread(target=owner, args=(number,)) for number in range(OWNERS)]
        for thread in threads:
            thread.start()
        learned.wait(60)
        cluster.switch("federated")
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
