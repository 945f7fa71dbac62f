"""Memory shared with a shard: what is taken, what is read and written when, and that nothing is left (rungs T0, T3, SPEC §11)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import until
from cores import SHARD, ShardBench, floats, only, peer_of

import shoal
from shoal.protocol import messages as m
from shoal.protocol.effects import Attach, Attached, Received
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.regions import PAGE, TOKEN_BYTES
from shoal.protocol.rules import SGD
from shoal.ps.attach import Unfit, attach
from shoal.ps.shared import MAX_REGIONS
from shoal.worker.exchange import MOST_REGIONS
from shoal.worker.region import Region

TWO = ModelSpec((Tensor("a", "float32", (1500,), 0), Tensor("b", "float64", (3,), 0)), (SGD(lr=1.0),))


def offered(region: Region, **other: Any) -> m.Share:
    words = {"pid": os.getpid(), "fd": region.fd, "size": region.size, "token": region.token} | other
    return m.Share(1, SHARD, region.number, words["pid"], words["fd"], words["size"], (words["token"],))


@pytest.fixture
def region() -> Any:
    made = Region(lay_out(TWO, 1))
    yield made
    made.close()


# --- the file


def test_both_sides_see_the_same_bytes(region: Region) -> None:
    """A region is opened by process and descriptor; each flat begins on a page of its own, each block follows from the layout."""
    layout = lay_out(TWO, 2, 4096)
    memory = attach(offered(region))
    region.flats[0][1024] = 5.0
    region.flats[1][2] = 7.0
    found = layout.plan

    assert (PAGE, PAGE + 8192) == found.flats
    assert [(0, 4096), (4096, 6000), (8192, 8216)] == [(a - PAGE, b - PAGE) for a, b in found.blocks]
    assert 5.0 == np.frombuffer(memory[slice(*found.blocks[1])], np.float32)[0]
    assert 7.0 == np.frombuffer(memory[slice(*found.blocks[2])], np.float64)[2]
    memory[PAGE : PAGE + 4] = np.float32(9.0).tobytes()
    assert 9.0 == region.flats[0][0]


def test_what_is_not_a_region_is_not_opened(region: Region, tmp_path: Path) -> None:
    """A wrong token, size, descriptor or process, an ordinary file, one that could shrink: each is told, none is mapped."""
    ordinary = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    loose = os.memfd_create("shoal", os.MFD_ALLOW_SEALING)
    for file in (ordinary, loose):
        os.write(file, region.token + bytes(region.size - TOKEN_BYTES))
    try:
        for offer, why in (
            (offered(region, token=bytes(32)), "token"),
            (offered(region, size=region.size + PAGE), "size"),
            (offered(region, fd=999_999), "opened"),
            (offered(region, pid=2**31), "opened"),
            (offered(region, fd=ordinary), "no memory file"),
            (offered(region, fd=loose), "sealed"),
        ):
            with pytest.raises(Unfit, match=why):
                attach(offer)
    finally:
        os.close(ordinary)
        os.close(loose)


def test_a_region_cannot_shrink(region: Region) -> None:
    """Or a shard that reads it would be killed."""
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, PAGE)


# --- the shard


class Sharing(ShardBench):
    """A shard that has taken region 1 of worker 1."""

    def __init__(self, **other: Any) -> None:
        super().__init__(**other)
        self.plan = self.layout.plan
        self.memory = memoryview(bytearray(self.plan.size))
        self.offer = m.Share(1, SHARD, 1, 2, 3, self.plan.size, (bytes(32),))
        (self.asked,) = self.core.handle(Received(peer_of(1), self.offer), self.now)
        self.event(Attached(peer_of(1), self.offer, self.memory))

    def write(self, *values: float) -> None:
        start = self.plan.blocks[0][0]
        self.memory[start : start + 4 * len(values)] = floats(*values)

    def shared_push(self, clock: int, **other: Any) -> list[Any]:
        ranges, buffers = other.get("ranges", ()), other.get("buffers", ())
        return self.do(
            m.Push,
            1,
            clock,
            True,
            1.0,
            (),
            other.get("region", 1),
            0,
            other.get("blocks", (0,)),
            ranges,
            False,
            0,
            buffers,
        )

    def shared_pull(self, request: int, region: int = 1) -> m.Values:
        return only(m.Values, self.hear(peer_of(1), m.Pull(1, SHARD, request, 0, 0, 0, region, 0, ())))


def test_an_offer_is_tried_and_answered() -> None:
    """What could be a region is opened, once; what cannot be is refused unopened; without a model there is no answer yet."""
    bench = Sharing()
    assert isinstance(bench.asked, Attach)
    assert m.Shared(1, SHARD, 1, True, "") in bench.to(peer_of(1), m.Shared)
    assert m.Shared(1, SHARD, 1, True, "") == only(m.Shared, bench.hear(peer_of(1), bench.offer))
    assert not only(m.Shared, bench.hear(peer_of(1), m.Share(1, SHARD, 2, 2, 3, 99, (bytes(32),)))).accepted
    assert not only(m.Shared, bench.hear(peer_of(1), m.Share(1, SHARD, 2, 2, 3, bench.plan.size, (b"",)))).accepted
    bench.event(Attached(peer_of(1), m.Share(1, SHARD, 2, 2, 3, 9, ()), None, "another machine"))
    assert m.Shared(1, SHARD, 2, False, "another machine") == bench.to(peer_of(1), m.Shared)[-1]
    for number in range(2, MAX_REGIONS + 1):
        bench.event(Attached(peer_of(1), m.Share(1, SHARD, number, 2, 3, 9, ()), bench.memory))
    said = only(m.Shared, bench.hear(peer_of(1), m.Share(1, SHARD, 99, 2, 3, bench.plan.size, (bytes(32),))))
    assert "16 regions" in said.why

    bench.core.weights = None
    assert [] == bench.hear(peer_of(1), m.Share(1, SHARD, 77, 2, 3, bench.plan.size, (bytes(32),)))


def test_a_push_is_read_where_it_lies() -> None:
    """Whole, or the ranges at their places. A region that is not shared, or not any more, is a refusal; the clock goes on."""
    bench = Sharing()
    bench.start(1)
    bench.write(-1.0, -2.0)
    assert () == only(m.Ack, bench.shared_push(0)).refusals
    assert [1.0, 2.0] == bench.weights
    bench.write(-9.0, -4.0)
    bench.shared_push(1, ranges=(1,), buffers=(np.array([1, 2], "<u4").tobytes(),))
    assert [1.0, 6.0] == bench.weights
    assert "shape" == only(m.Ack, bench.shared_push(2, region=5)).refusals[-1][1]
    assert "shape" == only(m.Ack, bench.shared_push(3, blocks=(7,))).refusals[-1][1]
    bench.hear(peer_of(1), m.Unshare(1, SHARD, 1))
    assert "shape" == only(m.Ack, bench.shared_push(4)).refusals[-1][1]

    assert [1.0, 6.0] == bench.weights
    assert ((1, 5),) == bench.report().clocks


def test_in_sync_mode_a_gradient_is_copied() -> None:
    """The worker has its region back with the acknowledgement, which comes before the step is closed."""
    bench = Sharing(mode="sync")
    bench.start(1, 2)
    bench.write(-2.0, -2.0)
    assert 1 <= only(m.Ack, bench.shared_push(0)).seq
    bench.write(99.0, 99.0)
    bench.push(2, 0, -4.0, -4.0)

    assert [3.0, 3.0] == bench.weights


def test_a_pull_is_written_once() -> None:
    """A repeated request, and an older one, get the newest answer again, and nothing is written that the worker may be reading."""
    bench = Sharing()
    bench.start(1)
    start = bench.plan.blocks[0][0]
    first = bench.shared_pull(5)
    assert (1, (0,), ()) == (first.region, first.blocks, first.buffers)
    bench.write(7.0, 7.0)
    bench.push(1, 0, -1.0, -1.0)
    for request in (5, 4):
        assert first == bench.shared_pull(request)
    assert floats(7.0, 7.0) == bytes(bench.memory[start : start + 8])

    bench.shared_pull(6)
    assert floats(1.0, 1.0) == bytes(bench.memory[start : start + 8])
    assert 0 == bench.shared_pull(7, region=9).region, "what is not shared is sent"


def test_a_region_goes_with_its_worker() -> None:
    """An incarnation that ends takes its regions along: its memory must be freed."""
    bench = Sharing()
    bench.view((2,), filler=2)

    assert bench.core._shared.region(1, 1) is None


# --- processes


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_both_ways_give_the_same(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some or all tensors, lent arrays or the caller's own, two shards: the values are those of plain arithmetic."""
    monkeypatch.setenv("SHOAL_TRANSPORT", transport)
    with shoal.LocalCluster(shards=2, staleness=0) as cluster, shoal.connect(cluster.join) as worker:
        first = {"a": np.arange(5000, dtype=np.float32), "b": np.ones((3, 2), np.float64)}
        worker.register(first, optimizer=shoal.SGD(lr=1.0))
        shared = bool(worker._exchange.cache and worker._exchange.cache.region)
        gradients = worker.buffers.gradients
        for gradient in gradients.values():
            gradient[...] = 1.0
        worker.push(gradients).result()
        worker.push({"b": np.full((3, 2), 2.0)}).result()
        pulled = worker.pull(out=worker.buffers.weights)

        assert (transport == "shm") == shared
        assert np.array_equal(first["a"] - 1, pulled["a"])
        assert np.array_equal(first["b"] - 3, worker.pull("b")["b"])
        assert pulled["a"] is worker.buffers.weights["a"]
        count = "bytes_shared_in" if transport == "shm" else "bytes_in"
        moved = 5000 * 4 + 2 * 6 * 8 + (0 if transport == "shm" else 5000 * 4 + 6 * 8)  # over TCP the filling, too
        until(lambda: moved == sum(shard["counters"].get(count, 0) for shard in cluster.status()["shards"]))


def test_many_pushes_under_way_take_no_more_regions() -> None:
    """A loop that never waits is served, in order, with a handful of regions; the rest travels as bytes."""
    before = len(_regions_of(os.getpid()))
    with shoal.LocalCluster(shards=1, lease=5.0) as cluster, shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(4, np.float32)}, optimizer=shoal.SGD(lr=1.0))
        shard = cluster.pids["shards"][0]
        os.kill(shard, signal.SIGSTOP)
        tickets = [worker.push({"w": np.full(4, -1.0, np.float32)}) for _ in range(6)]
        os.kill(shard, signal.SIGCONT)
        for ticket in tickets:
            ticket.result()

        assert [6.0] * 4 == worker.pull()["w"].tolist()
        assert len(_regions_of(os.getpid())) - before <= 1 + MOST_REGIONS


def test_without_memory_files_bytes_are_sent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Too little memory, or a system without them: quietly for `auto`, an error for `shm`."""

    def none(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", none)
    with shoal.LocalCluster() as cluster:
        with shoal.connect(cluster.join) as worker:
            worker.register({"w": np.zeros(3, np.float32)}, optimizer=shoal.SGD(lr=1.0))
            worker.push({"w": -np.ones(3, np.float32)}).result()
            assert [1.0] * 3 == worker.pull()["w"].tolist()
            assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
        monkeypatch.setenv("SHOAL_TRANSPORT", "shm")
        with shoal.connect(cluster.join) as worker, pytest.raises(shoal.ShoalError, match="No space left"):
            worker.register({"w": np.zeros(3, np.float32)}, optimizer=shoal.SGD(lr=1.0))
        monkeypatch.setenv("SHOAL_TRANSPORT", "pigeon")
        with pytest.raises(shoal.ConfigError, match="pigeon"):
            shoal.connect(cluster.join)


def test_a_shard_that_is_killed_takes_nothing_along() -> None:
    """The memory is the worker's, who is told of the loss and still has its values."""
    with shoal.LocalCluster(shards=1, lease=2.0) as cluster, shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(2048, np.float32)}, optimizer=shoal.SGD(lr=1.0))
        worker.push(worker.buffers.gradients).result()
        maps = _regions_of(cluster.pids["shards"][0])
        os.kill(cluster.pids["shards"][0], signal.SIGKILL)

        assert 2 == len(maps)
        with pytest.raises(shoal.ServerLost):
            worker.pull()
        assert (2048,) == worker.buffers.weights["w"].shape


def test_a_worker_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """No name, no file: when its life has ended the shard lets go of the last of it."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import numpy as np, shoal, signal\n"
        "worker = shoal.connect()\n"
        "worker.register({'w': np.zeros(100_000, np.float32)}, optimizer=shoal.SGD(lr=1.0))\n"
        "worker.push(worker.buffers.gradients).result()\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    with shoal.LocalCluster(shards=1, lease=1.5) as cluster:
        environment = os.environ | {"SHOAL_JOIN": cluster.join, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout and b"ready" in process.stdout.readline()
            shard = cluster.pids["shards"][0]
            assert 2 == len(_regions_of(shard))
            process.kill()
        until(lambda: not _regions_of(shard), what="the shard has let go")


def _regions_of(pid: int) -> list[str]:
    """Regions that a process has mapped."""
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/memfd:shoal" in line]
