"""What grows: the benchmark measures what it says, and nothing grows with the square of anything (rungs T0, T1, T3). No time is
asserted: work is counted in lines of Python, which are the same everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cores import SHARD, ShardBench, peer_of

from shoal import cli
from shoal.bench import cost, footprint, growth, virtual
from shoal.launch.settings import BadFlag
from shoal.protocol import messages as m
from shoal.protocol.effects import Received, Send
from shoal.protocol.frames import encode
from shoal.protocol.layout import MIN_BLOCK_BYTES, Layout, lay_out
from shoal.protocol.model import ModelSpec, Tensor, read_model
from shoal.protocol.rules import SGD
from shoal.ps.members import Members
from shoal.worker.arrays import Cache, Gather
from shoal.worker.early import Early

TENSOR = MIN_BLOCK_BYTES // 16
"""Elements: four tensors make a block."""


def work(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs."""
    lines = 0

    def trace(frame: FrameType, what: str, value: Any) -> Any:
        nonlocal lines
        lines += what == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines


def described(tensors: int) -> ModelSpec:
    return ModelSpec(tuple(Tensor(f"t{i}", "float32", (TENSOR,)) for i in range(tensors)), (SGD(),))


def model(tensors: int) -> Layout:
    return lay_out(described(tensors), 2, MIN_BLOCK_BYTES)


def some_pulled(tensors: int) -> Callable[[], object]:
    cache = Cache(model(tensors))
    return lambda: cache.shards([f"t{i}" for i in range(0, tensors, 2)])


def some_pushed(tensors: int) -> Callable[[], object]:
    gather = Gather(Cache(model(tensors)))
    arrays = {f"t{i}": np.ones(TENSOR, np.float32) for i in range(0, tensors, 2)}
    return lambda: (gather.put(arrays, check=True), gather.parts())


def sent_early(tensors: int) -> Callable[[], object]:
    layout = model(tensors)
    return lambda: Early(layout, {0, 1})


def registered(tensors: int) -> Callable[[], object]:
    description = described(tensors).description
    return lambda: Cache(lay_out(read_model(description), 2, MIN_BLOCK_BYTES))


@pytest.mark.parametrize("prepared", [some_pulled, some_pushed, sent_early, registered])
def test_four_times_the_tensors_are_four_times_the_work(prepared: Callable[[int], Callable[[], object]]) -> None:
    """With as many more blocks: who looks at each tensor for each block does sixteen times as much."""
    assert work(prepared(1600)) < 5.5 * work(prepared(400))


def test_what_lies_in_a_block() -> None:
    """Every tensor that has an element there, and no other; found the same as by looking at each."""
    sizes = (5, 1019, 0, 1024, 1, 3000, 0, 7, 2048, 11)  # the second ends where a block does
    spec = ModelSpec(tuple(Tensor(f"t{i}", "float32", (size,)) for i, size in enumerate(sizes)), (SGD(),))
    layout = lay_out(spec, 1, MIN_BLOCK_BYTES)
    for block in layout.blocks:
        slow = [p for p in layout.flats[0].pieces if p.start < block.stop and p.stop > block.start]
        assert slow == list(layout.pieces_in(block))
    assert 7 == len(layout.blocks)


def test_a_renewal_costs_the_same_among_many() -> None:
    """The coordinator asks at each message who has expired, and when the next will."""

    def one(count: int) -> int:
        members = Members(3.0)
        lives = [members.admit(m.Join(i, f"w{i}", 0, "host", i), b"", 0.0) for i in range(count)]
        for life in lives[::-1]:
            members.renew(life, 1.0)
        return work(
            lambda: (
                members.expired(2.0),
                members.next_expiry,
                members.named(f"w{count - 1}"),
                members.renew(lives[0], 2.0),
            )
        )

    assert one(3) == one(300)


def test_counting_a_worker_in_costs_the_same_among_many() -> None:
    """It concerns nobody else: a shard does not look at each worker for each that comes."""

    def one(count: int) -> int:
        bench = ShardBench(tuple(range(1, count + 1)))
        bench.start(*range(1, count))
        enter = Received(peer_of(count), m.Enter(count, SHARD, 1, 0))
        return work(lambda: bench.core.handle(enter, bench.now))

    assert one(24) < 1.2 * one(4)


# --- the simulation


def test_the_simulation_counts_what_is_said() -> None:
    """Each worker pushes to each shard once a step, and pulls; each joins once; a push carries a block."""
    run = virtual.simulate(3, 2, steps=2)
    shard, coordinator = (run["costs"][name] for name in ("shard", "coordinator"))

    assert [12.0, 12.0] == [shard["training"][kind]["count"] for kind in ("Push", "Pull")]
    assert 3.0 == coordinator["joining"]["Join"]["count"]
    training = run["phases"]["training"]
    seconds = training["seconds"]
    assert 1.6 < seconds < 2.7, "two steps of a second, give or take a fifth"
    assert 6 * MIN_BLOCK_BYTES < training["shard"]["bytes_heard"] * seconds < 6 * MIN_BLOCK_BYTES * 1.1
    assert 0 < training["shard"]["busy"] <= training["busiest_shard"]["busy"] < 1
    assert all(
        cost["median"] > 0 for phases in run["costs"].values() for kinds in phases.values() for cost in kinds.values()
    )


def test_a_simulated_server_does_one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while it works waits until it is done; an answer leaves when its work is done, and is under way for DELAY."""
    ticks = iter([0.0, 3.0, 10.0, 14.0])  # begun and ended: 3 s of work, then 4
    monkeypatch.setattr(virtual.time, "thread_time", lambda: next(ticks))
    world, arrived = virtual._World(), []
    core = SimpleNamespace(wake_at=float("inf"), handle=lambda event, now: [Send(b"w", m.Probe(int(now), 0))])
    server = virtual._Server(world, core)
    server.doors[b"w"] = lambda frames, message: arrived.append((world.now, message.incarnation))
    frames = encode(m.Probe(1, 2))
    for when in (1.0, 2.0):
        world.at(when, lambda: server.hear(b"w", frames))
    world.run(lambda: len(arrived) == 2)

    assert [0.0, 2.0] == server.waits
    assert [(4.0 + virtual.DELAY, 1), (8.0 + virtual.DELAY, 4)] == arrived
    assert (7.0, 2, 2) == (server.busy, server.heard, server.said)


# --- real processes


def test_a_row_along_an_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of a cluster of that shape."""
    monkeypatch.setitem(cost.POINTS, "tensors", ({"bytes": 4000}, ()))
    (row,) = cost.cost_rows("tensors", (3,), repeat=1)

    assert {"shards": 1, "workers": 1, "tensors": 3, "bytes": 4000} == {n: row[n] for n in cost.ONE}
    assert all(row[way] > 0 for way in (*cost.WAYS, "register"))


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, before anything is started."""
    monkeypatch.setattr(cost, "LocalCluster", None)
    monkeypatch.setattr(footprint, "_used", lambda *_: {"steady": 0.0})
    (row,) = cost.cost_rows("bytes", (10**15,))
    (held,) = footprint.memory_rows((10**15,), ("adam",), ("tcp",))

    for found in (row, held):
        assert "needs" in found["skipped"] and "are free" in found["skipped"]
        assert "peak" not in found and "push" not in found


def test_a_shard_holds_parameters_a_snapshot_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 MB what is under way weighs more than at the 100 MB of the target; a second snapshot would be 1.5."""
    monkeypatch.setattr(footprint, "ROUNDS", 3)
    (row,) = footprint.memory_rows((64_000_000,), ("sgd",), ("tcp",))

    assert 0.9 < row["steady_ratio"] <= row["peak_ratio"] < 1.3
    assert row["shared"] == 0


def test_idle_workers_are_counted() -> None:
    """Shares of a core for each number of workers, and the difference for one."""
    found = footprint.idle_rows((1, 3), seconds=1.1, shards=1)

    assert [1, 3] == [row["workers"] for row in found["rows"]]
    assert all(0 < row[name] < 1 for row in found["rows"] for name in ("coordinator", "shards"))
    first, last = found["rows"]
    more = sum(last[name] - first[name] for name in ("coordinator", "shards"))
    assert more / 2 == pytest.approx(found["per_worker"])


# --- what is printed


def report() -> dict[str, Any]:
    """A report of every part, with one row that was left out."""
    about = {"cpus": 2, "platform": "Linux", "torch": "2", "shoal": "0.1.0"}
    point = dict(cost.ONE, bytes=4000)
    times = dict.fromkeys((*cost.WAYS, "register"), 0.001)
    held = {"transport": "tcp", "rule": "sgd", "bytes": 10**8, "peak": 2.2e8, "steady": 2e8, "shared": 0.0}
    return {
        "machine": about,
        "transport": "auto",
        "repeat": 9,
        "cost": {"bytes": [point | times, point | {"skipped": "needs more"}]},
        "memory": [held | {"peak_ratio": 1.1, "steady_ratio": 1.0}],
        "idle": footprint_of_nobody(),
        "simulated": [virtual.simulate(2, 1, steps=1)],
    }


def footprint_of_nobody() -> dict[str, Any]:
    rows = [{"workers": count, "coordinator": 0.001, "shards": 0.002} for count in (1, 33)]
    return {"rows": rows, "shards": 2, "seconds": 20.0, "per_worker": 0.0003}


def test_a_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A table a part; what is simulated says so, what was left out says why."""
    growth.show(report())
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]

    assert "4 kB 1.00 ms 1.00 ms 1.00 ms 1.00 ms 1.00 ms" in lines
    assert "4 kB left out: needs more" in lines
    assert "tcp sgd 100 MB 220 MB 1.10 200 MB 1.00 0 MB" in lines
    assert "33 0.100% 0.200%" in lines
    assert any(line.startswith("each 0.0300%") for line in lines)
    assert any(line.startswith("SIMULATED") for line in lines)
    assert any(line.startswith("2 x 1 training busiest shard") for line in lines)


def test_the_json_has_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One object; parts that were not asked for are empty, and are not measured."""
    monkeypatch.setattr(growth, "cost_rows", lambda axis, repeat: [axis, repeat])
    monkeypatch.setattr(growth, "footprint", None)
    monkeypatch.setattr(growth, "simulated", lambda: ["run"])
    assert 0 == growth.main("bytes, simulated", 5, as_json=True)

    found = json.loads(capsys.readouterr().out)
    assert ({"bytes": ["bytes", 5]}, [], {}, ["run"]) == tuple(
        found[n] for n in ("cost", "memory", "idle", "simulated")
    )


def test_a_part_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake of usage: one line that lists them."""
    with pytest.raises(BadFlag):
        growth.main("weights")
    monkeypatch.setattr(sys, "argv", ["shoal", "bench", "growth", "--only", "idle,weights"])
    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert 64 == ended.value.code
    assert "shoal: --only 'weights' is not one of shards, workers, tensors, bytes, memory, idle, simulated\n" == (
        capsys.readouterr().err
    )


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said at once, with what to type, and not after minutes of measuring."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(growth, "cost_rows", None)
    monkeypatch.setattr(sys, "argv", ["shoal", "bench", "growth", "--plot", "growth"])
    with pytest.raises(SystemExit) as ended:
        cli.main()

    assert 78 == ended.value.code
    assert "pip install 'shoal[bench]'" in capsys.readouterr().err


class Pane:
    """What matplotlib's axes are to `draw`: it keeps what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **_: self.asked.append((name, args))

    def got(self, name: str) -> list[tuple[Any, ...]]:
        return [args for asked, args in self.asked if asked == name]


def test_a_pane_a_part() -> None:
    """Four lines of what was measured and not of what was left out; the limit of memory; what is simulated says so."""
    panes = SimpleNamespace(flat=[Pane() for _ in range(4)])
    saved: list[str] = []
    figure = SimpleNamespace(tight_layout=lambda: None, savefig=lambda path, **_: saved.append(path))
    pyplot = SimpleNamespace(subplots=lambda *_, **__: (figure, panes), close=lambda _: None)
    growth.draw(report(), "here", pyplot)

    costs, memory, simulated, rest = panes.flat
    assert [([4000], [1.0])] * 4 == costs.got("loglog")
    assert [(1.15,)] == memory.got("axvline")
    assert simulated.got("set_title")[0][0].startswith("SIMULATED")
    assert [(False,)] == rest.got("set_visible")
    assert ["here.png", "here.svg"] == saved
