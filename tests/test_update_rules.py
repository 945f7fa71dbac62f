"""Update rules on a block, against torch's own optimizers, element by element (rung T0, SPEC §8)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.rules import RULES, SGD, Adagrad, Adam, AdamW, RMSprop, Rule
from shoal.ps.rules import Updater

SIZE = 12
CASES = {
    "sgd": SGD(lr=0.1),
    "sgd momentum": SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    "sgd nesterov": SGD(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adagrad": Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.3),
    "adagrad maximize": Adagrad(lr=0.1, eps=1e-3, maximize=True),
    "rmsprop": RMSprop(lr=0.05, alpha=0.9, weight_decay=0.1),
    "rmsprop centered": RMSprop(lr=0.05, momentum=0.9, centered=True, maximize=True),
    "adam": Adam(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1),
    "adam amsgrad": Adam(lr=0.05, amsgrad=True, maximize=True),
    "adam decoupled": Adam(lr=0.05, weight_decay=0.2, decoupled_weight_decay=True),
    "adamw": AdamW(lr=0.05, weight_decay=0.2),
    "adamw amsgrad": AdamW(lr=0.05, eps=1e-6, amsgrad=True, maximize=True),
}
CHANGING = {"sgd": ("lr", "momentum", "weight_decay"), "rmsprop": ("lr", "weight_decay")}
TORCH = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}
FLAGS = ("nesterov", "maximize", "centered", "amsgrad", "decoupled_weight_decay")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}

cuts = st.lists(st.integers(0, SIZE), min_size=2, max_size=6, unique=True).map(sorted)
parts = st.none() | cuts.map(lambda at: list(zip(at[::2], at[1::2], strict=False)))
steps = st.lists(st.tuples(parts, st.sampled_from((None, 0.0, 0.5, 1.1))), min_size=1, max_size=8)


def random(count: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Reference:
    """Each element is a parameter of its own in a plain torch optimizer; what is not pushed has a `grad` of None."""

    def __init__(self, weights: torch.Tensor, rule: Rule) -> None:
        self.elements = [weights[i : i + 1].clone() for i in range(len(weights))]
        make = getattr(torch.optim, TORCH[rule.name])
        self.optimizer = make(self.elements, foreach=False, **self.settings(rule.name, rule.numbers))

    @staticmethod
    def settings(name: str, numbers: tuple[float, ...]) -> dict[str, Any]:
        found: dict[str, Any] = dict(zip(RULES[name], numbers, strict=True))
        found |= {flag: bool(found[flag]) for flag in FLAGS if flag in found}
        if "beta1" in found:
            found["betas"] = (found.pop("beta1"), found.pop("beta2"))
        return found

    def step(self, gradient: torch.Tensor, part: list[tuple[int, int]] | None, settings_: dict[str, Any]) -> None:
        given = iter(gradient)
        for start, stop in part or [(0, SIZE)]:
            for element in self.elements[start:stop]:
                element.grad = next(given).reshape(1).clone()
        self.optimizer.param_groups[0].update(settings_)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_block_is_updated_as_torch_does_it(case: str, dtype: torch.dtype) -> None:
    """Whole and partial pushes in any order, with and without hyperparameters of their own: each element is as torch has it."""
    rule, tolerance = CASES[case], TOLERANCE[dtype]
    names = CHANGING.get(rule.name, ("lr", "eps", "weight_decay"))

    @settings(deadline=None, max_examples=20)
    @given(steps)
    def check(pushes: list[tuple[list[tuple[int, int]] | None, float | None]]) -> None:
        weights = random(SIZE, 0, dtype)
        reference, updater = Reference(weights, rule), Updater(weights, rule)
        for number, (part, scale) in enumerate(pushes):
            numbers: tuple[float, ...] = ()
            if scale is not None:  # other numbers than at registration
                changed = rule.named() | {name: scale * rule.named()[name] for name in names}
                numbers = tuple(changed.values())
            length = SIZE if part is None else sum(stop - start for start, stop in part)
            gradient = random(length, number + 1, dtype)
            before = gradient.clone()
            updater.apply(gradient, part, numbers, 1)
            reference.step(before, part, reference.settings(rule.name, numbers or rule.numbers))
        torch.testing.assert_close(weights, torch.cat(reference.elements), rtol=tolerance, atol=tolerance)

    check()


@pytest.mark.parametrize(
    ("rule", "workers", "to"), [("delta", 3, 9.0), ("mean", 0, 8.0), ("mean", 1, 8.0), ("mean", 4, 2.75)]
)
def test_what_torch_has_not(rule: str, workers: int, to: float) -> None:
    """`delta` adds what is pushed; `mean` goes its share of the way to it, all of it with one worker or none counted in."""
    weights = torch.ones(6)
    updater = Updater(weights, Rule(rule))
    updater.apply(torch.full((3,), 8.0), [(0, 1), (4, 6)], (), workers)
    assert [to, 1.0, 1.0, 1.0, to, to] == weights.tolist()
    updater.apply(torch.full((6,), to), None, (), 1)

    assert ([to] * 6 if rule == "mean" else [to + to, *[1 + to] * 3, to + to, to + to]) == weights.tolist()


def test_a_momentum_may_come_later() -> None:
    """In a push any finite number will do (SPEC §8): a momentum over none at registration begins at zero, as SGD's does."""
    weights = torch.zeros(2)
    updater, plain = Updater(weights, RMSprop(lr=1.0, alpha=0.0)), RMSprop(lr=1.0, alpha=0.0, momentum=0.5)
    updater.apply(torch.ones(2), None, (), 1)
    updater.apply(torch.ones(2), None, plain.numbers, 1)
    updater.apply(torch.ones(2), None, plain.numbers, 1)

    assert [-3.5, -3.5] == pytest.approx(weights.tolist())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_long_block_is_updated_to_its_end(case: str, dtype: torch.dtype) -> None:
    """Kernels take long vectors another way than short ones, and one of torch's left them as they were (pytorch/pytorch#191763)."""
    rule, size = CASES[case], 1000
    start, gradients = random(size, 0, dtype), [random(size, seed, dtype) for seed in (1, 2, 3)]
    whole = start.clone()
    updater = Updater(whole, rule)
    for gradient in gradients:
        updater.apply(gradient, None, (), 1)
    for at in (0, 500, size - 3):
        few = start[at : at + 3].clone()
        updater = Updater(few, rule)
        for gradient in gradients:
            updater.apply(gradient[at : at + 3].clone(), None, (), 1)
        torch.testing.assert_close(whole[at : at + 3], few, rtol=0.05, atol=TOLERANCE[dtype])
    assert (whole == start).float().mean() < 0.1
