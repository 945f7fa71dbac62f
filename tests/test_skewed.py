"""Owners whose data differ: FedAvg ends beside the optimum, SCAFFOLD on it, FedProx nearer (rungs T0 and T3)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_federated import each

import shoal
from shoal.protocol.errors import ConfigError
from shoal.worker.scaffold import PREFIX, Scaffold

CURVES, MINIMA = (1.0, 4.0, 10.0), (3.0, -1.0, 0.5)
OPTIMUM = sum(a * b for a, b in zip(CURVES, MINIMA, strict=True)) / sum(CURVES)
STEPS, LR = 10, 0.05


def loss(number: int, w: torch.Tensor) -> torch.Tensor:
    return 0.5 * CURVES[number] * (w - MINIMA[number]).square().sum()


def drift(mu: float = 0.0) -> float:
    """Where FedAvg's rounds end: the fixed point of the average of what each client's steps make of the weights."""
    low, high = -10.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        moved = 0.0
        for a, b in zip(CURVES, MINIMA, strict=True):
            w = middle
            for _ in range(STEPS):
                w -= LR * (a * (w - b) + mu * (w - middle))
            moved += w - middle
        low, high = (middle, high) if moved > 0 else (low, middle)
    return low


@pytest.mark.parametrize("scaffold", [False, True])
def test_one_client_is_plain_descent_and_three_meet_at_the_optimum(scaffold: bool) -> None:
    """Without a network: rounds of local steps, averaged by hand."""
    for clients in (1, 3):
        w, controls = torch.zeros(2), torch.zeros(2)
        models = [torch.nn.Parameter(torch.zeros(2)) for _ in range(clients)]
        opts = [torch.optim.SGD([model], lr=LR) for model in models]
        sides = [Scaffold(opt, {"w": model}) for opt, model in zip(opts, models, strict=True)]
        plain = torch.zeros(2, requires_grad=True)
        for _ in range(60):
            for number, (model, opt, side) in enumerate(zip(models, opts, sides, strict=True)):
                model.data.copy_(w)
                side.server[PREFIX + "w"].copy_(controls)
                side.begin(64.0)
                for _ in range(STEPS):
                    opt.zero_grad()
                    loss(number, model).backward()
                    if scaffold:
                        side.correct()
                    opt.step()
                side.conclude()
                side.ended(True)
            w = torch.stack([model.detach() for model in models]).mean(0)
            controls = torch.stack([side.server[PREFIX + "w"] for side in sides]).mean(0)
            for _ in range(STEPS if clients == 1 else 0):
                (g,) = torch.autograd.grad(loss(0, plain), plain)
                plain.data -= LR * g
        if clients == 1:
            assert torch.allclose(w, plain.detach(), atol=1e-5)
        else:
            assert w.tolist() == pytest.approx([OPTIMUM if scaffold else drift()] * 2, abs=1e-4)
    assert abs(drift() - OPTIMUM) > 0.05


def test_a_round_that_was_not_applied_leaves_the_control() -> None:
    model = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([model], lr=LR)
    side = Scaffold(opt, {"w": model})
    for applied in (False, True):
        side.begin(64.0)
        side.conclude()
        assert not side.server[PREFIX + "w"].any(), "no step, nothing learned"
        loss(0, model).backward()
        side.correct()
        opt.step()
        side.conclude()
        side.ended(applied)
        assert applied == bool(side._own["w"].any())
        side.server[PREFIX + "w"].zero_()


def test_a_control_changes_by_what_was_put_in() -> None:
    """The clip cuts both alike; what had no gradient changes nothing; the sum over groups is by each one's rate."""
    model = torch.nn.Linear(1, 1)
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}]
    side = Scaffold(torch.optim.SGD(groups, lr=1.0), dict(model.named_parameters()))
    side.begin(0.5)
    for gradient in (4.0, 2.0):
        model.weight.grad, model.bias.grad = torch.full((1, 1), gradient), None
        side.correct()
        model.weight.data -= 0.1 * model.weight.grad
    side.conclude()
    side.ended(True)
    assert 0.5 == side.own["weight"].item() == side.server[PREFIX + "weight"].item(), "3.0, clipped"
    assert 0.0 == side.own["bias"].item()
    other = Scaffold(torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters()))
    other.restore(side.own)
    assert side.own == other.own
    with pytest.raises(ConfigError, match="not of this model"):
        other.restore({"weight": torch.zeros(3)})


@pytest.mark.parametrize("opt", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_scaffold_is_for_plain_sgd(opt: Any) -> None:
    model = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="without momentum"):
        Scaffold(opt([model]), {"w": model})


@pytest.mark.parametrize(
    ("settings", "scaffold", "rounds", "end"),
    [
        ({"prox": 5.0}, False, 25, drift(5.0)),
        ({"protection": "clear"}, True, 40, OPTIMUM),
        ({"server_optimizer": "fedavgm:momentum=0.5,lr=0.5"}, False, 25, drift()),
    ],
    ids=["prox", "scaffold", "fedavgm"],
)
def test_with_servers(settings: dict[str, Any], scaffold: bool, rounds: int, end: float) -> None:
    """By settings of the server and a flag of the script's; the ends are those of the formulas."""
    first = torch.nn.Linear(1, 1, bias=False)

    def script(number: int, name: str) -> float:
        model = copy.deepcopy(first)
        with shoal.connect(cluster.join, name=name) as worker:
            opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=LR), model, scaffold=scaffold)
            for round_ in worker.rounds(model):
                for _ in range(STEPS):
                    opt.zero_grad()
                    loss(number, model.weight).backward()
                    opt.step()
                round_.submit()
        return model.weight.item()

    with shoal.LocalCluster(mode="federated", min_workers=3, rounds=rounds, clip=64, **settings) as cluster:
        assert [pytest.approx(end, abs=5e-3)] * 3 == each(3, script)
