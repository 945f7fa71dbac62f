"""The raw API against real servers: what goes in, what comes out, what is refused (rung T3)."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from conftest import until

import shoal
from shoal.protocol.join import read_join
from shoal.worker.loop import Ticket


@pytest.fixture
def cluster() -> Iterator[shoal.LocalCluster]:
    with shoal.LocalCluster(shards=2, staleness=3) as made:
        yield made


def test_dtypes_and_kinds_come_back_as_they_went_in(cluster: shoal.LocalCluster) -> None:
    """Every dtype, numpy and torch, scalars and empty arrays: the values come back in the kind that was registered."""
    first: dict[str, Any] = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f64": np.arange(4, dtype=np.float64),
        "f16": np.arange(5, dtype=np.float16),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "torch": torch.arange(7, dtype=torch.float32),
        "bf16": torch.arange(8, dtype=torch.bfloat16).reshape(4, 2),
        "half": torch.arange(3, dtype=torch.float16),
    }
    with shoal.connect(cluster.join) as worker:
        worker.register(first, optimizer=shoal.SGD(lr=1.0))
        pulled = worker.pull()

        assert list(first) == list(pulled)
        for name, array in first.items():
            assert type(array) is type(pulled[name])
            assert (array.dtype, tuple(array.shape)) == (pulled[name].dtype, tuple(pulled[name].shape))
            assert (array == pulled[name]).all()

        worker.push({name: array * 0 + 1 for name, array in first.items()}).result()
        for name, array in worker.pull().items():
            assert (first[name] - 1 == array).all(), name


def test_pull_of_some_and_into_buffers(cluster: shoal.LocalCluster) -> None:
    """A pull takes names and buffers; what it returns belongs to the caller."""
    with shoal.connect(cluster.join) as worker:
        worker.register({"a": np.zeros(2000, np.float32), "b": torch.zeros(3, 3)}, optimizer=shoal.SGD(lr=1.0))
        worker.push({"a": np.full(2000, -1, np.float32)}).result()
        out = {"a": np.empty(2000, np.float32), "b": torch.empty(3, 3)}

        assert out is not (found := worker.pull(out=out))
        assert found["a"] is out["a"]
        assert found["b"] is out["b"]
        assert 2000.0 == out["a"].sum()
        assert {"a"} == set(worker.pull("a"))
        assert {"b"} == set(worker.pull(["b"]))
        mine = worker.pull("a")["a"]
        mine[:] = 7
        assert 2000.0 == worker.pull("a")["a"].sum()


def test_a_push_of_some_names_leaves_the_rest(cluster: shoal.LocalCluster) -> None:
    """Only what was pushed changes, also where tensors share a block."""
    names = [f"t{i}" for i in range(20)]
    with shoal.connect(cluster.join) as worker:
        worker.register({name: np.zeros(3, np.float32) for name in names}, optimizer=shoal.SGD(lr=1.0, momentum=0.9))
        worker.push({name: np.full(3, -1, np.float32) for name in names[::3]}).result()
        worker.push({name: np.full(3, -1, np.float32) for name in names[::2]}).result()

        for index, (name, array) in enumerate(worker.pull().items()):
            pushes = (index % 3 == 0) + (index % 2 == 0)
            assert {0: 0.0, 1: 1.0, 2: 2.9}[pushes] == pytest.approx(float(array[0])), name


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"nope": np.zeros(4, np.float32)}, "no tensor 'nope'"),
        ({"w": np.zeros(5, np.float32)}, r"float32\[5\].*float32\[4\]"),
        ({"w": np.zeros(4, np.float64)}, r"float64\[4\]"),
        ({"w": [1.0, 2.0, 3.0, 4.0]}, "is a list"),
        ({"w": np.zeros(4, np.int64)}, "dtype int64"),
    ],
)
def test_a_wrong_push_is_refused_in_the_caller(lone: shoal.Worker, arrays: dict[str, Any], told: str) -> None:
    """A wrong name, shape, dtype or kind raises before anything is sent."""
    before = lone.stats.bytes_pushed

    with pytest.raises(shoal.ShapeError, match=told):
        lone.push(arrays)

    assert before == lone.stats.bytes_pushed


@pytest.fixture(scope="module")
def lone() -> Iterator[shoal.Worker]:
    """A worker with one tensor, for tests that change nothing."""
    with pytest.MonkeyPatch.context() as patch, shoal.LocalCluster() as made:
        patch.setenv("SHOAL_TRANSPORT", "tcp")  # shared memory is kept from its first use on: no leak of a test's
        worker = shoal.connect(made.join)
        worker.register({"w": np.zeros(4, np.float32)}, optimizer=shoal.SGD(lr=1.0))
        yield worker
        worker.close()


def test_registering_again(lone: shoal.Worker) -> None:
    """The same model again changes nothing; another one is refused, and the text names what differs."""
    lone.register({"w": np.ones(4, np.float32)}, optimizer=shoal.SGD(lr=1.0))

    assert 0.0 == lone.pull()["w"].sum()
    with pytest.raises(shoal.ConfigError, match=r"w float32\[4\] against w float32\[5\]"):
        lone.register({"w": np.ones(5, np.float32)}, optimizer=shoal.SGD(lr=1.0))
    with pytest.raises(shoal.ConfigError, match="optimizer"):
        lone.register({"w": np.ones(4, np.float32)}, optimizer=shoal.SGD(lr=2.0))
    with pytest.raises(shoal.ConfigError, match="Worker.optimizer|worker.optimizer"):
        lone.register({"w": np.ones(4, np.float32)}, optimizer="sgd")  # type: ignore[arg-type]


def test_calls_in_the_wrong_order() -> None:
    """Without a registered model, push, pull and clock say what to call."""
    with shoal.LocalCluster() as made, shoal.connect(made.join) as worker:
        for call in (worker.pull, lambda: worker.push({})):
            with pytest.raises(shoal.ConfigError, match="no model is registered"):
                call()


def test_mismatched_workers(cluster: shoal.LocalCluster) -> None:
    """A second worker with another model gets an error that names the first tensor that differs; the first goes on."""
    with shoal.connect(cluster.join) as first, shoal.connect(cluster.join) as second:
        first.register({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(4)}, optimizer=shoal.SGD(lr=1.0))
        with pytest.raises(shoal.ShapeError, match=r"b float64\[3\] against b float64\[9\]"):
            second.register({"a": np.zeros(2), "b": np.zeros(9), "c": np.zeros(5)}, optimizer=shoal.SGD(lr=1.0))
        with pytest.raises(shoal.ShapeError, match=r"sgd.*'lr': 1.0.*against adam"):
            second.register({"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(4)}, optimizer=shoal.Adam())
        second.register({"a": np.ones(2), "b": np.ones(3), "c": np.ones(4)}, optimizer=shoal.SGD(lr=1.0))

        assert 0.0 == second.pull()["a"].sum()  # the first worker's values
        first.push({"a": np.ones(2)}).result()
        assert [-1.0, -1.0] == second.pull()["a"].tolist()


def test_nan_is_refused_and_names_the_tensor(cluster: shoal.LocalCluster) -> None:
    """With the policy `error`, a gradient that is not finite raises, and nothing of it is sent."""
    with shoal.connect(cluster.join) as worker:
        worker.register({"a": np.zeros(3), "b": torch.zeros(3, dtype=torch.bfloat16)}, optimizer=shoal.SGD(lr=1.0))
        for bad in (
            {"a": np.array([1, np.nan, 1])},
            {"a": np.ones(3), "b": torch.tensor([0, torch.inf, 0], dtype=torch.bfloat16)},
        ):
            with pytest.raises(shoal.NonFiniteError, match=f"gradient of '{list(bad)[-1]}'"):
                worker.push(bad)
        huge = np.array([1e308, 1e308, 1e308])  # its sum is infinite, it is not
        worker.push({"a": huge}).result()

        assert (-huge == worker.pull()["a"]).all()


def test_nan_is_left_out_and_counted() -> None:
    """With the policy `skip`, such a step is left out, counted, and the clock goes on."""
    with shoal.LocalCluster(nonfinite="skip") as made, shoal.connect(made.join) as worker:
        worker.register({"a": np.zeros(3)}, optimizer=shoal.SGD(lr=1.0))
        worker.push({"a": np.array([1, np.nan, 1])}).result()
        worker.push({"a": np.ones(3)}).result()

        assert 1 == worker.clock()
        assert 1 == worker.stats.skipped
        assert [-1.0, -1.0, -1.0] == worker.pull()["a"].tolist()
        until(lambda: made.status()["totals"]["skipped"] == 1)


def test_staleness_parks_and_releases() -> None:
    """A pull beyond the bound waits, says so when its time is over, and is answered the moment the other worker steps."""
    with (
        shoal.LocalCluster(staleness=1) as made,
        shoal.connect(made.join, name="fast") as fast,
        shoal.connect(made.join, name="slow") as slow,
    ):
        for worker in (fast, slow):
            worker.register({"w": np.zeros(2)}, optimizer=shoal.SGD(lr=1.0))
        for _ in range(2):
            fast.push({"w": np.ones(2)})
            fast.clock()
        with pytest.raises(shoal.WaitTimeout, match="not done after 2.5 s.*slow is at clock 0"):
            fast.pull(timeout=2.5)
        answered: list[float] = []
        thread = threading.Thread(target=lambda: answered.append(float(fast.pull(timeout=20)["w"][0])))
        thread.start()
        slow.push({"w": np.ones(2)})
        slow.clock()
        thread.join(20)

        assert [-3.0] == answered
        assert 1 == fast.stats.staleness[1]
        assert 1 == slow.stats.clock


def test_several_threads_share_a_worker(cluster: shoal.LocalCluster) -> None:
    """Pushes and pulls from several threads at once: each is applied once, and every wait ends."""
    threads, each = 4, 50
    with shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(threads)}, optimizer=shoal.Delta())
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                one = np.eye(threads)[number]
                for _ in range(each):
                    ticket = worker.push({"w": one})
                    if worker.pull()["w"][number] < 1:
                        raise AssertionError("own writes are not read")
                    ticket.result(20)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join(60)

        assert [] == errors
        assert [float(each)] * threads == worker.pull()["w"].tolist()


def test_tickets_end_in_the_background(cluster: shoal.LocalCluster) -> None:
    """A ticket that nobody waits for ends by itself, large pushes too, while the caller does something else."""
    with shoal.connect(cluster.join) as worker:
        big = np.ones(12_000_000, np.float32)  # more than a stream's window
        worker.register({"w": np.zeros_like(big)}, optimizer=shoal.Delta())
        ticket = worker.push({"w": big})
        big[:] = 5  # the caller's array is its own again
        until(lambda: ticket.over)
        assert ticket.done()

        assert 1.0 == worker.pull()["w"].max()
        assert 48_000_000 == worker.stats.bytes_pushed


def test_a_failed_ticket_is_not_swallowed(lone: shoal.Worker, caplog: pytest.LogCaptureFixture) -> None:
    """A call that failed and whose result nobody asked for is logged."""
    ticket = Ticket(lone._loop, 0)
    ticket._end(None, shoal.ShoalError("it went wrong"))
    del ticket
    gc.collect()

    assert "it went wrong" in caplog.text


def test_a_step_costs_messages_per_shard_not_per_tensor(cluster: shoal.LocalCluster) -> None:
    """10,000 small tensors: a push is one message to each shard."""
    arrays = {f"layer{i}": np.zeros(16, np.float32) for i in range(10_000)}
    with shoal.connect(cluster.join) as worker:
        worker.register(arrays, optimizer=shoal.SGD(lr=1.0))
        worker.push({name: array - 1 for name, array in arrays.items()}).result()
        pulled = worker.pull()

        assert all((array == 1).all() for array in pulled.values())
        until(lambda: all(s["counters"].get("pulls") for s in cluster.status()["shards"]))
        for shard in cluster.status()["shards"]:
            assert 1 == shard["counters"]["updates"]
            assert 320_000 == shard["counters"]["bytes_in"]  # filled
            assert 320_000 == shard["counters"]["bytes_shared_in"]  # pushed: half the model each


def test_an_unchanged_block_is_not_sent(cluster: shoal.LocalCluster) -> None:
    """A second pull of what has not changed moves no payload."""
    with shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(100_000, np.float32)}, optimizer=shoal.SGD(lr=1.0))
        worker.pull()
        before = worker.stats.bytes_pulled
        worker.pull()

        assert before == worker.stats.bytes_pulled == 400_000


def test_logged_values_reach_the_status(cluster: shoal.LocalCluster) -> None:
    """`log` takes numbers, NaN included, and refuses anything else."""
    with shoal.connect(cluster.join, name="logger") as worker:
        worker.log(loss=0.5, accuracy=torch.tensor(0.75))
        worker.log(loss=float("nan"))
        with pytest.raises(shoal.ConfigError, match="numbers"):
            worker.log(loss="low")  # type: ignore[arg-type]
        until(lambda: cluster.status()["logged"] == {"loss": None, "accuracy": 0.75})


def test_closing(cluster: shoal.LocalCluster) -> None:
    """Leaving drains what was pushed; a closed worker says that it is closed; closing again changes nothing."""
    with shoal.connect(cluster.join, name="one") as worker:
        worker.register({"w": np.zeros(1_000_000, np.float32)}, optimizer=shoal.Delta())
        for _ in range(5):
            worker.push({"w": np.ones(1_000_000, np.float32)})
    worker.close()

    with pytest.raises(shoal.ShoalError, match="was closed"):
        worker.pull()
    status = cluster.status()
    assert ["left"] == [w["state"] for w in status["workers"]]
    with shoal.connect(cluster.join) as again:
        again.register({"w": np.zeros(1_000_000, np.float32)}, optimizer=shoal.Delta())
        assert 5.0 == again.pull()["w"].min()


def test_a_fork_is_told(lone: shoal.Worker) -> None:
    """A child process that inherits a worker gets a clear error, not a hang."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lone.pull()
        except shoal.ShoalError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)

    assert "does not survive a fork" in told or "do not survive a fork" in told
    assert 0.0 == lone.pull()["w"].sum()


def test_two_live_workers_cannot_share_a_name(cluster: shoal.LocalCluster) -> None:
    """The second is told who has the name; once the first has left, the name is free."""
    with shoal.connect(cluster.join, name="twin"):
        with pytest.raises(shoal.ConfigError, match="named 'twin' already"):
            shoal.connect(cluster.join, name="twin", timeout=20)
    with shoal.connect(cluster.join, name="twin") as again:
        assert "twin" == again.name


def test_nobody_there() -> None:
    """No server at the address: an error within the time-out, that says what to do."""
    started = time.monotonic()
    with pytest.raises(shoal.NoServerError, match="cannot be reached.*shoal doctor"):
        shoal.connect("127.0.0.1:9", timeout=1.5)
    assert time.monotonic() - started < 10
    with pytest.raises(shoal.NoServerError, match="does not resolve"):
        shoal.connect("no.such.host.invalid:7450", timeout=1.5)
    with pytest.raises(shoal.ConfigError, match="not a port"):
        shoal.connect("shoal1:127.0.0.1:port")


def test_an_embedded_server_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address a server is started for this process alone; one of several processes gets an error instead."""
    with shoal.connect() as worker:
        worker.register({"w": np.zeros(2)}, optimizer=shoal.SGD(lr=1.0))
        assert [0.0, 0.0] == worker.pull()["w"].tolist()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(shoal.NoServerError, match="one of several.*WORLD_SIZE is 4"):
        shoal.connect()


def test_min_workers_holds_the_first_clock() -> None:
    """Nobody begins before `min_workers` have come; then all do."""
    with shoal.LocalCluster(min_workers=2, staleness=inf) as made, shoal.connect(made.join) as first:
        with pytest.raises(shoal.WaitTimeout, match="workers: 1 of 2"):
            first.register({"w": np.zeros(2)}, optimizer=shoal.SGD(lr=1.0), timeout=2.5)
        with shoal.connect(made.join) as second:
            second.register({"w": np.zeros(2)}, optimizer=shoal.SGD(lr=1.0))
            first.register({"w": np.zeros(2)}, optimizer=shoal.SGD(lr=1.0))
            assert [0.0, 0.0] == first.pull()["w"].tolist()


def test_the_join_string_of_a_local_cluster_is_plain(cluster: shoal.LocalCluster) -> None:
    """On loopback there are no keys, and the process ids are given by role."""
    address = read_join(cluster.join)

    assert ("127.0.0.1", b"", b"") == (address.host, address.server_key, address.secret)
    assert 2 == len(cluster.pids["shards"])
    assert isinstance(cluster.pids["coordinator"], int)
