"""Training over codecs: the digits are learnt as well as without, and one worker's loss falls as far (rung T3, SPEC §12)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shoal

EPOCHS, BATCH, TEST = 8, 64, 360
MARGIN = 0.02
"""Of test accuracy that a codec may cost; 7 of 360 images."""
PARAMETERS = 64 * 64 + 64 + 64 * 10 + 10


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]


def train(push: str, pull: str) -> tuple[float, float, float, Any]:
    """Test accuracy, loss on the training images, bytes pushed in a step over those of raw, and the worker's counters."""
    images, labels = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join, push_codec=push, pull_codec=pull) as worker:
        opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.5), model)
        for x, y in worker.partition((images[TEST:], labels[TEST:]), BATCH, EPOCHS):
            opt.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            opt.step()
        stats = worker.stats
    with torch.no_grad():
        accuracy = (model(images[:TEST]).argmax(1) == labels[:TEST]).float().mean().item()
        loss = functional.cross_entropy(model(images[TEST:]), labels[TEST:]).item()
    return accuracy, loss, stats.bytes_pushed / stats.steps / (4 * PARAMETERS), stats


@pytest.fixture(scope="module")
def without() -> tuple[float, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_TRANSPORT", "tcp")
        accuracy, loss, rate, _ = train("raw", "raw")
    assert rate == 1.0
    assert accuracy > 0.92
    return accuracy, loss


@pytest.mark.parametrize(
    ("push", "pull", "rate"),
    [("bf16", "bf16", 0.5), ("fp16", "fp16", 0.5), ("int8", "int8", 0.254), ("topk:0.05", "raw", 0.1)],
)
def test_the_digits_are_learnt_as_well(
    without: tuple[float, float], monkeypatch: pytest.MonkeyPatch, push: str, pull: str, rate: float
) -> None:
    """Within a margin of raw, with as many bytes as the codec says: topk sends a tenth of them, and needs what it keeps for it."""
    monkeypatch.setenv("SHOAL_TRANSPORT", "tcp")
    accuracy, loss, found, stats = train(push, pull)

    assert rate == pytest.approx(found, rel=0.01)
    assert accuracy >= without[0] - MARGIN
    assert loss <= 1.1 * without[1]
    assert (0, 0, EPOCHS) == (stats.lost, stats.skipped, round(stats.examples / (1797 - TEST)))
