"""The benchmark of tasks: shoal does the work, who fails has a reason, who answers wrongly has no figures (rungs T0 and T3)."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.bench import taskrivals
from shoal.bench import tasks as bench
from shoal.protocol.errors import ShoalError

STUB = """
import json, sys
print(json.dumps({ready}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    figures = {{"p50": 1e-3, "p99": {p99}, "most": 3e-2}} if asked["rate"] else {{"tasks_per_s": {speed} + asked["seed"]}}
    print(json.dumps(figures | {{"tasks": 100, "wrong": {wrong}}}), flush=True)
"""


def stub(speed: float = 6000.0, p99: float = 0.01, wrong: int = 0, ready: str = '{"ready": True}') -> list[str]:
    """The command of a contestant that does nothing but talk."""
    return [sys.executable, "-S", "-c", STUB.format(speed=speed, p99=p99, wrong=wrong, ready=ready)]


def test_shoal_does_the_work() -> None:
    """Real processes: every task is answered, and rightly; at full speed, and at a rate."""
    found = bench.measured(1, 0.2, {"shoal": bench.commands()["shoal"]})
    assert {} == found["without"]
    figures = found["contestants"]["shoal"]
    assert figures["tasks_per_s"]["least"] > 0
    assert {round(figures["tasks_per_s"]["median"] / 2)} <= {round(each["rate"]) for each in figures["rates"]}
    assert all(0 < each["p50"] <= each["p99"] <= each["most"] for each in figures["rates"])
    assert figures["tasks"] >= taskrivals.WINDOW


def test_rates_and_who_is_left_out() -> None:
    """Each has half of its own speed and half of the slowest's; the aim's half is for who can."""
    contestants = {
        "shoal": stub(),
        "ray": stub(speed=1000.0),
        "absent": stub(ready='{"absent": "No module named ray"}'),
        "wrong": stub(wrong=3),
    }
    found = bench.measured(3, 0.0, contestants)
    assert {"absent": "No module named ray", "wrong": "3 of 100 answers were wrong, in turn 1"} == found["without"]
    assert {"median": 6002.0, "least": 6001.0, "most": 6003.0} == found["contestants"]["shoal"]["tasks_per_s"]
    assert [501.0, 2500.0, 3001.0] == [each["rate"] for each in found["contestants"]["shoal"]["rates"]]
    assert [{"rate": 501.0, "p50": 1e-3, "p99": 0.01, "most": 0.03}] == found["contestants"]["ray"]["rates"]
    assert 12 * 100 == found["contestants"]["shoal"]["tasks"]


def test_what_is_printed_and_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A line for each rate, and whether the aims were reached; without shoal it is an error, after the others' figures."""
    monkeypatch.setattr(bench, "commands", lambda: {"shoal": stub(p99=0.03), "ray": stub(speed=1000.0)})
    assert 0 == bench.main(1, 0.0, save=str(tmp_path / "tasks"))
    said = capsys.readouterr().out
    assert "aim 5,000 tasks/s: reached, 6,001" in said
    assert "aim 20.0 ms at 2,500/s for 99 %: not reached, 30.0 ms" in said
    assert "Ray actors" in said and "500/s" in said
    assert 6001.0 == json.loads((tmp_path / "tasks.json").read_text())["contestants"]["shoal"]["tasks_per_s"]["median"]
    monkeypatch.setattr(bench, "commands", lambda: {"shoal": stub(wrong=1), "ray": stub()})
    with pytest.raises(ShoalError, match="no figures: 1 of 100 answers were wrong"):
        bench.main(1, 0.0)
    assert "Ray actors" in capsys.readouterr().out


def answers(late: float, off: int = -1) -> taskrivals.Calls:
    """Each answer takes so long to come; that of one task is wrong."""
    count = iter(range(10**9))

    def submit(x: Any) -> Any:
        number = next(count)
        return time.perf_counter() + late, x.sum(keepdims=True).reshape(1, 1) + (number == off)

    def result(handle: Any) -> Any:
        time.sleep(max(0.0, handle[0] - time.perf_counter()))
        return handle[1]

    return taskrivals.Calls(submit, result)


def test_times_run_from_when_a_task_should_have_come() -> None:
    """Answers that take 30 ms are seen to; a submission that blocks makes those behind it late, and that counts."""
    found = taskrivals.at_a_rate(answers(0.03), 1000, 0.2, seed=1)
    assert (200, 0) == (found["tasks"], found["wrong"]) and 0.03 <= found["p50"] <= found["p99"] <= found["most"]
    slow = answers(0.0)

    def blocks(x: Any) -> Any:
        time.sleep(0.005)
        return slow.submit(x)

    late = taskrivals.at_a_rate(taskrivals.Calls(blocks, slow.result), 1000, 0.1, seed=1)
    assert late["p99"] > 0.2  # a hundred of 5 ms each, in a tenth of a second
    assert 1 == taskrivals.at_full_speed(answers(0.0, off=700), 0.05)["wrong"]
    assert np.array_equal([[32.0]], taskrivals.predict(taskrivals.weights(), np.full((1, 16), 2, np.float32)))
