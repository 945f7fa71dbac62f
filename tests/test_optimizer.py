"""The torch wrapper against real servers: one worker computes what plain torch does (rung T3)."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_sync import together
from torch import nn
from torch.nn import functional

import shoal

STEPS = 50


class Net(nn.Module):
    """Two layers, one of which is used only in every third step; a tensor that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 17)
        self.second = nn.Linear(17, 3)
        self.sometimes = nn.Linear(17, 3)
        self.never = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) + (self.sometimes(hidden) if step % 3 == 2 else 0.0)


def nets() -> tuple[Net, Net]:
    torch.manual_seed(1)
    net = Net()
    return net, copy.deepcopy(net)


def loss_of(net: Net, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(9, 6, generator=generator), torch.randint(0, 3, (9,), generator=generator)
    return functional.cross_entropy(net(x, step), y)


def groups(net: Net) -> list[dict[str, Any]]:
    """Two parameter groups, the second with numbers of its own."""
    return [
        {"params": [*net.first.parameters(), net.never]},
        {"params": [*net.second.parameters(), *net.sometimes.parameters()], "lr": 0.02, "weight_decay": 0.05},
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.99)),
    "lbfgs-like, local": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_worker_equals_plain_torch(name: str) -> None:
    """50 steps with groups, a scheduler, clipping, and parameters without gradient equal plain torch to 1e-6."""
    plain, shared = nets()
    theirs = OPTIMIZERS[name](groups(plain))
    with shoal.LocalCluster(shards=2, block_bytes=4096) as cluster, shoal.connect(cluster.join) as worker:
        ours = worker.optimizer(OPTIMIZERS[name](groups(shared)), shared)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=7, gamma=0.7) for o in (theirs, ours)]
        for step in range(STEPS):
            for net, opt, scheduler in zip((plain, shared), (theirs, ours), schedulers, strict=True):
                opt.zero_grad()
                loss_of(net, step).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                opt.step()
                scheduler.step()

        assert STEPS == worker.stats.clock
        for (key, expected), found in zip(plain.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def wrapped() -> Iterator[tuple[shoal.Worker, Net, Any]]:
    """A wrapped SGD for tests of the surface."""
    _, net = nets()
    with pytest.MonkeyPatch.context() as patch, shoal.LocalCluster() as cluster:
        patch.setenv("SHOAL_TRANSPORT", "tcp")  # shared memory is kept from its first use on: no leak of a test's
        with shoal.connect(cluster.join) as worker:
            yield worker, net, worker.optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_it_is_an_optimizer(wrapped: tuple[shoal.Worker, Net, Any]) -> None:
    """Hooks, closures, groups and zero_grad work as torch's do."""
    _, net, opt = wrapped
    seen: list[str] = []
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = opt.step(closure)

    assert isinstance(opt, torch.optim.Optimizer)
    assert loss.item() > 0
    assert ["before", "after"] == seen
    assert 0.1 == opt.defaults["lr"] == opt.param_groups[0]["lr"]
    assert "SGD" not in type(opt).__name__
    opt.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    for handle in handles:
        handle.remove()


def test_the_state_dict(wrapped: tuple[shoal.Worker, Net, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Hyperparameters and the clock are in it; loading sets the hyperparameters, and says that state is on the servers."""
    worker, net, opt = wrapped
    saved = opt.state_dict()
    assert {"clock": worker.stats.clock} == saved["shoal"]

    saved["param_groups"][0]["lr"] = 0.25
    saved["state"] = {0: {"momentum_buffer": torch.ones(1)}}
    opt.load_state_dict(saved)

    assert 0.25 == opt.param_groups[0]["lr"]
    assert opt.param_groups is opt._inner.param_groups
    assert "lives on the servers" in caplog.text
    before = net.first.bias.detach().clone()
    opt.zero_grad()
    net.first.bias.grad = torch.ones_like(net.first.bias)
    opt.step()
    torch.testing.assert_close(net.first.bias.detach(), before - 0.25)


def test_what_cannot_be_done_says_so(wrapped: tuple[shoal.Worker, Net, Any]) -> None:
    """Copies, pickles, late groups, changed flags, foreign parameters: clear errors."""
    worker, net, opt = wrapped
    with pytest.raises(shoal.ConfigError, match="copied"):
        copy.deepcopy(opt)
    with pytest.raises(shoal.ConfigError, match="pickled"):
        pickle.dumps(opt)
    with pytest.raises(shoal.ConfigError, match="added after wrapping"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(shoal.ConfigError, match="is not in the model"):
        worker.optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), net)
    with pytest.raises(shoal.ConfigError, match="wrapped already"):
        worker.optimizer(opt, net)
    with pytest.raises(shoal.ConfigError, match="buffers"):
        worker.optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, buffers="mystery")
    opt.param_groups[0]["nesterov"] = True
    try:
        net.first.bias.grad = torch.ones_like(net.first.bias)
        with pytest.raises(shoal.ConfigError, match="flags stay"):
            opt.step()
    finally:
        opt.param_groups[0]["nesterov"] = False


def test_a_skipped_step_of_the_grad_scaler(wrapped: tuple[shoal.Worker, Net, Any]) -> None:
    """Where GradScaler found infinities, the clock advances and the weights stay; else gradients are unscaled once."""
    worker, net, opt = wrapped
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt.zero_grad()
    scaler.scale(net.never.sum() * torch.inf).backward()
    before, clock = worker.pull(), worker.stats.clock
    scaler.step(opt)
    scaler.update()

    assert clock + 1 == worker.stats.clock
    assert all(torch.equal(before[name], after) for name, after in worker.pull().items())
    assert 512.0 == scaler.get_scale()

    opt.zero_grad()
    scaler.scale(net.never.sum()).backward()
    scaler.step(opt)
    lr = opt.param_groups[0]["lr"]
    torch.testing.assert_close(net.never.detach(), before["never"] - lr)


def test_nan_raises_and_nothing_is_sent(wrapped: tuple[shoal.Worker, Net, Any]) -> None:
    """A gradient that is not finite raises in `step`, names the tensor, and neither clock nor weights move."""
    worker, net, opt = wrapped
    clock = worker.stats.clock
    opt.zero_grad()
    net.second.bias.grad = torch.full_like(net.second.bias, torch.nan)
    with pytest.raises(shoal.NonFiniteError, match="'second.bias'"):
        opt.step()
    opt.zero_grad()

    assert clock == worker.stats.clock


def test_a_local_optimizer_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer outside the list runs here, with a warning; a compiled model is unwrapped; sparse names are plain."""
    net = nn.Linear(3, 2)
    compiled = torch.compile(net, backend="eager")
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as worker:
        with caplog.at_level(logging.WARNING):
            opt = worker.optimizer(torch.optim.Adadelta(net.parameters()), compiled)  # type: ignore[arg-type]
        for _ in range(2):
            opt.zero_grad()
            net(torch.ones(1, 3)).sum().backward()
            opt.step()

        assert 1 == caplog.text.count("Adadelta is not one of the optimizers that run on the servers")
        assert ["weight", "bias"] == list(worker.pull())


def test_late_joiners_take_the_weights() -> None:
    """A worker that comes later overwrites its own first weights before its first step."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    assert not torch.equal(first.weight, second.weight)
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as one, shoal.connect(cluster.join) as two:
        one.optimizer(torch.optim.SGD(first.parameters(), lr=0.1), first)
        two.optimizer(torch.optim.SGD(second.parameters(), lr=0.1), second)

        assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("policy", ["local", "mean"])
def test_buffers(policy: str) -> None:
    """`local`: each worker keeps its own BatchNorm statistics. `mean`: they are the mean over the workers; counters stay local."""
    with shoal.LocalCluster(mode="sync", min_workers=2) as cluster:
        nets = [nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2)]
        workers = [shoal.connect(cluster.join) for _ in nets]
        try:
            together(
                [
                    lambda w=w, n=n, k=k: _norm_step(w, n, k, policy)
                    for k, (w, n) in enumerate(zip(workers, nets, strict=True))
                ]
            )
        finally:
            for worker in workers:
                worker.close()

    means = [net[0].running_mean.tolist() for net in nets]  # type: ignore[union-attr, operator]
    expected = {"local": [[0.0, 0.0], [1.0, 1.0]], "mean": [[0.5, 0.5], [0.5, 0.5]]}[policy]
    for wanted, found in zip(expected, means, strict=True):
        assert wanted == pytest.approx(found)
    assert [1, 1] == [int(net[0].num_batches_tracked) for net in nets]  # type: ignore[arg-type]


def _norm_step(worker: shoal.Worker, net: nn.Module, number: int, policy: str) -> None:
    opt = worker.optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, buffers=policy)
    x = torch.tensor([[9.0, 9.0], [11.0, 11.0]]) * number  # means 0 and 10, momentum 0.1
    net(x).sum().backward()
    opt.step()
