"""The state of a cluster, as `shoal status --json` prints it (rung T0)."""

from __future__ import annotations

import json
from math import inf, nan
from typing import Any

import pytest
from cores import CoordinatorBench, only

from shoal.protocol import messages as m
from shoal.ps.coordinator import Died


def status(bench: CoordinatorBench) -> dict[str, Any]:
    answer = only(m.Answer, bench.hear(b"asker", m.Inquire(5, "status")))
    assert 5 == answer.request

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found: dict[str, Any] = json.loads(bytes(answer.buffers[0]), parse_constant=refuse)
    return found


def words(found: dict[str, Any], names: str) -> list[Any]:
    return [found[name] for name in names.split()]


def test_it_says_what_a_cluster_waits_for() -> None:
    """Shards first, then workers, then nothing; the seconds count from then on."""
    bench = CoordinatorBench(min_shards=2, min_workers=2, staleness=inf, lease=9.0)
    assert "shards: 0 of 2 are here" == status(bench)["waiting_for"]
    bench.shard(0), bench.shard(1), bench.join(1)
    found = status(bench)
    assert "workers: 1 of 2 have joined" == found["waiting_for"]
    assert [None, "inf", "async", 9.0, 0.0] == words(found, "model staleness mode lease seconds")

    bench.join(2)
    bench.now = 2.5
    assert ["", 2.5, f"{7:016x}"] == words(status(bench), "waiting_for seconds run")


def test_it_shows_workers_by_what_they_are() -> None:
    """Idle until counted in, live, lost, left, replaced: each worker with its clock and its last words."""
    bench = CoordinatorBench(lease=5.0)
    bench.shard()
    for worker in (1, 2, 3, 4):
        bench.join(worker)
    bench.event(Died("name2"))
    bench.ask(m.Leave, 3, 1, (), (("loss", nan), ("best", inf)), ())
    bench.join(5, name="name4", attempt=1)
    bench.now = 1.0
    bench.renew(1, clock=6, stats=(("steps", 6.0),), logged=(("loss", 0.5), ("worst", -inf)))
    found = status(bench)

    shown = {
        (worker["name"], worker["number"]): worker["state"] for worker in found["workers"] if not worker["attempt"]
    }
    assert {("name1", 0): "live", ("name2", 1): "lost", ("name3", 2): "left", ("name4", 3): "replaced"} == shown
    assert [["name4", 3, "idle"]] == [words(w, "name number state") for w in found["workers"] if w["attempt"]]
    assert [6, 0.0, {"steps": 6.0}, {"loss": 0.5, "worst": "-inf"}, 1] == words(
        found["workers"][0], "clock renewed_seconds_ago stats logged pid"
    )
    assert [{"loss": 0.5, "best": "inf", "worst": "-inf"}, 6, 6] == words(found, "logged min_clock max_clock")


def test_it_adds_up_all_lives() -> None:
    """What ended workers did stays in the totals; the histogram of staleness is in order."""
    bench = CoordinatorBench()
    bench.shard()
    for worker, more in ((1, "staleness.10"), (2, "staleness.2")):
        bench.join(worker)
        stats = (("steps", 3.0), ("bytes_pushed", 10.0), ("seconds.pull", 0.25), (more, 3.0), ("staleness.0", 1.0))
        bench.renew(worker, stats=stats)
    bench.event(Died("name1"))
    totals = status(bench)["totals"]

    assert [6, 20, 0, 1, 0] == words(totals, "steps bytes_pushed bytes_pulled workers_lost workers_left")
    assert [("0", 2), ("2", 3), ("10", 3)] == list(totals["staleness"].items())
    assert {"pull": 0.5} == totals["seconds"]


def test_it_shows_shards_model_and_data() -> None:
    """Where the shards are and how they stand, the model they hold, and the leases on data."""
    bench = CoordinatorBench(lease=5.0, staleness=2.0)
    bench.shard(), bench.join(1), bench.register(1)
    assert [1, 8, 1, False] == words(status(bench)["model"], "tensors bytes shards filled")
    bench.report(counters=(("rejected.misplaced", 2.0), ("refused.nonfinite", 1.0), ("pulls", 3.0)))
    bench.hear(b"x", m.Ack(1, 2, 3, False, 4, ()))
    bench.ask(m.Declare, 1, 2, "digits", 10, 1, 4, 0, 0)
    bench.ask(m.Claim, 1, 3, "digits", 1)
    bench.now = 4.9
    bench.renew(1, entered=False)
    found = status(bench)
    (shard,), (data,) = found["shards"], found["data"]

    assert [0, "host:1000", "live", True, 4] == words(shard, "index address state filled min_clock")
    assert ["digits", 10, 0, 1, 0, 0, 0] == words(data, "name examples epoch leased completed lost re_leased")
    assert (True, 4) == (found["model"]["filled"], found["min_clock"])
    assert {"misplaced": 3, "nonfinite": 1} == found["rejected"], "over the coordinator and its shards"
    bench.now = 5.0
    assert "lost" == status(bench)["shards"][0]["state"]


@pytest.mark.parametrize(
    "stats", [("steps", nan), ("steps", inf), ("staleness.x", 1.0), ("staleness.1", nan), ("seconds.pull", nan)]
)
def test_no_workers_numbers_bring_it_down(stats: tuple[str, float]) -> None:
    """Whatever a worker counts, and a NaN may travel there, the status is an answer."""
    bench = CoordinatorBench()
    bench.shard(), bench.join(1)
    bench.renew(1, stats=(stats,))

    assert "totals" in status(bench)
