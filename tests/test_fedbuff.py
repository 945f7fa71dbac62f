"""Buffered asynchronous federation (Nguyen et al. 2022): the rule, staleness as a shard counts it, and real workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_federated import each
from test_skewed import CURVES, MINIMA

import shoal
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.ps.rules import Updater
from shoal.ps.store import Store


def test_a_buffer_is_applied_when_it_is_full() -> None:
    """By the formula, with weights for staleness; nothing moves before, and the next buffer begins empty."""
    weights = torch.ones(6)
    updater = Updater(weights, shoal.FedBuff(buffer=3, lr=0.5))
    draw = np.random.default_rng(0)
    expected = np.ones(6)
    for _ in range(2):
        deltas, taus = draw.normal(size=(3, 6)).astype(np.float32), (0, 3, 8)
        for place, (delta, tau) in enumerate(zip(deltas, taus, strict=True)):
            before = weights.clone()
            assert (place == 2) == updater.apply(torch.from_numpy(delta), None, (), 5, tau)
            assert place == 2 or torch.equal(before, weights)
        expected += 0.5 / 3 * sum(d / np.sqrt(1 + tau) for d, tau in zip(deltas, taus, strict=True))
        assert np.allclose(weights.numpy(), expected, atol=1e-6)


def test_a_part_of_a_block_and_half_precision() -> None:
    weights = torch.zeros(5, dtype=torch.bfloat16)
    updater = Updater(weights, shoal.FedBuff(buffer=2))
    updater.apply(torch.tensor([2.0, 4.0], dtype=torch.bfloat16), [(1, 3)], (), 1)
    updater.apply(torch.full((5,), 2.0, dtype=torch.bfloat16), None, (), 1)
    assert [1.0, 2.0, 3.0, 1.0, 1.0] == weights.tolist()


def test_staleness_is_counted_in_changes() -> None:
    """A push that waits in the buffer changes no version: nobody is sent the block again, and nobody is stale by it."""
    spec = ModelSpec((Tensor("w", "float32", (4,)),), (shoal.FedBuff(buffer=2),))
    store = Store(lay_out(spec, 1, 4096), 0)
    one = torch.ones(4)
    versions = []
    for _ in range(4):
        store.apply(0, one, None, (), 1, store.updates_since(0, 0))
        versions.append(store.version)
    assert [0, 1, 1, 2] == versions and 2 == store.updates_since(0, 0) and 1 == store.updates_since(0, 1)
    assert torch.allclose(store.weights(0), torch.full((4,), 1.0 + 2**-0.5))


@pytest.mark.parametrize("buffer", [0, 2.5, -1])
def test_a_buffer_is_a_number_of_updates(buffer: Any) -> None:
    with pytest.raises(ConfigError, match="buffer"):
        shoal.FedBuff(buffer=buffer)


def test_clients_that_seldom_wait_for_each_other() -> None:
    """Three owners with different data and paces; the server ends near where FedAvg's average of them is.

    Bounded, so that on a busy machine the last of them does not end alone, at its own minimum.
    """

    def script(number: int, name: str) -> float:
        with shoal.connect(cluster.join, name=name) as worker:
            worker.register({"w": np.zeros(1, np.float32)}, optimizer=shoal.FedBuff(buffer=3, lr=0.5))
            for _ in range(60):
                w = given = float(worker.pull()["w"][0])
                for _ in range(5):
                    w -= 0.02 * CURVES[number] * (w - MINIMA[number])
                worker.push({"w": np.array([w - given], np.float32)}).result()
                worker.clock()
            return float(worker.pull()["w"][0])

    with shoal.LocalCluster(staleness=6, min_workers=3) as cluster:
        found = each(3, script)
    assert all(0.0 < w < 0.8 for w in found)
