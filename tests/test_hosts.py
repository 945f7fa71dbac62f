"""Training over real links: two hosts with servers, two with workers (rung T4). Not on loopback, so keys apply by themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import until
from hosts import Hosts, NoHosts, Process, hosts_of, remains

pytestmark = pytest.mark.timeout(
    60, method="signal"
)  # the other method ends the process at once, and the hosts would stay

DIGITS = str(Path(__file__).parents[1] / "examples" / "digits.py")
LEASE = 3.0

COUNT = """
import sys, time, numpy as np, shoal
from pathlib import Path
folder, pause, gate = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
seen, last, longest, lost = np.zeros(400, np.int64), None, 0.0, 0
with shoal.connect() as worker:
    worker.register({"w": np.zeros(4096)}, optimizer=shoal.Delta())
    for batch in worker.partition(np.arange(400), batch_size=1, partition_size=20, epochs=2):
        if worker.stats.steps == pause:
            (folder / worker.name).touch()
            while not (folder / gate).exists():
                time.sleep(0.01)
            pause, last = None, None
        try:
            worker.push({"w": np.ones(4096)}).result()
        except shoal.WorkerEvicted as error:
            print("told:", error, flush=True)
            lost += 1
            continue
        worker.clock()
        worker.pull()
        seen[batch] += 1
        now = time.monotonic()
        last, longest = now, max(longest, now - (last or now))
        worker.log(longest=longest, steps=worker.stats.steps)
    w = worker.pull()["w"]
    worker.log(least=w.min(), most=w.max(), lost=lost)
np.save(folder / f"{worker.name}.npy", seen)
"""
"""Counts examples in two epochs. After some steps, with a partition in hand, it makes a file by its name and waits for another."""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Four hosts. Where they cannot be had the test is skipped, and it says why; nothing of them is left in either case."""
    try:
        with hosts_of("abcd", tmp_path) as made:
            yield made
    except NoHosts as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        assert not remains()


class Servers:
    """A coordinator and a shard on host a, and one more shard on host b when asked."""

    def __init__(self, hosts: Hosts, folder: Path, *flags: str) -> None:
        self._hosts, file = hosts, folder / "join"
        common = ("-m", "shoal.cli", "server", "--port", "0", "--shards", "1")
        self._processes = [
            hosts.start(
                "a", *common, "--bind", hosts.addresses["a"], "--min-shards", "2", "--join-file", str(file),
                "--state-dir", str(folder / "a"), *flags,
            )
        ]  # fmt: skip
        self.join: str = until(lambda: file.exists() and file.read_text().strip())
        self._more = (*common, "--bind", hosts.addresses["b"], "--join", self.join, "--state-dir", str(folder / "b"))

    def add_shard(self) -> None:
        """From host b."""
        self._processes.append(self._hosts.start("b", *self._more))

    def worker(self, host: str, *script: str) -> Process:
        """A worker by the name of its host; it is not started again when it fails."""
        options = ("--join", self.join, "--name", host, "--max-restarts", "0")
        return self._hosts.start(host, "-m", "shoal.cli", "worker", *options, *script)

    def status(self) -> dict[str, Any]:
        done = self._hosts.run("a", "-m", "shoal.cli", "status", "--json", "--join", self.join)
        assert 0 == done.returncode, done.stderr
        return dict(json.loads(done.stdout))

    def end(self) -> list[int]:
        """Ctrl-C for each, the coordinator's host last. Returns the exit codes."""
        return [process.interrupt() for process in reversed(self._processes)]


def lives(status: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The lives of a worker: those that go on, then those that have ended."""
    return [life for life in status["workers"] if life["name"] == name]


def steps(status: dict[str, Any], name: str) -> float:
    """The steps that a worker here has made, those of its earlier lives included; 0 if it is not here."""
    here = [life for life in lives(status, name) if life["state"] in ("live", "idle")]
    return sum(life["logged"].get("steps", 0.0) for life in here)


def test_digits_on_four_hosts(hosts: Hosts, tmp_path: Path) -> None:
    """Two hosts with a worker each train the example over two hosts with a shard each, as its docstring says, with keys."""
    servers = Servers(hosts, tmp_path, "--min-workers", "2")
    supervised = servers.worker("c", DIGITS)
    plain = hosts.start("d", DIGITS, SHOAL_JOIN=servers.join, SHOAL_WORKER_NAME="d")
    until(lambda: "shards: 1 of 2 are here" == servers.status()["waiting_for"])
    servers.add_shard()

    for process in (supervised, plain):
        assert 0 == process.ended(), process.text
        found = re.search(r"test accuracy ([0-9.]+)", process.text)
        assert found and float(found[1]) >= 0.95, process.text
    status = servers.status()
    assert ("curve", {}) == (status["security"], status["rejected"])
    assert {hosts.addresses["a"], hosts.addresses["b"]} == {s["address"].split(":")[0] for s in status["shards"]}
    assert (2, True) == (status["model"]["shards"], status["model"]["filled"])
    assert [(0, 0)] == [(data["leased"], data["lost"]) for data in status["data"]]
    assert ["c", "d"] == sorted(life["name"] for life in status["workers"] if life["stats"]["steps"] > 0)
    assert [0, 0] == servers.end()


def test_a_cut_host_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    """A worker's cable is pulled in mid-partition for longer than its lease.

    The other goes on after a lease and does its data. Back again, the first is told, joins by itself, and no example is left out.
    """
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    servers = Servers(hosts, tmp_path, "--min-workers", "2", "--lease", f"{LEASE:g}s", "--staleness", "3")
    servers.add_shard()
    c = servers.worker("c", str(script), str(tmp_path), "30", "cut")
    d = servers.worker("d", str(script), str(tmp_path), "200", "back")  # so that there is data left when c comes back
    until(lambda: (tmp_path / "c").exists(), what="c has a partition")
    hosts.cut("c")
    (tmp_path / "cut").touch()

    def gone() -> dict[str, Any] | None:
        status = servers.status()
        return status if status["data"][0]["re_leased"] and steps(status, "d") > 30 + 4 else None

    status = until(gone, LEASE + 10, "c's data is leased again, and d goes on")
    assert ["lost"] == [life["state"] for life in lives(status, "c")]
    assert "told" not in c.text

    hosts.restore("c")
    until(lambda: steps(servers.status(), "c") > 30, 20, "c is here again and trains")
    (tmp_path / "back").touch()
    assert (0, 0) == (c.ended(), d.ended()), c.text + d.text

    # It was told, and it joined again in the same process.
    assert "it joins again as a new incarnation" in c.text
    assert "told: this worker was declared dead and joins again; this update is lost" in c.text
    status = servers.status()
    ended = lives(status, "c")
    assert ["left", "lost"] == sorted(life["state"] for life in ended)
    assert 1 == len({life["pid"] for life in ended})
    # The other was held up, and not for longer than the lease and a second.
    logged = {name: lives(status, name)[-1]["logged"] for name in "cd"}
    assert LEASE - 1.5 < logged["d"]["longest"] < LEASE + 1.0
    # Every example of every epoch was done, what was under way twice at most.
    (data,) = status["data"]
    assert (2, 40, 0) == (data["epoch"], data["completed"], data["leased"])
    assert 1 == data["re_leased"] == data["lost"] == status["totals"]["workers_lost"]
    seen = {name: np.load(tmp_path / f"{name}.npy") for name in "cd"}
    both = seen["c"] + seen["d"]
    assert 2 <= both.min()
    assert both.sum() <= 2 * 400 + 20
    # What was acknowledged was applied once, on both shards.
    least, most = (max(logged[name][what] for name in "cd") for what in ("least", "most"))
    assert both.sum() <= least <= most <= both.sum() + logged["c"]["lost"]
    assert (1, 0) == (logged["c"]["lost"], logged["d"]["lost"])
    assert [0, 0] == servers.end()
