"""Tasks on a real cluster: publish, serve, submit, feed back; and what dies meanwhile (rung T3)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import until
from safetensors.torch import load_file

import shoal
from shoal import cli

EXECUTOR = """
import sys, time, shoal, torch
torch.set_num_threads(1)
def predict(weights, x):
    if float(sys.argv[2]):
        time.sleep(float(sys.argv[2]) * len(x))
    return x * weights["w"][0] + weights["b"][0]
with shoal.connect(name=sys.argv[1]) as worker:
    with worker.serve({"m": predict}) as serving:
        print("serving", flush=True)
        sys.stdin.read()
"""


def weights(value: float) -> dict[str, torch.Tensor]:
    """Of version `value`: two tensors that must be of one version for an answer to be whole."""
    return {"w": torch.full((1000,), value), "b": torch.full((10,), 1000 * value)}


def predict(held: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return x * held["w"][0] + held["b"][0]


@contextmanager
def executor(join: str, name: str, seconds: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves, `seconds` for each input."""
    environment = {**os.environ, "SHOAL_JOIN": join, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", EXECUTOR, name, str(seconds)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        assert b"serving\n" == process.stdout.readline()
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[shoal.LocalCluster]:
    with shoal.LocalCluster() as cluster:
        yield cluster


@pytest.fixture
def client(cluster: shoal.LocalCluster) -> Iterator[shoal.Client]:
    with shoal.connect(cluster.join, role="client") as client:
        yield client


def loaded(client: shoal.Client, name: str, version: int) -> bool:
    """Does this executor hold that version?"""
    found = {each["name"]: each["loaded"] for each in client.status()["executors"]}
    return f"m {version}" in found.get(name, [])


def test_from_training_to_feedback(cluster: shoal.LocalCluster, client: shoal.Client) -> None:
    """One cluster, one join string: parameters become a version, a version answers, an answer is judged."""
    with shoal.connect(cluster.join, name="trainer") as worker:
        worker.register({"w": np.full((3, 2), 2.0, np.float32)}, optimizer=shoal.SGD(lr=0.1))
        card = worker.publish("linear", metrics={"accuracy": 0.9}, data={"site:a"}, trained_on=["numbers"])
        assert (("linear", 1, {"linear": {"accuracy": 0.9}}), ("site:a",)) == (
            (card.name, card.version, card.quality),
            card.data,
        )
        assert ("async", ("numbers",), 24) == (card.lineage.mode, card.lineage.data, card.cost.memory - card.size + 24)
        assert torch.equal(torch.full((3, 2), 2.0), client.load("linear", 1)["w"])
        assert 1 == client.promote("linear", 1, why="the first")
        with worker.serve({"linear": lambda held, x: x @ held["w"]}) as serving:
            answer = client.submit(
                "linear", torch.eye(3), needs=shoal.Needs(privacy="site:a", quality=0.5, deadline=10)
            ).result(20)
            assert torch.equal(torch.full((3, 2), 2.0), answer.outputs) and np.asarray(answer).shape == (3, 2)
            assert ("linear", 1, "trainer") == (answer.model, answer.version, answer.executor)
            assert ("linear 1",) == serving.loaded
            for label, why in (("site:b", "privacy"), ("", "")):
                pending = client.submit(
                    "linear", torch.eye(3), needs=shoal.Needs(privacy=label, quality=0.99 * (not label))
                )
                with pytest.raises(
                    shoal.TaskFailed, match=f"no model qualifies: linear 1 on trainer: {why or 'quality'}"
                ):
                    pending.result(20)
            with pytest.raises(shoal.TaskFailed, match=r"on trainer: (RuntimeError|TypeError)"):
                client.submit("linear", {"not": "an array"}).result(20)
            client.feedback(answer, truth=np.array([0, 0, 1]))
            found = client.why(answer)
            assert ("answered", pytest.approx(2 / 3)) == (found["state"], found["reward"]) and "the best of 1" in found[
                "why"
            ]
            plain = client.submit("linear", torch.eye(3)).result(20)
            client.feedback([plain, answer], truth=[np.array([0, 0, 0])] * 2, reward=[1.0, 0.5])
            assert 0.5 == client.why(answer)["reward"]
            (example,) = client.fed_back("linear")  # what had a label was not kept
            every = list(client.fed_back("linear", data=False))
            assert [(plain.id, 1.0, True), (answer.id, 0.5, False)] == [
                (each.task, each.reward, each.kept) for each in every
            ]
            assert example.place == every[0].place and not list(client.fed_back("linear", every[-1].place, data=False))
            assert torch.equal(torch.eye(3), example.inputs) and [0, 0, 0] == example.truth.tolist()
            with pytest.raises(shoal.ShapeError, match="reward"):
                client.feedback(plain, truth=np.array([0.5, 0.1, 0.2]))
        with pytest.raises(shoal.ConfigError, match="no task"):
            client.why("00-1")


def test_a_hundred_promotions_under_load(cluster: shoal.LocalCluster, client: shoal.Client) -> None:
    """No task fails, and none is answered by halves of two versions."""
    for value in (1.0, 2.0, 3.0):
        client.publish("m", weights(value), {"auc": 0.5})
    client.promote("m", 1)
    stop, wrong, versions = threading.Event(), [], set()

    def load() -> None:
        x = torch.arange(4.0)
        while not stop.is_set():
            for pending in [client.submit("m", x) for _ in range(20)]:
                answer = pending.result(60)
                versions.add(answer.version)
                if not torch.equal(answer.outputs, x * answer.version + 1000 * answer.version):
                    wrong.append(answer)

    with executor(cluster.join, "x0"), executor(cluster.join, "x1"):
        until(lambda: loaded(client, "x0", 1) and loaded(client, "x1", 1))
        thread = threading.Thread(target=load, name="load")
        thread.start()
        try:
            for number in range(100):
                client.promote("m", 1 + number % 3)
                if number < 3:  # the others may come faster than anybody can load them
                    until(lambda number=number: 1 + number in versions)
            client.promote("m", 3)
            until(lambda: loaded(client, "x0", 3) and loaded(client, "x1", 3))
            answer = client.submit("m", torch.zeros(1)).result(20)
        finally:
            stop.set()
            thread.join()
    assert not wrong and versions == {1, 2, 3} and 3 == answer.version
    assert 101 <= len(client.model("m")["history"])


def test_who_dies_loses_no_task() -> None:
    """An executor is killed with work, then the dispatcher with a queue: each task has one answer."""
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join, role="client") as client:
        client.publish("m", weights(3.0), {"auc": 0.5}, promote=True)
        who_dies(cluster, client, 1)


def who_dies(cluster: shoal.LocalCluster, client: shoal.Client, version: int) -> None:
    with executor(cluster.join, "slow", 0.01) as slow, executor(cluster.join, "x1", 0.002):
        until(lambda: loaded(client, "slow", version) and loaded(client, "x1", version))
        pending = [client.submit("m", torch.full((2,), float(n))) for n in range(100)]
        slow.kill()
        slow.wait()
        dispatcher = cluster.pids["dispatcher"]
        pending += [client.submit("m", torch.full((2,), float(n))) for n in range(100, 300)]
        pending[10].result(60)
        os.kill(dispatcher, signal.SIGKILL)
        pending += [client.submit("m", torch.full((2,), float(n))) for n in range(300, 320)]
        for number, each in enumerate(pending):
            assert torch.equal(each.result(60).outputs, torch.full((2,), float(number)) * 3 + 3000)
    assert cluster.pids["dispatcher"] not in (None, dispatcher)
    assert client.model("m")["promoted"] == version


def test_a_large_input_is_shared(cluster: shoal.LocalCluster, client: shoal.Client) -> None:
    """Two executors, one of them four times as quick: each gets its part, and the answer is in order."""
    version = client.model("m")["promoted"]
    with executor(cluster.join, "quick", 0.0002), executor(cluster.join, "slow", 0.0008):
        until(lambda: loaded(client, "quick", version) and loaded(client, "slow", version))
        for _ in range(6):  # so that both are known
            for each in [client.submit("m", torch.zeros(20)) for _ in range(8)]:
                each.result(20)
        answer = client.submit("m", torch.arange(1000.0)).result(30)
    assert torch.equal(answer.outputs, torch.arange(1000.0) * version + 1000 * version)
    why = client.why(answer)["why"]
    assert "split over" in why and "quick (" in why and "slow (" in why
    parts = {name: int(why.split(f"{name} (")[1].split(")")[0]) for name in ("quick", "slow")}
    assert 1000 == sum(parts.values()) and parts["quick"] > 1.5 * parts["slow"]


def test_deadlines_and_a_full_queue() -> None:
    """A task that nobody does in time fails at its deadline; one too many is refused, with a time to come back."""
    with (
        shoal.LocalCluster(task_queue=3, task_patience=60) as cluster,
        shoal.connect(cluster.join, role="client") as client,
    ):
        client.publish("m", weights(1.0), {"auc": 0.5}, promote=True)
        started = time.monotonic()
        with pytest.raises(shoal.TaskFailed, match=r"not done within 0\.5 s: no executor is here"):
            client.submit("m", torch.zeros(1), needs=shoal.Needs(deadline=0.5)).result(20)
        assert time.monotonic() - started >= 0.5
        kept = [client.submit("m", torch.zeros(1), needs=shoal.Needs(deadline=60)) for _ in range(3)]
        with pytest.raises(shoal.QueueFull, match="full") as full:
            client.submit("m", torch.zeros(1)).result(20)
        assert full.value.retry_after > 0
        with executor(cluster.join, "x0"):
            assert [1000.0] * 3 == [float(each.result(20).outputs[0]) for each in kept]


def test_what_people_type(cluster: shoal.LocalCluster, client: shoal.Client, tmp_path: Any) -> None:
    def typed(*words: str) -> str:
        done = CliRunner().invoke(cli.shoal, [*words, "--join", cluster.join], standalone_mode=False)
        if done.exception:
            raise done.exception
        return done.output

    assert "m" in {each["name"] for each in json.loads(typed("models", "ls", "--json"))}
    assert "m 2 is promoted\n" == typed("models", "promote", "m", "2", "--why", "typed")
    assert "m 1 is tried on 20% of the tasks\n" == typed("models", "promote", "m", "1", "--canary", "0.2")
    assert "version 1 tried on 20%" in typed("tasks", "show")
    assert "m 2 is promoted again\n" == typed("models", "rollback", "m")  # what is tried is dropped first
    assert "version 2: typed" in typed("models", "show", "m")
    assert "m 2:" in typed("models", "export", "m", str(tmp_path / "m.safetensors"))
    assert 2.0 == load_file(tmp_path / "m.safetensors")["w"][0].item()
    tasks = json.loads(typed("tasks", "ls", "--json"))
    answered = next(each for each in tasks if each["state"] == "answered")
    assert answered["id"] in typed("tasks", "ls") and answered["why"] in typed("tasks", "why", answered["id"]).replace(
        "\n", " "
    )
    assert json.loads(typed("status", "--json"))["tasks"]["models"]["m"]["promoted"] == 2
    assert "m: version 2 promoted" in typed("status")
    for words, why in (
        (("models", "promote", "m", "99"), "no version 99"),
        (("models", "show", "nobody"), "no model 'nobody'"),
        (("tasks", "why", "7"), "no task '7'"),
    ):
        with pytest.raises(shoal.ConfigError, match=why):
            typed(*words)


def test_a_trial_that_is_worse_is_dropped(cluster: shoal.LocalCluster, client: shoal.Client) -> None:
    """Feedback on its share of the tasks is enough; one that is better is promoted."""
    with executor(cluster.join, "x0"):
        for tried, quality, promoted in ((1, 0.1, 3), (2, 1.0, 2)):
            client.promote("m", 3)
            client.promote("m", tried, canary=0.5)
            until(lambda tried=tried: loaded(client, "x0", 3) and loaded(client, "x0", tried))
            share = []
            for _ in range(60):
                answers = [each.result(20) for each in [client.submit("m", torch.zeros(1)) for _ in range(10)]]
                share += [answer.version for answer in answers]
                client.feedback(answers, reward=[quality if answer.version == tried else 0.7 for answer in answers])
                if client.status()["models"]["m"]["trial"] is None:
                    break
            assert client.status()["models"]["m"] == {"promoted": promoted, "trial": None}
            assert 0.2 < share.count(tried) / len(share) < 0.8


def test_nobody_is_there() -> None:
    with shoal.LocalCluster(task_patience=0.3) as cluster, shoal.connect(cluster.join, role="client") as client:
        with pytest.raises(shoal.TaskFailed, match="nobody serves any"):
            client.submit("m", torch.zeros(1)).result(20)
    with pytest.raises(shoal.NoServerError, match="no server at"):
        shoal.connect("127.0.0.1:9", role="client", timeout=0.5)
    with pytest.raises(shoal.NoServerError, match="no server is named"):
        shoal.connect(role="client")
    with pytest.raises(shoal.ConfigError, match="role is 'boss'"):
        shoal.connect(role="boss")  # type: ignore[call-overload]
