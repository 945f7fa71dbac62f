"""A model on shoal's own memory stays the user's model (rung T3): what torch lets one do to it has the effect it had."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import shoal


class Pair:
    """The same net twice: wrapped, and beside it one that plain torch trains."""

    def __init__(self, worker: shoal.Worker) -> None:
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.plain = copy.deepcopy(self.net)
        self.worker = worker
        self.opt = worker.optimizer(torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9), self.net)
        self.beside = torch.optim.SGD(self.plain.parameters(), lr=0.1, momentum=0.9)
        self.batches = 0

    def backward(self) -> None:
        self.batches += 1
        torch.manual_seed(self.batches)
        x, y = torch.randn(6, 5), torch.randn(6, 2)
        for net in (self.net, self.plain):
            torch.nn.functional.mse_loss(net(x), y).backward()

    def step(self, set_to_none: bool = True) -> None:
        for opt in (self.opt, self.beside):
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)

    def same(self) -> bool:
        pairs = zip(self.net.parameters(), self.plain.parameters(), strict=True)
        return all(torch.allclose(a.detach().cpu(), b.detach(), atol=1e-6) for a, b in pairs)

    def viewed(self) -> list[bool]:
        weights = self.worker.buffers.weights
        return [p.data_ptr() == weights[name].data_ptr() for name, p in self.net.named_parameters()]


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setenv("SHOAL_TRANSPORT", request.param)
    with shoal.LocalCluster(shards=2) as cluster, shoal.connect(cluster.join) as worker:
        yield Pair(worker)


def test_nothing_is_copied_and_nothing_is_different(pair: Pair) -> None:
    """Parameters are where pulls arrive, gradients where pushes leave; however gradients are zeroed, clipped or added up."""
    assert all(pair.viewed())
    for number in range(6):
        pair.backward()
        if number % 2:
            pair.backward()  # two batches, one step
        gradients = pair.worker.buffers.gradients
        assert all(p.grad is gradients[name] for name, p in pair.net.named_parameters())
        for net in (pair.net, pair.plain):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        pair.step(set_to_none=number < 3)

        assert pair.same()
    assert all(pair.viewed())


def test_gradients_that_are_the_users_own(pair: Pair) -> None:
    """Some replaced, some missing: what the user has put there is pushed, and no more."""
    pair.backward()
    for net in (pair.net, pair.plain):
        first, second, *_ = net.parameters()
        first.grad = torch.full_like(first, 0.25)
        second.grad = None
    pair.step()

    assert pair.same()


def test_weights_that_somebody_changes_here(pair: Pair) -> None:
    """In place: the servers' weights replace them with the next pull, though nothing has changed there."""
    with torch.no_grad():
        pair.net[0].weight.zero_()
    pair.net.load_state_dict({name: value * 0 for name, value in pair.net.state_dict().items()})
    pair.worker.clock()
    pair.opt._refresh()

    assert pair.same()
    assert all(pair.viewed())


def test_weights_that_somebody_moves(pair: Pair) -> None:
    """Replaced data stay where the user has put them, and the servers' weights are copied there."""
    mine = torch.zeros(8, 5)
    pair.net[0].weight.data = mine
    pair.backward()
    pair.plain.zero_grad()
    pair.opt.zero_grad()
    pair.opt._refresh()
    pair.backward()
    pair.step()

    assert pair.same()
    assert mine.data_ptr() == pair.net[0].weight.data_ptr()
    assert [False, True, True, True] == pair.viewed()


def test_a_copy_is_a_copy(pair: Pair) -> None:
    """A deep copy, and the state that was saved, do not change with the model."""
    kept, saved = copy.deepcopy(pair.net), {name: value.clone() for name, value in pair.net.state_dict().items()}
    pair.backward()
    pair.step()

    assert not torch.equal(kept[0].weight, pair.net[0].weight)
    assert torch.equal(kept[0].weight, saved["0.weight"])


def test_after_the_end_the_model_is_the_users(pair: Pair) -> None:
    """Closed: the weights stay, on memory of their own, and can be trained on without shoal."""
    pair.backward()
    pair.step()
    before = [p.data_ptr() for p in pair.net.parameters()]
    pair.worker.close()

    assert pair.same()
    assert not set(before) & {p.data_ptr() for p in pair.net.parameters()}
    torch.optim.SGD(pair.net.parameters(), lr=0.1).step()
    pair.backward()
