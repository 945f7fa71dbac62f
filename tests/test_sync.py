"""Sync mode is exact (guarantee 7): any number of workers and shards computes what one process does on the concatenated batch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import shoal

STEPS = 20
BATCH = 24


def together(calls: list[Callable[[], None]], seconds: float = 60.0) -> None:
    """Each call in a thread of its own; the first error comes out, and nobody is left hanging."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 5, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))


def expected() -> list[torch.Tensor]:
    """One process, all of each batch."""
    net = network()
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(STEPS):
        x, y = batch(step)
        opt.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        opt.step()
    return [parameter.detach() for parameter in net.parameters()]


def train(worker: shoal.Worker, net: nn.Module, share: slice) -> None:
    """One worker's part: its share of each batch, and how many examples that is."""
    opt = worker.optimizer(torch.optim.Adam(net.parameters(), lr=0.01), net)
    for step in range(STEPS):
        x, y = batch(step)
        worker._examples += len(x[share])
        opt.zero_grad()
        functional.cross_entropy(net(x[share]), y[share]).backward()
        opt.step()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equals_one_process(workers: int, shards: int) -> None:
    """20 steps of Adam, 1, 2 or 4 workers with shares of unequal size, 1 to 3 shards: equal to 1e-5."""
    cuts = {1: [0, 24], 2: [0, 7, 24], 4: [0, 3, 10, 15, 24]}[workers]
    nets = [network() for _ in range(workers)]
    with shoal.LocalCluster(mode="sync", shards=shards, min_workers=workers, block_bytes=4096) as cluster:
        joined = [shoal.connect(cluster.join) for _ in range(workers)]
        try:
            together(
                [
                    lambda worker=worker, net=net, share=slice(a, b): train(worker, net, share)
                    for worker, net, a, b in zip(joined, nets, cuts, cuts[1:], strict=False)
                ]
            )
        finally:
            for worker in joined:
                worker.close()

    for net in nets:
        for wanted, found in zip(expected(), net.parameters(), strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-5)


def test_uneven_ends_hang_nobody() -> None:
    """Workers whose data does not divide evenly, with short last batches, all come to the end, in step."""
    x = np.arange(50, dtype=np.float64)
    seen: list[int] = []
    with shoal.LocalCluster(mode="sync", min_workers=3) as cluster:

        def work() -> None:
            with shoal.connect(cluster.join) as worker:
                worker.register({"w": np.zeros(1)}, optimizer=shoal.Delta())
                for xs in worker.partition(x, batch_size=4, partition_size=4, epochs=2):
                    worker.push({"w": np.ones(1)})
                    worker.clock()
                    worker.pull()
                    seen.append(len(xs))
                assert worker.stats.clock >= worker.stats.min_clock - 1

        together([work] * 3)

        assert 100 == sum(seen)
        assert [4] * 24 + [2] * 2 == sorted(seen, reverse=True)
        (job,) = cluster.status()["data"]
        assert (26, 0) == (job["completed"], job["lost"])


def test_a_step_without_examples_does_not_count() -> None:
    """`clock(examples=0)` ends a step and leaves the average to the others; a missing push counts as a gradient of zero."""
    with shoal.LocalCluster(mode="sync", min_workers=2) as cluster:
        found: dict[str, list[float]] = {}

        def work(name: str, gradient: float | None, examples: float) -> None:
            with shoal.connect(cluster.join, name=name) as worker:
                worker.register({"a": np.zeros(1), "b": np.zeros(1)}, optimizer=shoal.SGD(lr=1.0))
                if gradient is not None:
                    worker.push({"a": np.array([gradient])}, examples=examples)
                worker.clock(examples=examples)
                found[name] = [float(v[0]) for v in worker.pull().values()]
                worker.push({"b": np.array([6.0])} if name == "one" else {"a": np.array([6.0])}, examples=examples or 1)
                worker.clock()
                found[name] += [float(v[0]) for v in worker.pull().values()]

        together([lambda: work("one", 4.0, 2.0), lambda: work("two", None, 0.0)])

        assert [-4.0, 0.0] == found["one"][:2] == found["two"][:2]
        # Second step: `one` has 2 examples for b, `two` has 1 for a; each counts as zero for the other's tensor.
        assert [-4.0 - 6.0 * 1 / 3, -6.0 * 2 / 3] == pytest.approx(found["one"][2:])
