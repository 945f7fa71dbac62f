"""What goes out of a worker's sockets while it trains in rounds, for real (rung T3): its updates cannot be told from chance.

Frames are taken where they are given to the sockets, over TCP, of workers that train on digits. The control is the same run in the
clear, in which every statistic must notice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_federated import each
from test_round_wire import SIGMAS, autocorrelation, chi_square, monobit, pearson

import shoal
from shoal.worker import wires

Words = np.ndarray[Any, np.dtype[np.uint32]]
BARE = wires.Bare


class Tap:
    """In the place of pyzmq's socket: it sends, and keeps a copy of what is sent."""

    def __init__(self) -> None:
        self.frames: dict[Any, list[bytes]] = {}

    recv = staticmethod(BARE.recv)

    def send(self, socket: Any, frame: Any, flags: int, copy: bool) -> None:
        """As pyzmq's."""
        BARE.send(socket, frame, flags, copy)  # type: ignore[call-overload]
        self.frames.setdefault(socket, []).append(bytes(frame))


def train(protection: str, tap: Tap) -> tuple[list[tuple[dict[int, Words], Words]], list[float]]:
    """Two rounds of four owners. Each one's update as it made it, with all that its sockets took; and accuracies."""
    x, y = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    x, first = x.float() / 16, torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    parts = shoal.split(np.arange(len(y)), 4, seed=3)

    def script(number: int, name: str) -> tuple[list[Words], float]:
        model, made = copy.deepcopy(first), []
        mine = torch.as_tensor(np.asarray(parts[number]))
        with shoal.connect(cluster.join, name=name) as worker:
            opt = torch.optim.SGD(model.parameters(), lr=0.5)
            for round_ in worker.rounds(model, examples=len(mine)):
                before = [p.detach().clone() for p in model.parameters()]
                for _ in range(10):
                    opt.zero_grad()
                    torch.nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
                    opt.step()
                changes = [(p.detach() - old).flatten() for p, old in zip(model.parameters(), before, strict=True)]
                made.append(torch.cat(changes).numpy())
                round_.submit()
        return made, float((model(x).argmax(1) == y).float().mean())

    with shoal.LocalCluster(mode="federated", shards=1, min_workers=4, rounds=2, protection=protection) as cluster:
        found = each(4, script)
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


@pytest.mark.parametrize("protection", ["secagg", "clear"])
def test_a_real_run_looks_like_chance(protection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slice that left a socket: bytes, bits, lags, and against every update that anybody made."""
    tap = Tap()
    monkeypatch.setattr(wires, "Bare", tap)
    monkeypatch.setenv("SHOAL_TRANSPORT", "tcp")
    results: Any = train(protection, tap)
    updates = [update for made, _ in results for update in made]
    assert all(accuracy > 0.6 for _, accuracy in results), "it learns"

    size = 4 * len(updates[0])
    slices = [frame for sent in tap.frames.values() for frame in sent if size <= len(frame) < 2 * size]
    assert 8 == len(slices), "two rounds of four"
    tests: dict[str, Callable[[Words], float]] = {
        "bytes": lambda words: chi_square(words.view(np.uint8)),
        "bits": monobit,
        "lags": autocorrelation,
    }
    for slice_ in slices:
        words = np.frombuffer(slice_, np.uint32, len(updates[0]))
        for name, test in tests.items():
            assert (test(words) < SIGMAS) == (protection == "secagg"), name
        values = words.view(np.int32) if protection == "secagg" else words.view(np.float32)
        likest = max(pearson(values, update) for update in updates)
        assert (likest < SIGMAS) == (protection == "secagg"), "an update can be made out"
    if protection == "secagg":
        for update in updates:
            raw = update.tobytes()[:512]
            assert not any(raw in frame for sent in tap.frames.values() for frame in sent)
