"""Weights that arrive while the loop prepares its next batch: what the model computes is what it computed (rung T3)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from test_sync import BATCH, batch, expected, network, together
from torch.nn import functional

import shoal

STEPS = 12


def trained(
    model: torch.nn.Module, opt: torch.optim.Optimizer, steps: range, forward: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for step in steps:
        x, y = batch(step)
        opt.zero_grad()
        functional.cross_entropy(forward(x), y).backward()
        opt.step()


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], atol=1e-6) for name in other)


@pytest.fixture(params=["shm", "tcp"])
def worker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[shoal.Worker]:
    monkeypatch.setenv("SHOAL_TRANSPORT", request.param)
    with shoal.LocalCluster(shards=2) as cluster, shoal.connect(cluster.join) as worker:
        yield worker


USES: dict[str, Callable[[torch.nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "whole": lambda net: net,
    "layer by layer": lambda net: lambda x: net[2](torch.tanh(net[0](x))),  # type: ignore[index]
}


@pytest.mark.parametrize("use", USES)
def test_the_model_never_computes_with_old_weights(worker: shoal.Worker, use: str) -> None:
    """Whatever module is called, its weights are the newest; its state, too, and the weights that are left in the end."""
    net = network()
    plain = copy.deepcopy(net)
    opt, beside = worker.optimizer(sgd(net), net, prefetch=True), sgd(plain)
    for steps in (range(5), range(5, STEPS)):
        trained(net, opt, steps, USES[use](net))
        trained(plain, beside, steps, plain)
        assert opt._ahead is not None and opt._ahead.on
        assert same(net.state_dict(), plain.state_dict())
    trained(net, opt, range(1), net)
    trained(plain, beside, range(1), plain)
    assert not same(dict(net.named_parameters()), plain.state_dict()), "they wait for the model to be used"
    worker.close()
    assert same(dict(net.named_parameters()), plain.state_dict())


def test_state_that_is_set_stays_set(worker: shoal.Worker) -> None:
    """What the user loads between two steps is computed with; the servers' weights come with the next step, as ever."""
    net = network()
    before = copy.deepcopy(net.state_dict())
    opt = worker.optimizer(sgd(net), net, prefetch=True)
    trained(net, opt, range(3), net)
    net.load_state_dict(before)
    assert same(dict(net.named_parameters()), before)
    x, _ = batch(1)
    assert torch.equal(net(x), network()(x))


def test_a_use_that_cannot_be_seen_ends_it(worker: shoal.Worker, caplog: pytest.LogCaptureFixture) -> None:
    """A loop that computes with the parameters themselves is told, and is right from the next step on."""
    net = network()
    opt = worker.optimizer(sgd(net), net, prefetch=True)
    (w0, b0, w1, b1) = net.parameters()
    with caplog.at_level(logging.WARNING, "shoal"):
        trained(net, opt, range(2), lambda x: functional.linear(torch.tanh(functional.linear(x, w0, b0)), w1, b1))
    assert "prefetch is off" in caplog.text
    plain = network()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        newest = worker.pull()
    assert same(newest, plain.state_dict())


def test_sync_is_exact_with_it() -> None:
    """Two workers with shares of unequal size compute what one process does (guarantee 7)."""
    nets = [network(), network()]
    with shoal.LocalCluster(mode="sync", shards=2, min_workers=2, block_bytes=4096) as cluster:
        workers = [shoal.connect(cluster.join) for _ in nets]

        def part(worker: shoal.Worker, net: torch.nn.Module, share: slice) -> None:
            with worker:
                opt = worker.optimizer(torch.optim.Adam(net.parameters(), lr=0.01), net, prefetch=True)
                for step in range(20):
                    x, y = batch(step)
                    worker._examples += len(x[share])
                    opt.zero_grad()
                    functional.cross_entropy(net(x[share]), y[share]).backward()
                    opt.step()

        shares = slice(0, 7), slice(7, BATCH)
        together([lambda w=w, n=n, s=s: part(w, n, s) for w, n, s in zip(workers, nets, shares, strict=True)])  # type: ignore[misc]
    for net in nets:
        for found, wanted in zip(net.parameters(), expected(), strict=True):
            assert torch.allclose(found.detach(), wanted, atol=1e-5)
