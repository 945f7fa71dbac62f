"""Life and death of processes (rung T3): killed, stopped, restarted, lost. The bounds are the design's: a lease plus a second."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import until

import shoal
from shoal.launch.servers import Servers
from shoal.launch.settings import SERVER, settle

LEASE = 2.0

TRAIN = """
import sys, time, numpy as np, shoal
with shoal.connect(sys.argv[1], name=sys.argv[2]) as worker:
    worker.register({"w": np.zeros(4)}, optimizer=shoal.Delta())
    for batch in worker.partition(np.arange(2000), batch_size=1, partition_size=50):
        worker.pull()
        try:
            worker.push({"w": np.ones(4)}).result()
        except shoal.WorkerEvicted as error:
            worker.log(evicted=1.0)
            continue
        worker.clock()
        worker.log(steps=worker.stats.steps, evictions=worker.stats.evictions)
"""


@contextmanager
def script(text: str, *args: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python script as a process of its own; ended when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", text, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.communicate()


def logged(cluster: shoal.LocalCluster, name: str, worker: str = "") -> float:
    """The newest value of something that workers log."""
    status = cluster.status()
    if not worker:
        return float(status["logged"].get(name) or 0.0)
    lives = [w for w in status["workers"] if w["name"] == worker and w["state"] in ("live", "idle")]
    return float(lives[-1]["logged"].get(name) or 0.0) if lives else 0.0


def free_port() -> int:
    """A port that was free a moment ago, for tests in which a server comes back at the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_killed_worker_frees_the_others() -> None:
    """SIGKILL: the other is held up no longer than the lease plus a second, and the dead one's data is leased again."""
    with (
        shoal.LocalCluster(staleness=0, lease=LEASE, min_workers=2) as cluster,
        script(TRAIN, cluster.join, "victim") as victim,
        shoal.connect(cluster.join, name="survivor") as survivor,
    ):
        survivor.register({"w": np.zeros(4)}, optimizer=shoal.Delta())
        batches = iter(survivor.partition(np.arange(2000), batch_size=1, partition_size=50))
        longest = 0.0
        for count, _ in enumerate(batches):
            started = time.monotonic()
            survivor.push({"w": np.ones(4)})
            survivor.clock()
            survivor.pull(timeout=30)
            longest = max(longest, time.monotonic() - started)
            if count == 20:
                victim.kill()
            if count > 100:
                break
        batches.close()  # type: ignore[attr-defined]
        status = cluster.status()

        assert LEASE - 1.5 < longest < LEASE + 1.0
        assert 1 == status["totals"]["workers_lost"]
        assert status["data"][0]["re_leased"] >= 1


def test_a_stopped_worker_is_told_and_comes_back() -> None:
    """SIGSTOP past the lease, then SIGCONT: it learns that it was evicted, joins again by itself and goes on."""
    with (
        shoal.LocalCluster(staleness=0, lease=LEASE) as cluster,
        script(TRAIN, cluster.join, "sleeper") as sleeper,
    ):
        until(lambda: logged(cluster, "steps", "sleeper") > 10)
        sleeper.send_signal(signal.SIGSTOP)
        until(lambda: any(w["state"] == "lost" for w in cluster.status()["workers"]), LEASE + 5)
        sleeper.send_signal(signal.SIGCONT)
        until(lambda: logged(cluster, "evictions", "sleeper") == 1.0)
        before = logged(cluster, "steps", "sleeper")
        until(lambda: logged(cluster, "steps", "sleeper") > before + 10)
        assert sleeper.poll() is None

        lives = [w for w in cluster.status()["workers"] if w["name"] == "sleeper"]
        assert ["live", "lost"] == sorted(life["state"].replace("idle", "live") for life in lives)


def test_a_lost_shard_is_an_error_with_its_address() -> None:
    """SIGKILL of a shard: pull and push end in ServerLost, with address and age, within the time-out."""
    with shoal.LocalCluster(shards=2, lease=LEASE) as cluster, shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(4096)}, optimizer=shoal.SGD(lr=1.0))
        worker.pull()
        os.kill(cluster.pids["shards"][1], signal.SIGKILL)
        started = time.monotonic()
        ticket = worker.push({"w": np.ones(4096)})
        with pytest.raises(shoal.ServerLost) as caught:
            worker.pull()
        took = time.monotonic() - started
        with pytest.raises(shoal.ServerLost):
            ticket.result(timeout=5)

        lost = [s for s in cluster.status()["shards"] if caught.value.address == s["address"]]
        assert 1 == len(lost)
        assert 9.0 < caught.value.age < 13.0
        assert took < 13.0
        assert caught.value.address in str(caught.value)
        assert "shoal doctor" in str(caught.value)
        with pytest.raises(shoal.ServerLost):  # a short wait says so, too
            worker.pull(timeout=3)


def test_without_a_coordinator_training_goes_on() -> None:
    """The coordinator dies: pushes and pulls go on, joins end in an error in time."""
    with shoal.LocalCluster(shards=2, lease=LEASE) as cluster, shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(4096)}, optimizer=shoal.Delta())
        os.kill(cluster.pids["coordinator"], signal.SIGKILL)
        for _ in range(20):
            worker.push({"w": np.ones(4096)}).result(5)
            worker.clock()
            worker.pull()

        assert 20.0 == float(worker.pull()["w"][0])
        with pytest.raises(shoal.NoServerError):
            shoal.connect(cluster.join, timeout=2)


def test_a_worker_may_come_first() -> None:
    """Start order does not matter: a worker waits for its server."""
    port = free_port()
    with script(TRAIN, f"127.0.0.1:{port}", "early") as early:
        until(lambda: psutil.Process(early.pid).num_threads() > 1)
        with shoal.LocalCluster(port=port) as cluster:
            until(lambda: logged(cluster, "steps", "early") > 5, 60)


def serve(port: int, **more: Any) -> Servers:
    given = {"port": port, "lease": LEASE, **more}
    return Servers(settle(SERVER, given))


def kill_all(servers: Servers) -> None:
    for pid in [servers.pids["coordinator"], *servers.pids["shards"]]:
        if pid:
            os.kill(pid, signal.SIGKILL)
    servers.close()


def test_a_restarted_server_learns_from_its_workers() -> None:
    """Everything killed and started again at the same port, with nothing known: workers register again and go on."""
    port = free_port()
    steps: list[float] = []
    with serve(port, shards=2) as before:
        with shoal.connect(before.join) as worker:
            worker.register({"w": np.zeros(4096)}, optimizer=shoal.Delta())
            part = worker.partition(np.arange(400), batch_size=1, partition_size=10)
            for count, _ in enumerate(part):
                if count == 100:
                    kill_all(before)
                    after = serve(port, shards=2)
                try:
                    worker.push({"w": np.ones(4096)}).result(30)
                except (shoal.ServerLost, shoal.WorkerEvicted):
                    continue
                worker.clock()
                steps.append(float(worker.pull(timeout=30)["w"][0]))
            with after:
                # It went on from the worker's own copy: no step back to zero, at most the update in flight lost.
                assert steps == sorted(steps)
                assert steps[-1] >= len(steps) - 1 >= 390


def test_another_process_takes_a_lost_shards_place() -> None:
    """A shard dies, another server's shard joins: it takes the free place and is filled by a worker."""
    with serve(0, shards=2) as servers, shoal.connect(servers.join) as worker:
        worker.register({"w": np.zeros(4096)}, optimizer=shoal.Delta())
        worker.push({"w": np.ones(4096)}).result()
        worker.clock()
        worker.pull()
        os.kill(servers.pids["shards"][0], signal.SIGKILL)
        with Servers(settle(SERVER, {"port": 0, "lease": LEASE}), join=servers.join):
            assert [1.0, 1.0] == [float(v) for v in worker.pull(timeout=30)["w"][[0, -1]]]
            worker.push({"w": np.ones(4096)}).result(30)
            assert [2.0, 2.0] == [float(v) for v in worker.pull(timeout=30)["w"][[0, -1]]]


def test_ctrl_c_works_in_every_wait() -> None:
    """A worker that is blocked in a wait ends on the first Ctrl-C, and says goodbye."""
    blocked = """
import sys, numpy as np, shoal
with shoal.connect(sys.argv[1], name="blocked") as worker:
    worker.register({"w": np.zeros(1)}, optimizer=shoal.Delta())
    worker.log(ready=1.0)
    worker.push({"w": np.ones(1)})
    worker.clock()
    worker.pull()
"""
    with shoal.LocalCluster(staleness=0) as cluster, shoal.connect(cluster.join) as slow:
        slow.register({"w": np.zeros(1)}, optimizer=shoal.Delta())
        with script(blocked, cluster.join) as process:
            until(lambda: logged(cluster, "ready") == 1.0 and cluster.status()["max_clock"] == 1)
            process.send_signal(signal.SIGINT)
            process.wait(10)
            errors = process.communicate()[1]

            assert "KeyboardInterrupt" in errors
            states = {w["name"]: w["state"] for w in cluster.status()["workers"]}
            assert "left" == states["blocked"]


def test_a_cluster_dies_with_its_parent() -> None:
    """A process that made a LocalCluster is killed: its servers end by themselves."""
    parent = """
import shoal, sys, json
cluster = shoal.LocalCluster(shards=2)
print(json.dumps(cluster.pids), flush=True)
sys.stdin.read()
"""
    with script(parent, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        process.kill()
        process.wait()
        children = [pids["coordinator"], *pids["shards"]]
        until(lambda: not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children))
