"""Versions that become one: averages of weights, and students of ensembles (rung T0)."""

from __future__ import annotations

import pytest
import torch

from shoal.protocol.errors import ConfigError, ShapeError
from shoal.tasks import distill, fuse


def version(value: float) -> dict[str, torch.Tensor]:
    return {
        "w": torch.full((2, 3), value),
        "h": torch.full((2,), value, dtype=torch.bfloat16),
        "n": torch.tensor([int(value)]),
    }


def test_averages() -> None:
    found = fuse.average([version(1.0), version(4.0)], [1, 2])
    assert torch.equal(torch.full((2, 3), 3.0), found["w"]) and found["h"].dtype is torch.bfloat16
    assert [1] == found["n"].tolist(), "a count is not averaged"
    for wrong in ([], [version(1.0), {"w": torch.zeros(2, 3)}], [version(1.0), {**version(1.0), "w": torch.zeros(6)}]):
        with pytest.raises(ShapeError):
            fuse.average(wrong)
    for shares in ([1.0], [0.0, 0.0], [-1.0, 2.0]):
        with pytest.raises(ShapeError):
            fuse.average([version(1.0), version(2.0)], shares)


def test_greedy_is_never_worse_than_the_best() -> None:
    """What is evaluated is near 2: 1 and 3 together are right, 9 does harm."""
    versions = [version(1.0), version(9.0), version(3.5)]
    soup = fuse.greedy(versions, lambda weights: -abs(float(weights["w"][0, 0]) - 2.0))
    assert (0, 2) == soup.used and 2.25 == float(soup.weights["w"][0, 0]) and soup.quality >= max(soup.alone)
    everything = fuse.uniform(versions, lambda weights: -abs(float(weights["w"][0, 0]) - 2.0))
    assert (0, 1, 2) == everything.used and everything.quality < max(everything.alone)


def test_soft_targets_and_their_loss() -> None:
    teachers = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    assert torch.allclose(torch.tensor([[0.5, 0.5]]), distill.soft_targets(teachers))
    targets = distill.soft_targets(teachers[:1], 2.0)
    right = distill.loss(teachers[0], targets, None, 2.0)
    assert right < distill.loss(teachers[1], targets, None, 2.0)
    # at its least where the student says what its teacher says
    student = teachers[0].clone().requires_grad_()
    distill.loss(student, targets, None, 2.0).backward()
    assert student.grad is not None and torch.allclose(torch.zeros(1, 2), student.grad, atol=1e-6)
    truth = torch.tensor([1])
    mixed = distill.loss(teachers[0], targets, truth, 2.0, share=0.0)
    assert torch.allclose(mixed, torch.nn.functional.cross_entropy(teachers[0], truth))
    for wrong in (lambda: distill.soft_targets([]), lambda: distill.loss(torch.zeros(1, 3), targets)):
        with pytest.raises(ShapeError):
            wrong()
    for mistaken in (
        lambda: distill.soft_targets(teachers, 0.0),
        lambda: distill.loss(teachers[0], targets, truth, share=2.0),
    ):
        with pytest.raises(ConfigError):
            mistaken()
