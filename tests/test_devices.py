"""A model on an accelerator: its copies go on beside what it computes, and never change what is learned.

The accelerator is a pretended one, whose copies end as late as they may; a real one is used where there is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from test_views import Pair

import shoal
from shoal.worker import views
from shoal.worker.devices import Cuda, lanes_for


class Late:
    """Lanes whose copies happen when somebody waits for them, or one at a time when it is asked which have ended."""

    def __init__(self) -> None:
        self.out: deque[tuple[str, torch.Tensor, torch.Tensor]] = deque()
        self.read: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.locked: set[int] = set()
        self.copied = 0

    def lock(self, memory: Sequence[Any]) -> None:
        self.locked |= {vector.ctypes.data for vector in memory}

    def take(self, name: str, gradient: torch.Tensor, into: torch.Tensor) -> None:
        into.fill_(float("nan"))  # nobody may look yet
        self.out.append((name, gradient, into))

    def _copy(self) -> str:
        name, gradient, into = self.out.popleft()
        into.copy_(gradient)
        self.copied += 1
        return name

    def taken(self) -> Iterator[str]:
        if len(self.out) > 1:
            yield self._copy()

    def arrive(self) -> None:
        while self.out:
            self._copy()

    def bring(self, values: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(values)
        self._check()
        self.read.append((values, values.clone()))

    def _check(self) -> None:
        for values, then in self.read:
            assert torch.equal(values, then), "weights were written while they were being read"

    def settle(self) -> None:
        self._check()
        self.read.clear()


@pytest.fixture(params=["shm", "tcp"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pair, Late]]:
    lanes = Late()
    monkeypatch.setattr(views, "lanes_for", lambda device: lanes)
    monkeypatch.setenv("SHOAL_TRANSPORT", request.param)
    with shoal.LocalCluster(shards=2, block_bytes=4096) as cluster, shoal.connect(cluster.join) as worker:
        yield Pair(worker), lanes


def test_late_copies_change_nothing(late: tuple[Pair, Late]) -> None:
    """Whatever is done to gradients after backward: another backward, a clip, a new tensor, zeroing either way."""
    pair, lanes = late
    assert not any(pair.viewed()) and lanes.locked
    for number in range(8):
        pair.backward()
        if number % 4 == 1:
            pair.backward()
        if number % 4 == 2:
            for net in (pair.net, pair.plain):
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        if number % 4 == 3:
            for net in (pair.net, pair.plain):
                weight = next(net.parameters())
                assert weight.grad is not None
                weight.grad = weight.grad * 0.5
        pair.step(set_to_none=number % 2 == 0)
        assert pair.same(), number
    assert lanes.copied >= 8 * 4 and not lanes.out


def test_a_parameter_without_a_gradient(late: tuple[Pair, Late]) -> None:
    """It stays as it is; the others are pushed from where they were copied to."""
    pair, _ = late
    for net in (pair.net, pair.plain):
        net[0].bias.requires_grad_(False)
    for _ in range(3):
        pair.backward()
        pair.step()
    assert pair.same()


def test_only_cuda_has_lanes() -> None:
    assert lanes_for(torch.device("cpu")) is None and lanes_for(torch.device("meta")) is None


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


@cuda
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_cuda_model_learns_what_one_on_the_processor_does(
    transport: str, prefetch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 8))
    net = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 8))
    net.load_state_dict(plain.state_dict())
    net.cuda()
    beside = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with shoal.LocalCluster(shards=2) as cluster, shoal.connect(cluster.join) as worker:
        opt = worker.optimizer(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), net, prefetch=prefetch)
        for number in range(10):
            x, y = torch.randn(32, 64), torch.randn(32, 8)
            for model, step, device in ((plain, beside, "cpu"), (net, opt, "cuda")):
                step.zero_grad()
                torch.nn.functional.mse_loss(model(x.to(device)), y.to(device)).backward()
                if number % 3 == 1:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                step.step()
        net(torch.randn(1, 64, device="cuda"))  # what was asked for ahead is in place
        for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine.detach().cpu(), theirs.detach(), atol=1e-4)


@cuda
def test_memory_is_locked_and_unlocked() -> None:
    import numpy as np

    lanes = Cuda(torch.device("cuda"))
    memory = np.zeros(1 << 20, np.float32)
    lanes.lock([memory])
    assert torch.from_numpy(memory).is_pinned()
    address = memory.ctypes.data
    assert address in lanes._locked
    del memory
    assert address not in lanes._locked
