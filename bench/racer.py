"""One worker of `shoal bench stragglers`: a process that trains the same small model in one way after the other.

`python -m shoal.bench.racer NUMBER` reads orders from standard input, one JSON object a line, and answers each with another when
the race is over. It ends with its standard input.

Rules
- Whatever the way, a step is the same: sleep for what is emulated, draw a batch, forward, backward; then the way's own part.
- The racer with number 0 keeps copies of the weights as it goes, and looks at their loss when the race is over.
- A batch is drawn from a generator of the seed and the number: in every way a racer sees the same batches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from torch.nn import functional

from ..launch.connect import connect
from ..protocol.errors import NonFiniteError
from ..protocol.stale import Compensate, Option
from .limits import TIMEOUT

BATCH = 32
HIDDEN = 128
SNAPSHOTS = 200
"""Copies of the weights in a race."""
WARM_UP = 30


def dataset() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 handwritten digits of 8 by 8 pixels (scikit-learn's), as float32 in [0, 1], and what they are."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long()


def network(seed: int) -> torch.nn.Sequential:
    """64 → 128 → 10, ReLU between: 9,610 parameters."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10))


class Racer:
    """Keeps the data between races."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.x, self.y = dataset()
        self._modules: list[torch.nn.Module] = []
        """Kept to the end: gloo's threads and the collector of a DDP module can wait for each other for ever."""
        self.arithmetic = self._time_arithmetic()
        """Seconds of a step's own forward and backward pass, which are part of what is emulated."""

    def _time_arithmetic(self) -> float:
        net, batch = network(0), torch.arange(BATCH)
        seconds = []
        for _ in range(WARM_UP):
            started = time.perf_counter()
            self._gradient(net, batch)
            seconds.append(time.perf_counter() - started)
        return sorted(seconds)[WARM_UP // 2]

    def _gradient(self, net: torch.nn.Module, batch: torch.Tensor) -> None:
        net.zero_grad()
        functional.cross_entropy(net(self.x[batch]), self.y[batch]).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def loss(self, net: torch.nn.Module) -> float:
        """Mean cross-entropy over all of the data."""
        return functional.cross_entropy(net(self.x), self.y).item()

    def race(self, order: dict[str, Any]) -> dict[str, Any]:
        """Run one race.

        Args:
            order: way (`shoal` or `ddp`), seed, lr, compute (seconds a step), seconds (of the race); for shoal: join, stale;
                for ddp: workers, store (a file that is not there yet), steps.

        Returns:
            steps, seconds, fewer if it diverged; the curve as [seconds, loss], of racer 0; how often which staleness was seen.
        """
        net = network(order["seed"])
        with ExitStack() as stack:
            way = _shoal if order["way"] == "shoal" else _ddp
            module, finish, staleness = way(self.number, net, order, stack)
            self._modules.append(module)
            kept: list[tuple[float, list[torch.Tensor]]] = []
            begun, steps = time.perf_counter(), 0
            batches = torch.Generator().manual_seed(1000 * order["seed"] + self.number)
            while True:
                now = time.perf_counter() - begun
                if self.number == 0 and now >= len(kept) * order["seconds"] / SNAPSHOTS:
                    kept.append((now, [p.detach().clone() for p in net.parameters()]))
                if steps >= order["steps"] if order["way"] == "ddp" else now >= order["seconds"]:
                    break
                time.sleep(max(0.0, order["compute"] - self.arithmetic))
                self._gradient(module, torch.randint(len(self.x), (BATCH,), generator=batches))
                try:
                    finish()
                except NonFiniteError:  # it has diverged: from here on there is no loss to speak of
                    kept.append((now, [torch.full_like(p, torch.nan) for p in net.parameters()]))
                    break
                steps += 1
            found: dict[str, Any] = {"steps": steps, "seconds": now, "staleness": staleness()}
        return found | {"curve": [(at, self._loss_of(net, weights)) for at, weights in kept]}

    @torch.no_grad()
    def _loss_of(self, net: torch.nn.Module, weights: list[torch.Tensor]) -> float:
        for parameter, values in zip(net.parameters(), weights, strict=True):
            parameter.copy_(values)
        return self.loss(net)


Way = tuple[torch.nn.Module, Callable[[], object], Callable[[], dict[int, int]]]
"""What to compute gradients of, what ends a step, what staleness was seen."""


def _shoal(number: int, net: torch.nn.Sequential, order: dict[str, Any], stack: ExitStack) -> Way:
    worker = stack.enter_context(connect(order["join"], name=f"racer-{number}", wait_timeout=TIMEOUT))
    optimizer = worker.optimizer(torch.optim.SGD(net.parameters(), lr=order["lr"]), net, stale=read_remedy(order))
    return net, optimizer.step, lambda: dict(worker.stats.staleness)


def _ddp(number: int, net: torch.nn.Sequential, order: dict[str, Any], stack: ExitStack) -> Way:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group(
        "gloo",
        init_method=f"file://{order['store']}",
        rank=number,
        world_size=order["workers"],
        timeout=timedelta(seconds=TIMEOUT),
    )
    stack.callback(distributed.destroy_process_group)
    module = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=order["lr"])
    distributed.barrier()
    return module, optimizer.step, dict


def read_remedy(order: dict[str, Any]) -> Option:
    """As an order says it: null, "scale", or [lam, adaptive]."""
    stale: str | list[float] | None = order["stale"]
    return Compensate(stale[0], bool(stale[1])) if isinstance(stale, list) else stale


def main(number: int) -> None:
    """Race until standard input ends."""
    torch.set_num_threads(1)
    racer = Racer(number)
    for line in sys.stdin:
        print(json.dumps(racer.race(json.loads(line))), flush=True)
    os._exit(0)  # see `Racer._modules`


if __name__ == "__main__":
    main(int(sys.argv[1]))
