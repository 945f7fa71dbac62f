"""Federated rounds with real processes: what users see of them (SPEC §14.9)."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import until

import shoal

VALUES = {"w": np.linspace(-1, 1, 3000, dtype=np.float32).reshape(30, 100), "b": np.ones(7, np.float64)}


def each(count: int, script: Callable[[int, str], Any]) -> list[Any]:
    """Run a script as several workers, each in a thread; what they return, or raise."""
    found: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            found[number] = script(number, f"w{number}")
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in found:
        if isinstance(result, AssertionError):
            raise result
    assert not any(thread.is_alive() for thread in threads)
    return found


def fresh() -> dict[str, Any]:
    return {name: value.copy() for name, value in VALUES.items()}


@pytest.mark.parametrize(
    ("protection", "bits", "bound"), [("secagg", 32, 2e-5), ("secagg", 16, 2e-3), ("clear", 32, 1e-6)]
)
def test_rounds_are_the_weighted_average(protection: str, bits: int, bound: float) -> None:
    """Weights by examples, over two shards, in float32 and float64; metrics are averages, from the names that all have said."""
    draw = np.random.default_rng(1)
    steps = draw.uniform(-0.1, 0.1, (3, 4, 3000)).astype(np.float32)

    def script(number: int, name: str) -> tuple[list[Any], dict[str, Any]]:
        arrays, outcomes = fresh(), []
        with shoal.connect(cluster.join, name=name) as worker:
            for round_ in worker.rounds(arrays, examples=10 * (number + 1), metrics=["loss"]):
                arrays["w"] += steps[round_.number, number].reshape(30, 100)
                arrays["b"] += 0.01 * number
                outcomes.append(round_.submit(metrics={"loss": float(number)}))
        return outcomes, arrays

    settings = {
        "protection": protection,
        "modulus": bits,
        "rounds": 3,
        "min_workers": 4,
        "block_bytes": 4096,
        "shards": 2,
    }
    with shoal.LocalCluster(mode="federated", **settings) as cluster:
        found = each(4, script)
        status = cluster.status()
    weights = np.array([1.0, 2.0, 3.0, 4.0]) / 10
    expected = VALUES["w"].reshape(-1) + sum(np.tensordot(weights, step, 1) for step in steps)
    for outcomes, arrays in found:
        assert all(outcome.applied and outcome.clients == 4 and not outcome.clipped for outcome in outcomes)
        assert [pytest.approx(2.0, abs=1e-6)] * 3 == [outcome.metrics["loss"] for outcome in outcomes]
        assert np.abs(arrays["w"].reshape(-1) - expected).max() < bound
        assert np.abs(arrays["b"] - (1 + 3 * 0.01 * 2.0)).max() < bound
    assert 3 == status["rounds"]["completed"] and protection == status["rounds"]["protection"]
    assert not any(worker["logged"] or worker["stats"].get("examples") for worker in status["workers"])


def test_a_script_does_not_know_the_mode(caplog: pytest.LogCaptureFixture) -> None:
    """`partition` and `opt.step()`: a local pass a round, over this worker's own data, of which nobody is told."""
    xs = torch.randn(3, 40, 5, generator=torch.Generator().manual_seed(3))
    truth = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0])

    def local(model: torch.nn.Module, x: torch.Tensor, step: Callable[[], Any]) -> None:
        for part in x.split(8):
            model.zero_grad()
            (model(part)[:, 0] - part @ truth).square().mean().backward()
            step()

    first = torch.nn.Linear(5, 1)

    def script(number: int, name: str) -> tuple[torch.Tensor, int, float]:
        model = copy.deepcopy(first)
        with shoal.connect(cluster.join, name=name) as worker:
            opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), model)
            size = 40 - 8 * number
            for (x,) in worker.partition((xs[number, :size],), batch_size=8, epochs=4, shuffle=False):
                opt.zero_grad()
                loss = (model(x)[:, 0] - x @ truth).square().mean()
                loss.backward()
                opt.step()
                worker.log(loss=loss.item())
            assert "federated" == worker.mode
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), worker.stats.steps, loss.item()

    with shoal.LocalCluster(mode="federated", min_workers=3, clip=8) as cluster:
        found = each(3, script)
        status = cluster.status()
    model = copy.deepcopy(first)
    sizes = torch.tensor([40.0, 32.0, 24.0])
    for _ in range(4):
        start, updates = [p.detach().clone() for p in model.parameters()], []
        for number in range(3):
            for p, value in zip(model.parameters(), start, strict=True):
                p.data = value.clone()
            opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
            local(model, xs[number, : int(sizes[number])], opt.step)
            updates.append([p.detach() - value for p, value in zip(model.parameters(), start, strict=True)])
        for p, value, *deltas in zip(model.parameters(), start, *updates, strict=True):
            p.data = value + sum(size / sizes.sum() * delta for size, delta in zip(sizes, deltas, strict=True))
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for weights, steps, _ in found:
        assert (weights - expected).abs().max() < 1e-4 and 4 == steps
    mean = sum(float(size) * loss for size, (_, _, loss) in zip(sizes, found, strict=True)) / float(sizes.sum())
    assert mean == pytest.approx(status["logged"]["loss"], rel=1e-3), "what was logged is the round's average"
    assert [] == status["data"] and not any(worker["logged"] for worker in status["workers"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_that_offers_less_gets_nothing() -> None:
    """A worker that demands secagg, or more survivors than are planned, refuses; the others go on."""

    def script(number: int, name: str) -> Any:
        require = [shoal.Policy(minimum=4), None, None, None][number]
        with shoal.connect(cluster.join, name=name, require=require) as worker:
            for round_ in worker.rounds(fresh()):
                round_.submit()
                return worker.stats.bytes_pushed

    with shoal.LocalCluster(mode="federated", min_workers=4, rounds=1) as cluster:
        found = each(4, script)
    assert isinstance(found[0], shoal.ProtectionError) and "at least 4" in str(found[0])
    assert all(pushed > 12_000 for pushed in found[1:])


def test_clear_is_for_those_who_were_told() -> None:
    """The join string says so; who has another one refuses."""

    def script(number: int, name: str) -> Any:
        join = cluster.join.removesuffix(":clear") if number == 0 else cluster.join
        with shoal.connect(join, name=name) as worker:
            for round_ in worker.rounds(fresh()):
                return round_.submit().applied

    with shoal.LocalCluster(mode="federated", min_workers=2, rounds=1, protection="clear") as cluster:
        assert cluster.join.endswith(":clear")
        found = each(2, script)
    assert isinstance(found[0], shoal.ProtectionError) and "protection is secagg" in str(found[0])
    assert found[1] is True


def test_what_is_late_or_comes_twice_is_refused() -> None:
    """`RoundClosed`, and the next round takes it again; who was in time hears that the others gave up, or of the sum."""
    trained = threading.Barrier(4, timeout=30)

    def script(number: int, name: str) -> Any:
        said: list[str] = []
        with shoal.connect(cluster.join, name=name) as worker:
            for round_ in worker.rounds(fresh()):
                late = number == 0 and round_.number == 0
                if round_.number == 0 and not said:
                    trained.wait()
                until(lambda round_=round_, late=late: round_.over or not late)  # type: ignore[misc]
                try:
                    said.append(f"{round_.submit().applied}")
                    round_.submit()
                except shoal.RoundClosed as closed:
                    said.append("late" if "late" in str(closed) else "twice")
        return said

    with shoal.LocalCluster(mode="federated", min_workers=4, rounds=2, round_timeout=1.0) as cluster:
        found = each(4, script)
    assert [["late", "True", "twice"], *[["True", "twice"] * 2] * 3] == found


def test_the_mode_changes_there_and_back() -> None:
    """Async on shared data, rounds, async again: the same script, with the weights of the phase before."""
    first = torch.nn.Linear(4, 1)
    begun = threading.Event()

    def script(number: int, name: str) -> list[str]:
        model = copy.deepcopy(first)
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(number))
        seen: list[str] = []
        with shoal.connect(cluster.join, name=name) as worker:
            opt = worker.optimizer(torch.optim.Adam(model.parameters(), lr=0.01), model)
            for (part,) in worker.partition((x,), batch_size=8, epochs=100_000):
                opt.zero_grad()
                model(part).square().mean().backward()
                if seen[-1:] != [worker.mode]:
                    seen.append(worker.mode)
                opt.step()
                begun.set()
                if "federated" in seen and seen[-1] == "async":
                    return seen
        raise AssertionError("data for a hundred thousand epochs")

    with shoal.LocalCluster(min_workers=3, staleness=2) as cluster:

        def operate() -> None:
            assert begun.wait(30)
            asked.append(cluster.switch("federated"))
            until(lambda: cluster.status()["rounds"]["completed"] >= 2)
            asked.append(cluster.switch("async"))

        asked: list[dict[str, Any]] = []
        operator = threading.Thread(target=operate)
        operator.start()
        found = each(3, script)
        operator.join()
    assert all(seen[-2:] == ["federated", "async"] for seen in found) and ["async", "federated", "async"] in found
    there, back = asked
    assert ("federated", "async", 2) == (there["mode"], back["mode"], back["staleness"]) and back["clock"] > there[
        "clock"
    ]


def test_a_worker_that_dies_in_a_round_is_done_without() -> None:
    """It goes without a word; the rest make the round."""

    def script(number: int, name: str) -> Any:
        worker = shoal.connect(cluster.join, name=name)
        outcomes = []
        try:
            for round_ in worker.rounds(fresh()):
                if number == 0:
                    worker._loop.close()  # as a process that is killed
                    worker._exchange.close()
                    return None
                outcomes.append(round_.submit())
        finally:
            worker.close()
        return [(outcome.applied, outcome.clients) for outcome in outcomes if outcome.applied]

    with shoal.LocalCluster(mode="federated", min_workers=5, rounds=2, lease=1.5) as cluster:
        found = each(5, script)
    assert [None, *[[(True, 4), (True, 4)]] * 4] == found


@pytest.fixture
def alone() -> Iterator[shoal.LocalCluster]:
    with shoal.LocalCluster(mode="federated") as cluster:
        yield cluster


def test_what_does_not_belong_in_federated_mode_is_said(alone: shoal.LocalCluster) -> None:
    """A push, a step outside of a round, a partition without a model; a wait says for whom."""
    with shoal.connect(alone.join) as worker:
        with pytest.raises(shoal.ConfigError, match=r"worker\.optimizer"):
            list(worker.partition(np.zeros(4), batch_size=2))
        model = torch.nn.Linear(2, 1)
        opt = worker.optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(shoal.ConfigError, match="belongs to a round"):
            opt.step()
        with pytest.raises(shoal.ConfigError, match="federated rounds"):
            worker.clock()
        with pytest.raises(shoal.ConfigError, match="nothing is pushed"):  # one row would be exposed in a sum
            worker.push({"bias": np.ones(1, np.float32)})
        with pytest.raises(shoal.ConfigError, match="'weight'"):
            worker.rounds({"bias": np.zeros(1, np.float32)})
        with pytest.raises(shoal.ConfigError, match="require"):
            worker.rounds(model, require="everything")
        with pytest.raises(shoal.WaitTimeout, match="1 of 3"):
            next(worker.rounds(model, timeout=0.5))
