"""Gradients that leave before their step ends: which blocks, whether they still count, and what the shards make of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from math import nan

import numpy as np
import pytest
import torch
from cores import ShardBench, only

import shoal
from shoal.protocol import messages as m
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import Delta
from shoal.worker.arrays import Cache, Gather
from shoal.worker.early import REST, Early

# --- which blocks

SPEC = ModelSpec(
    (Tensor("a", "float32", (1000,)), Tensor("b", "float32", (1500,)), Tensor("c", "float32", (800,))), (Delta(),)
)
"""Blocks of 1,024 floats: a in 0; b in 0, 1 and 2; c in 2 and 3."""


def early(shards: tuple[int, ...] = (0,)) -> tuple[Early, Gather]:
    layout = lay_out(SPEC, 1, 4096)
    assert [1024, 1024, 1024, 228] == [block.elements for block in layout.blocks]
    one = Early(layout, shards)
    one.begin()
    return one, Gather(Cache(layout))


def test_a_block_leaves_with_its_last_gradient() -> None:
    """In whatever order backward makes them; a block that holds NaN stays, and so do all for shards that share memory."""
    for order in itertools.permutations("abc"):
        one, gather = early()
        left: list[set[int]] = [set(one.made(name, gather)) for name in order]
        needs = {0: "ab", 1: "b", 2: "bc", 3: "c"}
        for at in range(3):
            assert {b for b, names in needs.items() if set(names) <= set(order[: at + 1])} == set().union(
                *left[: at + 1]
            )
        assert [] == [block for name in order for block in one.made(name, gather)], "again: a second backward"
    one, gather = early()
    gather.values(1)[7] = nan
    assert {2, 3} == {block for name in "cb" for block in one.made(name, gather)}
    one, gather = early(shards=())
    assert [] == [block for name in "abc" for block in one.made(name, gather)]


CHANGES: dict[str, Callable[[np.ndarray], object]] = {
    "scaled": lambda values: np.multiply(values, 0.5, out=values),
    "negated": lambda values: np.negative(values, out=values),
    "clipped": lambda values: np.clip(values, -0.5, 0.5, out=values),
    "one": lambda values: values.__setitem__(100, -values[100]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    """By whatever way the values were changed; then nothing leaves early for some steps."""
    one, gather = early()
    assert not one.unchanged(gather), "nothing has left"
    for block in range(4):
        gather.values(block)[:] = np.random.default_rng(block).normal(size=len(gather.values(block)))
    assert 4 == len([block for name in "abc" for block in one.made(name, gather)])
    assert one.unchanged(gather)
    assert not early()[0].unchanged(None)
    CHANGES[change](gather.values(2))
    assert not one.unchanged(gather)

    for step in range(REST + 1):
        one.begin()
        assert (4 if step == REST else 0) == len([block for name in "abc" for block in one.made(name, gather)])


# --- what a shard makes of them


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("counts", [True, False], ids=["count", "dropped"])
def test_what_is_held_waits_for_the_end_of_its_step(mode: str, counts: bool) -> None:
    """It is applied with the `advance` that says so, at its numbers and with its weight; otherwise it is dropped (§6.3)."""
    bench = ShardBench((1,), mode=mode)
    bench.start(1)
    bench.push(1, 0, -1.0, -2.0, advance=False, examples=0.0, held=True)
    assert [0.0, 0.0] == bench.weights
    bench.push(1, 0, examples=4.0, hyper=((0.5, 0.0, 0.0, 0.0, 0.0, 0.0),), held=counts)
    assert ([0.5, 1.0] if counts else [0.0, 0.0]) == bench.weights
    bench.push(1, 1, held=True)
    assert ([0.5, 1.0] if counts else [0.0, 0.0]) == bench.weights, "nothing is left of it"


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_refused_part_refuses_the_step(mode: str) -> None:
    """The `advance` that would count it is refused, so that the caller is told; the step ends all the same (§6.3)."""
    bench = ShardBench((1,), mode=mode)
    bench.start(1)
    bench.push(1, 0, -1.0, -2.0, advance=False, held=True)
    bench.push(1, 0, nan, 0.0, advance=False, held=True)
    ack = only(m.Ack, bench.push(1, 0, -8.0, 0.0, held=True))
    assert ["nonfinite", "spoiled"] == [refusal[1] for refusal in ack.refusals]
    assert (1, [0.0, 0.0]) == (ack.min_clock, bench.weights)

    bench.push(1, 1, -1.0, -2.0, advance=False, held=True)
    bench.push(1, 1, held=True)
    assert [1.0, 2.0] == bench.weights


def test_what_is_held_goes_with_its_worker() -> None:
    """One that pauses or dies in the middle of a step leaves nothing of it."""
    bench = ShardBench((1, 2))
    bench.start(1, 2)
    for worker in (1, 2):
        bench.push(worker, 0, -1.0, 0.0, advance=False, held=True)
    bench.do(m.Pause, 1)
    bench.do(m.Start, 1, 0)
    bench.view((1,))
    bench.push(1, 0, held=True)
    assert [0.0, 0.0] == bench.weights
    assert {} == bench.core.weights._held  # type: ignore[union-attr]


# --- training


class Twins:
    """A net of several blocks, wrapped, and beside it one that plain torch trains."""

    def __init__(self, worker: shoal.Worker, overlap: bool = True) -> None:
        torch.manual_seed(3)
        layers = [torch.nn.Linear(64, 64) for _ in range(4)]
        self.worker = worker
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 2))
        self.plain = copy.deepcopy(self.net)
        sgd = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.opt = worker.optimizer(sgd, self.net, overlap=overlap)
        self.beside = torch.optim.SGD(self.plain.parameters(), lr=0.1, momentum=0.9)
        self.batches = itertools.count()

    def step(self, between: Callable[[torch.nn.Module], object] = lambda net: None, backwards: int = 1) -> int:
        """One step of both; `between` backward and step. Returns the bytes that left early."""
        before = self.worker.stats.bytes_early
        for opt in (self.opt, self.beside):
            opt.zero_grad()
        for _ in range(backwards):
            torch.manual_seed(next(self.batches))
            x, y = torch.randn(6, 64), torch.randn(6, 2)
            for net in (self.net, self.plain):
                torch.nn.functional.mse_loss(net(x), y).backward()
        for net, opt in ((self.net, self.opt), (self.plain, self.beside)):
            between(net)
            opt.step()
        pairs = zip(self.net.parameters(), self.plain.parameters(), strict=True)
        assert all(torch.allclose(a.detach(), b.detach(), atol=1e-6) for a, b in pairs)
        return self.worker.stats.bytes_early - before


def clamped(net: torch.nn.Module) -> None:
    """As old scripts do it: `.data` leaves no trace."""
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad.data.clamp_(-1e-3, 1e-3)


@pytest.fixture(params=["async", "sync"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[shoal.Worker]:
    monkeypatch.setenv("SHOAL_TRANSPORT", "tcp")
    monkeypatch.setenv("SHOAL_BLOCK_BYTES", "4KiB")
    with shoal.LocalCluster(shards=2, mode=request.param) as cluster, shoal.connect(cluster.join) as worker:
        yield worker


def test_nothing_is_different_but_the_time(worker: shoal.Worker) -> None:
    """All gradients leave early; those that are changed afterwards, or made in two passes, travel again and count once."""
    twins = Twins(worker)
    whole = sum(4 * parameter.numel() for parameter in twins.net.parameters())
    assert [whole] * 3 == [twins.step() for _ in range(3)]
    twins.step(clamped)
    assert 0 == twins.step(), "it rests"
    twins.opt._views._early._rest = 0  # type: ignore[union-attr]
    twins.step(backwards=2)
    twins.opt._views._early._rest = 0  # type: ignore[union-attr]
    twins.step(lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01))
    twins.opt._views._early._rest = 0  # type: ignore[union-attr]
    assert whole == twins.step()


def test_a_step_that_was_not_made_leaves_nothing(worker: shoal.Worker) -> None:
    """One gradient is NaN, the others have left: the caller is told, tries again, and each counts once."""
    twins = Twins(worker)
    twins.step()
    twins.opt.zero_grad()
    (twins.net(torch.randn(6, 64)).sum() + nan * twins.net[0].weight.sum()).backward()
    assert worker.stats.bytes_early > 0
    with pytest.raises(shoal.NonFiniteError, match="0.weight"):
        twins.opt.step()
    twins.opt._views._early._rest = 0  # type: ignore[union-attr]
    twins.step()
    whole = sum(4 * parameter.numel() for parameter in twins.net.parameters())
    assert whole == twins.step()


def test_it_can_be_switched_off(worker: shoal.Worker) -> None:
    """By a flag; and in shared memory nothing travels anyway."""
    twins = Twins(worker, overlap=False)
    assert [0, 0] == [twins.step() for _ in range(2)]
