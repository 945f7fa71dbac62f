"""`shoal bench overlap`: steps per second with gradients that leave during backward and weights fetched ahead, and without.

What runs
- One worker (this process) and one shard, over TCP as between machines; a stack of linear layers, SGD.
- `real`: the layers compute on this machine's cores, which the transfers need too.
- `emulated`: each layer waits in backward for as long as an accelerator would compute, and the cores are free meanwhile. So does
  the preparation of a batch, which takes as long as a pull.

Rules
- All variants are up at once and take turns, some steps each, so that noise hits all alike; medians of the turns.
- How long the emulated compute waits is set by the run itself: as long as a push and a pull of the model take.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from .pushpull import machine
from .table import PLAIN_WIDTH

if TYPE_CHECKING:
    import torch

VARIANTS = {
    "neither": {"overlap": False, "prefetch": False},
    "overlap": {"overlap": True, "prefetch": False},
    "prefetch": {"overlap": False, "prefetch": True},
    "both": {"overlap": True, "prefetch": True},
}
WARM_UP = 2
BATCH = 64


def main(width: int = 1536, layers: int = 6, steps: int = 4, repeat: int = 9, as_json: bool = False) -> int:
    """Measure, and print.

    Args:
        width: of a layer, inputs and outputs. steps: in one turn.
    """
    kinds = {kind: measured(kind, width, layers, steps, repeat) for kind in ("real", "emulated")}
    report = {
        "machine": machine(),
        "bytes": 4 * layers * width * (width + 1),
        "width": width,
        "layers": layers,
        "repeat": repeat,
        "runs": kinds,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def measured(kind: str, width: int, layers: int, steps: int, repeat: int) -> dict[str, Any]:
    """Seconds of a step of every variant, and what they were made of."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = os.environ.get("SHOAL_TRANSPORT")
    os.environ["SHOAL_TRANSPORT"] = "tcp"
    try:
        with ExitStack() as stack:
            racers = {name: _Racer(stack, width, layers, flags) for name, flags in VARIANTS.items()}
            push, pull = racers["neither"].transfer()
            compute = (push + pull) / layers if kind == "emulated" else 0.0
            prepare = pull if kind == "emulated" else 0.0
            batch = 1 if kind == "emulated" else BATCH
            turns: dict[str, list[float]] = {name: [] for name in racers}
            for turn in range(WARM_UP + repeat):
                for name, racer in racers.items():
                    seconds = racer.run(steps, batch, compute, prepare)
                    if turn >= WARM_UP:
                        turns[name].append(seconds)
            early = racers["both"].early()
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("SHOAL_TRANSPORT")
        if before is not None:
            os.environ["SHOAL_TRANSPORT"] = before
    return {
        "push_seconds": push,
        "pull_seconds": pull,
        "compute_seconds": compute * layers,
        "prepare_seconds": prepare,
        "share_early": early,
        "step_seconds": {name: float(f"{median(taken):.4g}") for name, taken in turns.items()},
    }


class _Racer:
    """A model, a worker and a cluster of its own."""

    def __init__(self, stack: ExitStack, width: int, layers: int, flags: dict[str, bool]) -> None:
        import torch

        cluster = stack.enter_context(LocalCluster(bind="127.0.0.1", shards=1, mode="async", staleness=inf))
        self._worker = stack.enter_context(connect(cluster.join))
        torch.manual_seed(0)
        self._width, self._waits = width, _waits()
        self._layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        sgd = torch.optim.SGD(self._layers.parameters(), lr=1e-6)
        self._opt = self._worker.optimizer(sgd, self._layers, overlap=flags["overlap"], prefetch=flags["prefetch"])

    def run(self, steps: int, batch: int, compute: float, prepare: float) -> float:
        """Seconds a step."""
        import torch

        started = time.perf_counter()
        for _ in range(steps):
            x = torch.ones(batch, self._width, requires_grad=True)
            time.sleep(prepare)
            self._opt.zero_grad()
            for layer in self._layers:
                x = torch.relu(layer(self._waits.apply(x, compute)))  # type: ignore[no-untyped-call]
            x.sum().backward()  # type: ignore[no-untyped-call]
            self._opt.step()
        return (time.perf_counter() - started) / steps

    def transfer(self) -> tuple[float, float]:
        """Seconds of a push alone and of a pull alone."""
        taken: list[tuple[float, float]] = []
        for _ in range(5):
            gradients = self._worker.buffers.gradients
            for gradient in gradients.values():
                gradient.zero_()
            started = time.perf_counter()
            self._worker.push(gradients).result()
            pushed = time.perf_counter()
            self._worker.pull(out=self._worker.buffers.weights)
            taken.append((pushed - started, time.perf_counter() - pushed))
        return median(push for push, _ in taken), median(pull for _, pull in taken)

    def early(self) -> float:
        """The share of pushed bytes that left during backward."""
        stats = self._worker.stats
        return stats.bytes_early / stats.bytes_pushed


def _waits() -> type[torch.autograd.Function]:
    """The identity, which takes some time in backward without using a core."""
    import torch

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            context.seconds = seconds
            return x.view_as(x)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            time.sleep(context.seconds)
            return gradient, None

    return Waits


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(
        f"{report['machine']['cpus']} CPUs; {report['layers']} layers of {report['width']}, {report['bytes'] / 1e6:.1f} MB "
        f"of float32, over TCP; medians of {report['repeat']}\n"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("steps per second")
    for name in (*VARIANTS, "push alone", "pull alone", "compute", "left early"):
        table.add_column(name, justify="right")
    for kind, run in report["runs"].items():
        rates = (f"{1 / run['step_seconds'][name]:.2f}" for name in VARIANTS)
        times = (f"{1e3 * run[f'{what}_seconds']:.0f} ms" for what in ("push", "pull", "compute"))
        table.add_row(kind, *rates, *times, f"{run['share_early']:.0%}")
    console.print(table)
