"""Owners whose data differ: each of ten has few kinds of digits, and rounds drift. SCAFFOLD against FedAvg.

    python examples/digits_skewed.py
    shoal run -n 10 --servers 2 --mode federated --rounds 20 examples/digits_skewed.py --scaffold

The first trains both ways on clusters of its own, with `--seeds` splits, and can draw a picture (`--plot FILE`). The second is one
training, each worker an owner. Parts are drawn by a Dirichlet distribution with concentration 0.1 (Hsu et al. 2019).
"""

import argparse
import os
import threading

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shoal

OWNERS, ROUNDS, STEPS, BATCH, RATE = 10, 20, 40, 32, 0.1


def data(seed: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """The owners' parts, and images that nobody trains on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16.0, dtype=torch.float32), torch.tensor(labels[order])
    return shoal.split((x[360:], y[360:]), OWNERS, by=1, alpha=0.1, seed=seed), (x[:360], y[:360])


def train(worker: shoal.Worker, number: int, scaffold: bool, seed: int) -> list[float]:
    """What one owner does. Returns the accuracy of the model of each round, on images that nobody has."""
    parts, (test_x, test_y) = data(seed)
    x, y = parts[number]
    draw = torch.Generator().manual_seed(100 * seed + number)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=RATE), model, scaffold=scaffold)
    curve = []
    for round_ in worker.rounds(model, examples=len(x)):
        curve.append((model(test_x).argmax(1) == test_y).float().mean().item())
        for _ in range(STEPS):
            batch = torch.randperm(len(x), generator=draw)[:BATCH]
            opt.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
        round_.submit()
    curve.append((model(test_x).argmax(1) == test_y).float().mean().item())
    return curve[1:]


def training(scaffold: bool, seed: int, rounds: int) -> list[float]:
    """One training with a cluster of its own, its workers in threads."""
    curves: list[list[float]] = []

    def owner(number: int) -> None:
        with shoal.connect(cluster.join, name=f"w{number}") as worker:
            curves.append(train(worker, number, scaffold, seed))

    with shoal.LocalCluster(mode="federated", min_workers=OWNERS, rounds=rounds) as cluster:
        threads = [threading.Thread(target=owner, args=(number,)) for number in range(OWNERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return curves[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="FedAvg and SCAFFOLD on skewed data")
    parser.add_argument("--scaffold", action="store_true", help="with control variates (as a worker)")
    parser.add_argument("--seeds", type=int, default=1, help="so many splits")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plot", metavar="FILE", help=".png or .svg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "SHOAL_JOIN" in os.environ:
        with shoal.connect() as worker:
            curve = train(worker, int(worker.name[1:]) % OWNERS, args.scaffold, 0)
        print(f"test accuracy {curve[-1]:.4f} after {len(curve)} rounds")
        return
    found = {}
    for name, scaffold in (("FedAvg", False), ("SCAFFOLD", True)):
        found[name] = np.array([training(scaffold, seed, args.rounds) for seed in range(args.seeds)])
        print(f"{name:<9} test accuracy {found[name][:, -1].mean():.4f} after {args.rounds} rounds")
    if args.plot:
        plot(args.plot, found)


def plot(path: str, found: dict[str, np.ndarray]) -> None:
    """Accuracy over rounds: each seed thin, the mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for color, (name, curves) in zip(("C0", "C1"), found.items(), strict=True):
        rounds = range(1, curves.shape[1] + 1)
        axes.plot(rounds, curves.T, color=color, linewidth=0.6, alpha=0.5)
        axes.plot(rounds, curves.mean(0), color=color, label=name)
    axes.set(xlabel="round", ylabel="accuracy on held-out digits", ylim=(0, 1))
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
