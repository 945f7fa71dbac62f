"""`shoal.improve` around a client: with one that lives in a list, and on a real cluster (rungs T0 and T3)."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import until

import shoal
from shoal.launch.improve import Improving, improve, measured
from shoal.protocol.errors import ConfigError, ServerLost, WaitTimeout
from shoal.tasks.card import Card
from shoal.tasks.improve import (
    FAILED,
    NOT_BETTER,
    OVERTAKEN,
    PROMOTED,
    RESTING,
    TRAINING,
    WATCHING,
    Overtaken,
    Promote,
    Rule,
    is_held_out,
)
from shoal.worker.taskclient import FedBack

SOON = Rule(drift=None, every=40, examples=40, rest=0.05, margin=0.05)


class ListedClient:
    """What `improve` asks of a client. A model is one number; an example's truth is what the number should be."""

    def __init__(self) -> None:
        self.cards: list[Card] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.rows: list[FedBack] = []
        self.promoted = 0
        self.away = False
        self.asked = 0
        self.whys: list[str] = []
        self.publish("m", {"w": torch.tensor([0.0])}, {"m": {"quality": 0.5}}, data=("site:a",))
        self.promoted = 1

    def model(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        self.asked += 1
        if self.away:
            raise ServerLost("the dispatcher is away")
        if name != "m":
            raise ConfigError(f"there is no model {name!r}")
        cards = [{"identity": c.identity, "version": c.version, "packed": c.packed.decode()} for c in self.cards]
        return {"promoted": self.promoted or None, "versions": cards}

    def fed_back(self, kind: str, after: int = 0, *, data: bool = True, timeout: Any = None) -> Iterator[FedBack]:
        return iter([row for row in list(self.rows) if row.place > after and (row.kept or not data)])

    def load(self, name: str, version: int) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.weights[version - 1].items()}

    def publish(self, name: str, tensors: Any, metrics: Any, *, data: Any = (), lineage: Any = None) -> Card:
        about = {} if lineage is None else {"lineage": lineage}
        self.cards.append(Card(name, len(self.cards) + 1, "0" * 64, 4, metrics, data=tuple(data), **about))
        self.weights.append(dict(tensors))
        return self.cards[-1]

    def promote(self, name: str, version: int, why: str) -> None:
        self.promoted = version
        self.whys.append(why)

    def feed(self, count: int, reward: float = 1.0, kept: bool = True, truth: float = 1.0) -> None:
        identity = self.cards[self.promoted - 1].identity
        for _ in range(count):
            place = len(self.rows) + 1
            self.rows.append(FedBack(place, f"t{place}", identity, reward, kept, place, truth))


def train(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
    weights["w"] += 100.0  # what is done to the parent's is not seen by the evaluation
    return {"w": torch.tensor([sum(each.truth for each in examples) / len(examples)])}


def evaluate(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, float]:
    error = sum(abs(each.truth - float(weights["w"])) for each in examples) / len(examples)
    return {"closeness": 1.0 - error, "examples": len(examples)}


def start(client: ListedClient, rule: Rule = SOON, **options: Any) -> Improving:
    given = {"train": train, "evaluate": evaluate, "poll": 0.01} | options
    return improve(cast("shoal.Client", client), "m", rule=rule, **given)


def test_a_better_version_is_made_and_promoted() -> None:
    """From what was not held out, compared on what was; the card says what of, and sees what its parent saw."""
    client = ListedClient()
    given: list[list[FedBack]] = []

    def watched(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
        given.append(examples)
        return train(weights, examples)

    with start(client, train=watched) as improving:
        client.feed(40)
        (outcome,) = improving.wait(timeout=20)
    assert (PROMOTED, 2, 0.0, 1.0) == (outcome.end, outcome.version, outcome.before, outcome.after)
    assert 2 == client.promoted and "1.0000 against 0.0000" in client.whys[0] and "40 new examples" in client.whys[0]
    parent, card = client.cards
    assert parent.identity == card.lineage.parent and ("site:a",) == card.data and "feedback" == card.lineage.mode
    places = [each.place for each in given[0]]
    assert (f"feedback {places[0]} to {places[-1]}: {len(places)} tasks of m",) == card.lineage.data
    assert not any(is_held_out(place, 0.25) for place in places)
    assert {"closeness": 1.0, "examples": 40 - len(places)} == dict(card.quality["m"])


def test_what_is_not_better_stays_unpromoted() -> None:
    client = ListedClient()
    with start(client, evaluate=lambda weights, examples: 0.5) as improving:
        client.feed(40)
        (outcome,) = improving.wait(timeout=20)
        assert (NOT_BETTER, 1, 2) == (outcome.end, client.promoted, len(client.cards))
        until(lambda: improving.state == WATCHING)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": lambda weights, examples: 1 / 0}, "training: ZeroDivisionError"),
        ({"train": lambda weights, examples: {"w": "no"}}, "training: 'w' is a str"),
        ({"evaluate": lambda weights, examples: {}}, "evaluating: ValueError"),
        ({"evaluate": lambda weights, examples: "good"}, "evaluating: ValueError"),
    ],
)
def test_a_function_that_fails_ends_the_attempt_alone(options: Any, words: str) -> None:
    """It is said which, and how; the next attempt comes."""
    client = ListedClient()
    with start(client, **options) as improving:
        client.feed(40)
        (outcome,) = improving.wait(timeout=20)
        assert FAILED == outcome.end and words in outcome.text
        until(lambda: improving.state == WATCHING)
        client.feed(40)
        assert 2 == len(improving.wait(2, timeout=20))
    assert 1 == client.promoted


def test_somebody_else_promotes_while_it_trains() -> None:
    """That version stays."""
    client = ListedClient()
    client.publish("m", {"w": torch.tensor([0.9])}, {"m": {"quality": 0.9}})
    go, begun = threading.Event(), threading.Event()

    def slow(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
        begun.set()
        go.wait(20)
        return train(weights, examples)

    with start(client, train=slow) as improving:
        client.feed(40)
        begun.wait(20)
        assert TRAINING == improving.state
        client.promoted = 2
        go.set()
        (outcome,) = improving.wait(timeout=20)
        assert (OVERTAKEN, 2) == (outcome.end, client.promoted)
        late = Promote(1, client.cards[0].identity, 3, "it was the better one, then")
        assert Overtaken(1) == improving._promote(late), "looked at again, just before"
    assert 2 == client.promoted


def test_a_dispatcher_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once; what came meanwhile counts."""
    client = ListedClient()
    with start(client) as improving:
        client.away = True
        until(lambda: "cannot be read for now" in caplog.text)
        client.feed(40)
        with pytest.raises(WaitTimeout, match="0 of 1 attempts are over; it is watching"):
            improving.wait(timeout=0.2)
        client.away = False
        assert PROMOTED == improving.wait(timeout=20)[0].end
    assert 1 == caplog.text.count("cannot be read for now")


def test_training_that_ends_while_the_dispatcher_is_away() -> None:
    """Counts when it is back; meanwhile it is asked for as often as was said, and not in circles."""
    client = ListedClient()
    go = threading.Event()

    def slow(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
        go.wait(20)
        return train(weights, examples)

    with start(client, train=slow, poll=0.1) as improving:
        client.feed(40)
        until(lambda: improving.state == TRAINING)
        client.away = True
        go.set()
        until(lambda: improving._done)
        asked = client.asked
        threading.Event().wait(0.3)
        assert client.asked - asked < 10
        client.away = False
        assert PROMOTED == improving.wait(timeout=20)[0].end


def test_what_is_said_again_of_a_task_is_heard_once() -> None:
    client = ListedClient()
    with start(client, Rule(drift=None, below=0.5, window=30, least=30, examples=30, rest=0.05)) as improving:
        client.feed(20, 1.0)
        until(lambda: improving._after == 20)
        again = [FedBack(100 + row.place, row.task, row.identity, 0.0, True, 0, 1.0) for row in client.rows]
        client.rows += again
        until(lambda: improving._after == 120)
        assert improving.quality is None and 20 == len(improving._core._rewards)


def test_what_is_wrong_is_said_to_the_caller() -> None:
    with pytest.raises(ConfigError, match="no model 'other'"):
        start(ListedClient(), model="other")
    with pytest.raises(ConfigError, match="nothing ever begins"):
        Rule(drift=None)
    assert {"quality": 0.5} == measured(0.5)


def test_private_feedback_is_not_asked_for() -> None:
    """Rewards of tasks whose inputs are not kept count; the functions are given nothing, and go to the data."""
    client = ListedClient()
    qualities = iter((0.2, 0.8))
    with start(client) as open_one:
        client.feed(60, kept=False)
        client.feed(5)
        until(lambda: open_one._after == 65)
        with start(
            client,
            private=True,
            train=lambda weights, examples: {"w": weights["w"] + 1 + len(examples)},
            evaluate=lambda weights, examples: next(qualities) + len(examples),
        ) as improving:
            (outcome,) = improving.wait(timeout=20)
        assert (PROMOTED, 0.2, 0.8) == (outcome.end, outcome.before, outcome.after)
        assert 1.0 == float(client.weights[1]["w"])
        assert ("feedback that stayed with its owners of m",) == client.cards[1].lineage.data
        assert WATCHING == open_one.state and not open_one.outcomes


# --- on a real cluster


def points(draw: np.random.Generator, count: int, turned: bool) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Two classes in the plane; turned, they have changed places."""
    truth = draw.integers(0, 2, count)
    x = draw.normal(size=(count, 2)) + np.where((truth == 1) != turned, 2.0, -2.0)[:, None]
    return torch.tensor(x, dtype=torch.float32), truth


def fit(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
    """The difference of the classes' means, as scores."""
    x = torch.cat([each.inputs for each in examples])
    y = torch.tensor(np.concatenate([each.truth for each in examples]))
    direction = x[y == 1].mean(0) - x[y == 0].mean(0)
    return {"w": torch.stack([-direction, direction], 1)}


def accuracy(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> float:
    return float(np.mean([((each.inputs @ weights["w"]).argmax(1).numpy() == each.truth).mean() for each in examples]))


def test_a_cluster_mends_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks, truths, a world that turns round: noticed, trained, promoted and right again; what has a label is not learned from."""
    draw = np.random.default_rng(1)
    rule = Rule(examples=60, rest=0.2, margin=0.1)
    with shoal.LocalCluster(state_dir=str(tmp_path)) as cluster, shoal.connect(cluster.join, role="client") as client:
        w = {"w": torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])}
        client.publish("side", w, {"accuracy": 0.99}, data={"site:a"}, promote=True)
        with shoal.connect(cluster.join) as worker, worker.serve({"side": lambda held, x: x @ held["w"]}):
            secret = torch.full((1, 2), 1234.5678)
            answer = client.submit("side", secret, shoal.Needs(privacy="site:a")).result(20)
            sent, ask = [], client._ask
            with monkeypatch.context() as patch:
                patch.setattr(client, "_ask", lambda make, timeout: sent.append(make(0, 0)) or ask(make, timeout))
                client.feedback(answer, truth=np.array([1]))
            assert "site:a" == answer.privacy and (b"",) == sent[0].buffers, "the truth leaves this process"

            def tasks(turned: bool) -> float:
                sent = [points(draw, 4, turned) for _ in range(20)]
                answers = [each.result(20) for each in [client.submit("side", x) for x, _ in sent]]
                client.feedback(answers, truth=[truth for _, truth in sent])
                found = [np.asarray(a).argmax(1) == truth for a, (_, truth) in zip(answers, sent, strict=True)]
                return float(np.mean(found))

            with shoal.improve(client, "side", train=fit, evaluate=accuracy, rule=rule, poll=0.05) as improving:
                assert min(tasks(False) for _ in range(8)) > 0.9
                assert not improving.outcomes
                before = tasks(True)
                for _ in range(60):
                    if improving.outcomes:
                        break
                    tasks(True)
                (outcome,) = improving.wait(timeout=20)
                until(lambda: client.submit("side", torch.zeros(1, 2)).result(20).version == 2)
                after = tasks(True)
        assert before < 0.1 and after > 0.9
        assert PROMOTED == outcome.end and outcome.after is not None and outcome.after > 0.9
        assert "rewards fell" in outcome.reason and improving.state in (WATCHING, RESTING)
        first, second = client.model("side")["versions"]
        assert first["identity"] == second["lineage"]["parent"] and "tasks of side" in second["lineage"]["data"][0]
        assert ["site:a"] == second["data"]
    with sqlite3.connect(tmp_path / "tasks.sqlite") as file:
        kept = file.execute("SELECT count(*) FROM tasks WHERE privacy != '' AND input IS NOT NULL").fetchone()[0]
        truths = file.execute(
            "SELECT count(*) FROM feedback f JOIN tasks t USING (owner, number) WHERE privacy != '' AND truth IS NOT NULL"
        ).fetchone()[0]
    file.close()
    assert (0, 0) == (kept, truths)


def test_private_feedback_stays_in_its_vault(tmp_path: Path) -> None:
    """Three owners keep what was right under their keys, and learn from it in rounds whose updates are masked."""
    rows = random.Random(2)
    owners = [shoal.Vault(tmp_path / name, tmp_path / f"{name}.key") for name in "abc"]
    for owner, shift in zip(owners, (1.0, 2.0, 3.0), strict=True):
        with owner.open("feedback") as kept:
            kept.extend([[np.full(1, shift + rows.gauss(0, 0.01), np.float32), 1.0] for _ in range(20)])

    def part(vault: shoal.Vault, join: str, found: dict[str, torch.Tensor]) -> None:
        with vault.open("feedback") as kept, shoal.connect(join, name=vault.folder.name) as worker:
            mean = np.mean([inputs for inputs, _ in kept], axis=0)
            model = torch.nn.Linear(1, 1, bias=False)
            for each in worker.rounds(model, examples=len(kept), require="secagg"):
                with torch.no_grad():
                    model.weight.copy_(torch.from_numpy(mean)[None])
                each.submit()
            found[vault.folder.name] = model.weight.detach().clone()

    def federate(weights: dict[str, torch.Tensor], examples: list[FedBack]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        options: dict[str, Any] = {"mode": "federated", "rounds": 8, "min_workers": 3}
        with shoal.LocalCluster(**options) as rounds:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda vault: part(vault, rounds.join, found), owners))
        return {"w": found["a"]}

    client = ListedClient()
    client.feed(60, kept=False)
    options: dict[str, Any] = {
        "private": True, "train": federate, "evaluate": lambda weights, _: -abs(float(weights["w"]) - 2),
    }  # fmt: skip
    with start(client, **options) as improving:
        (outcome,) = improving.wait(timeout=90)
    assert PROMOTED == outcome.end, outcome
    assert 2.0 == pytest.approx(float(client.weights[1]["w"]), abs=0.05), (
        "the mean over all, of equal weight; a round moves it by 1 at most"
    )
