"""Held-out evaluation (SPEC §17): who has which part, by the specification's own words, and with real processes."""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cores import CoordinatorBench, only
from hypothesis import given
from hypothesis import strategies as st
from test_cli import run
from test_federated import each

import shoal
from shoal.protocol.errors import ConfigError
from shoal.protocol.evaluating import Apportioned, Assess, Assessed, Cut, Evaluated, Review, Reviewed, Sums
from shoal.protocol.messages import Refused
from shoal.protocol.secure.fixed import METRIC, auxiliary, ratio, totals
from shoal.ps.evaluations import MOST_CUTS, PATIENCE, Evaluations
from shoal.worker.evaluate import installed


class Table(CoordinatorBench):
    """A coordinator with one shard; workers ask for parts of a set of 10 examples, 4 to a part."""

    def __init__(self, *workers: int) -> None:
        super().__init__(lease=1e6)
        self.shard()
        self.requests = 0
        for worker in workers:
            self.join(worker)

    def say(self, kind: Any, worker: int, *fields: Any) -> Any:
        self.requests += 1
        return self.ask(kind, worker, self.requests, *fields)[0]

    def assess(self, worker: int, due: int = 5, after: int = 0) -> Any:
        return self.say(Assess, worker, "test", 10, 4, due, after)

    def cut(self, worker: int, number: int = 1, key: str = "k", why: str = "") -> Any:
        return self.say(Cut, worker, "test", number, "async", 6, key, why)

    def sums(self, worker: int, part: Apportioned, value: float = 1.0, why: str = "") -> Any:
        sums = (("ones", value * (part.stop - part.start)),) if not why else ()
        return self.say(Sums, worker, part.lease, sums, why)

    def results_of(self, worker: int) -> tuple[Evaluated, ...]:
        return only(Reviewed, [self.say(Review, worker, 0)]).results

    @property
    def results(self) -> tuple[Evaluated, ...]:
        return self.results_of(1)


def test_one_makes_the_cut_and_all_measure_parts_of_it() -> None:
    """The first to ask makes it; then parts are given out, none twice; their sums are the result, of that version."""
    table = Table(1, 2)
    assert ["make", "later", "make"] == [table.assess(worker).state for worker in (1, 2, 1)]
    table.cut(1)
    parts = [(worker, table.assess(worker)) for worker in (1, 2, 2)]
    assert [(0, 4), (4, 8), (8, 10)] == [(part.start, part.stop) for _, part in parts]
    assert {(1, 1)} == {(part.maker, part.cut) for _, part in parts}
    assert "later" == table.assess(1).state
    for worker, part in parts:
        table.sums(worker, part)
    assert ["done", "done"] == [table.assess(worker).state for worker in (1, 2)]
    (result,) = table.results
    assert ("test", "async", 6, 10, 2, 0) == (
        result.name,
        result.mode,
        result.clock,
        result.examples,
        result.workers,
        result.lost,
    )
    assert (("ones", 10.0),) == result.sums
    assert "make" == table.assess(2, due=6).state


def test_the_part_of_the_dead_goes_to_another() -> None:
    """It counts once, whole, whatever comes late or twice; a maker that dies is replaced."""
    table = Table(1, 2, 3)
    table.assess(1)
    table.join(11, "name1", attempt=1)
    assert "make" == table.assess(2).state
    table.cut(2)
    lost, mine = table.assess(3), table.assess(2)
    table.join(13, "name3", attempt=1)
    assert ["Evicted"] == [type(table.sums(3, lost)).__name__]
    again = table.assess(2)
    assert (lost.start, lost.stop) == (again.start, again.stop)
    table.sums(13, again, 100.0)
    for _ in range(2):
        table.sums(2, mine)
        table.sums(2, again)
    table.sums(2, table.assess(2))
    (result,) = table.results_of(2)
    assert (10, 1, (("ones", 10.0),)) == (result.examples, result.lost, result.sums)


def test_a_cut_that_cannot_be_read_is_made_again() -> None:
    """Who cannot read it leaves its part to those who can; if there is nobody, nothing counts, and in the end it is given up."""
    table = Table(1, 2)
    table.assess(1)
    table.cut(1)
    part = table.assess(2)
    table.sums(2, part, why="gone")
    assert "later" == table.assess(2).state
    table.sums(1, table.assess(1))
    table.join(21, "name1", attempt=1)
    assert "make" == table.assess(2).state
    for number in range(1, MOST_CUTS):
        table.cut(2, number, why="no luck")
        assert ("done" if number == MOST_CUTS - 1 else "make") == table.assess(2).state
    assert () == table.results_of(2)
    assert 1 == sum("given up" in text for text in table.logged)


def test_nobody_is_waited_for_for_ever() -> None:
    """A part, or a cut, whose holder lives and does nothing goes to whoever asks after a while."""
    table = Table(1, 2)
    table.assess(1)
    table.now += PATIENCE
    assert "make" == table.assess(2).state
    table.cut(2)
    held = [table.assess(1) for _ in range(3)]
    assert "later" == table.assess(2).state
    table.now += PATIENCE
    again = [table.assess(2) for _ in range(3)]
    assert {(part.start, part.stop) for part in held} == {(part.start, part.stop) for part in again}


def test_the_version_of_now() -> None:
    """Whoever wants it takes no evaluation that began before, unless nothing has changed since."""
    table = Table(1, 2)
    first = table.assess(1, 0)
    assert "make" == table.assess(1, 0, first.number + 1).state
    assert table.assess(2, 0).number == first.number
    table.cut(1)
    assert table.assess(2, 0).number == first.number + 1
    for _ in range(3):
        table.sums(2, table.assess(2, 0, first.number + 2))
    assert "make" == table.assess(2, 0, first.number + 2).state
    table.cut(2, 7)
    done = table.assess(2, 0, first.number + 2)
    assert ("done", table.results[0].number) == (done.state, done.number)
    assert 1 == len(table.results)


def test_a_set_has_one_length() -> None:
    """A worker with another one is told so."""
    table = Table(1, 2)
    table.assess(1)
    assert "10 examples" in only(Refused, [table.say(Assess, 2, "test", 11, 4, 5, 0)]).text
    assert isinstance(table.say(Assess, 2, "empty", 0, 4, 5, 0), Refused)


@given(st.integers(0, 2**32))
def test_every_example_counts_once(seed: int) -> None:
    """Whatever order workers ask, measure, repeat, fail and die in, a result is of all examples, each once, of one cut."""
    dice, core, request = random.Random(seed), Evaluations(), iter(range(10**6))
    length, size = dice.randint(1, 40), dice.randint(1, 9)
    held: list[tuple[int, Apportioned]] = []
    live, cut = list(range(1, 5)), 0
    for turn in range(400):
        worker = dice.choice(live)
        answer = core.handle(Assess(worker, next(request), "s", length, size, 1 + turn // 100, 0), float(turn))
        if isinstance(answer, Apportioned):
            held.append((worker, answer))
        elif isinstance(answer, Assessed) and answer.state == "make" and dice.random() < 0.7:
            cut += 1
            why = "x" if dice.random() < 0.1 else ""
            core.handle(Cut(worker, next(request), "s", cut, "sync", cut, str(cut), why), float(turn))
        if held and dice.random() < 0.8:
            who, part = dice.choice(held)
            value = float(part.cut * (part.stop - part.start))
            why = "x" if dice.random() < 0.05 else ""
            core.handle(Sums(who, next(request), part.lease, (("v", value),) if not why else (), why), float(turn))
        if dice.random() < 0.02:
            core.end(worker)
            live[live.index(worker)] = max(live) + 1
    for result in core.results:
        assert (length, float(result.clock * length)) == (result.examples, dict(result.sums)["v"])


def test_sums_of_a_round_are_exact() -> None:
    """Whole numbers under a mask are whole numbers, whatever weights and caps there are; averages stay averages."""
    weights = [ratio(weight, 100.0, 8.0) for weight in (1.0, 333.3, 1e6)]
    values, clients = (123_456_789, 1, 2**37 + 1), 3
    lanes = sum(
        auxiliary(weight, 0, [value, 0.5], clients, [True, False])
        for weight, value in zip(weights, values, strict=True)
    )
    found = totals(np.asarray(lanes), clients, 8.0, 10, [True, False]).metrics
    assert float(sum(values)) == found[0]
    assert pytest.approx(0.5, abs=1 / METRIC) == found[1]


def test_a_model_is_as_it_was() -> None:
    """After it has measured, or failed to: weights, gradients, modes; meanwhile it has the others, and makes no gradients."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5))
    model[0].eval()
    model[0].weight.sum().backward()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    other = {name: torch.full_like(p, 7.0) for name, p in model.named_parameters()}

    def measure() -> None:
        with installed(model, other):
            assert all(bool((p == 7.0).all()) for p in model.parameters())
            assert not any(module.training for module in model.modules())
            assert not model(torch.ones(3, 2)).requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert [True, False, True, True] == [module.training for module in model.modules()]
    for name, p in model.named_parameters():
        assert (p, p.data_ptr()) == before[name][:2]
        assert torch.equal(p, before[name][2])
    assert model[0].weight.grad is not None


# --- real processes

DEADLY = """
    import os, signal
    import numpy as np, shoal
    held = np.arange(403)
    def measure(weights, batch):
        if worker.name == "w1":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"ones": len(batch), "index": int(batch.sum()), "w": float(weights["w"][0]) * len(batch)}
    with shoal.connect() as worker:
        worker.register({"w": np.zeros(5, np.float32)}, optimizer=shoal.Delta())
        worker.evaluation(held, measure, every=10, batch_size=8, name="held")
        for batch in worker.partition(np.zeros(900), batch_size=3, epochs=1):
            worker.push({"w": np.ones(5, np.float32)})
            worker.clock()
            worker.pull()
        last = worker.evaluate(held, measure, batch_size=8, name="held")
        assert last.sums["index"] == held.sum() and last.means["ones"] == 1.0
        assert len(worker.evaluations) > 2
"""


def test_a_worker_dies_while_it_measures(tmp_path: Path) -> None:
    """The others measure its part; every result is of every example once, and of one version, exactly; the run goes on."""
    (tmp_path / "deadly.py").write_text(textwrap.dedent(DEADLY))
    done = run("run", "-n", "3", "--lease", "60s", "--staleness", "2", "--report", "r.json", "deadly.py", cwd=tmp_path)
    assert 0 == done.returncode, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["evaluations"]
    assert len(found) > 2
    for result in found:
        assert (403, 403, sum(range(403))) == (result["examples"], result["sums"]["ones"], result["sums"]["index"])
        assert result["means"]["w"] == int(result["means"]["w"]) >= 2 * result["clock"]
    assert sum(result["parts_lost"] for result in found) >= 1
    assert sorted(result["clock"] for result in found) == [result["clock"] for result in found]
    assert 1 == report["lost_workers"]


def test_owners_measure_their_own_data() -> None:
    """In federated mode, under masks: each round's sums over all owners are exact, and nothing else is told of any of them."""
    sizes = (11, 20, 302)

    def script(number: int, name: str) -> None:
        held = np.arange(sizes[number])
        arrays = {"w": np.zeros(4, np.float32)}

        def measure(weights: Any, batch: Any) -> dict[str, Any]:
            return {"index": batch.sum(), "w": float(weights["w"][0]) * len(batch), "half": np.float32(0.5)}

        with shoal.connect(cluster.join, name=name) as worker:
            worker.evaluation(held, measure, every=1, batch_size=500, name="own")
            for round_ in worker.rounds(arrays, examples=7.3 * (number + 1)):
                arrays["w"] += 1.0
                round_.submit()
            with pytest.raises(ConfigError, match="federated"):
                worker.evaluate(held, measure)

    with shoal.LocalCluster(mode="federated", protection="secagg", rounds=3, min_workers=3) as cluster:
        each(3, script)
        status = cluster.status()
    found = status["evaluations"]
    assert [0, 1, 2] == [result["clock"] for result in found]
    for result in found:
        sums = result["sums"]
        assert (sum(sizes), "federated", "own", 3) == (
            result["examples"],
            result["mode"],
            result["name"],
            result["workers"],
        )
        assert float(sum(size * (size - 1) // 2 for size in sizes)) == sums["index"]
        assert 1.5 == sums["half"]
        assert pytest.approx(result["clock"] * sum(sizes), abs=0.1) == sums["w"]
    assert {} == status["logged"]
