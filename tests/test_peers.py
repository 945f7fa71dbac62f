"""The benchmark beside others: everybody in processes of its own, stopped while others have their turn; who fails has a reason, and
nothing is left (rungs T0 and T3)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import until

from shoal.bench import peers, peertable, rivals, seats
from shoal.protocol.errors import ShoalError

STUB = """
import json, subprocess, sys, time
print(json.dumps({ready} | {{"versions": {{"numpy": "2.4"}}}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    {turn}
    if asked.get("rounds"):
        print(json.dumps({{"push": [2e-3] * 3, "pull": [1e-3] * 3, "step": [3e-3] * 3}}), flush=True)
    else:
        print(json.dumps({{"pushes": 7, "wrong": {wrong}}}), flush=True)
"""


def stub(ready: str = '{"ready": True}', turn: str = "pass", wrong: int = 0) -> list[str]:
    """The command of a contestant that does nothing but talk."""
    return [sys.executable, "-S", "-c", STUB.format(ready=ready, turn=turn, wrong=wrong)]


def test_shoal_and_bare_zeromq_do_the_work_and_one_that_fails_hurts_nobody() -> None:
    """Real processes: figures for each way, every element right; the third has ended in its turn, and its last word is said."""
    contestants = {name: peers.commands(4000)[name] for name in ("shoal", "zmq")}
    contestants["broken"] = stub(turn='sys.exit("the rival broke down")')
    found = peers.measured(4000, 1, contestants, look=0.1)

    assert {"broken": "ended (exit 1): the rival broke down, in turn 1"} == found["without"]
    assert ["shoal", "zmq"] == list(found["contestants"])
    assert {"numpy", "pyzmq"} <= set(found["versions"])
    for figures in found["contestants"].values():
        assert ["push", "pull", "step", "idle", "pushes"] == list(figures)
        assert (peers.WARM_UP + 1) * (1 + found["rounds"]) == figures["pushes"]
        assert all(figures[way]["seconds"] > 0 for way in ("push", "pull"))
        assert figures["step"]["seconds"] > max(figures[way]["fastest"] for way in ("push", "pull"))


def test_who_fails_has_a_reason_and_no_figures() -> None:
    """Not installed, not ready, silent, talking nonsense, or not having done the work: said of each; the good one stays."""
    contestants = {
        "good": stub(),
        "absent": stub(ready='{"absent": "No module named \'rival\'"}'),
        "mute": stub(turn="time.sleep(1000)"),
        "confused": stub(turn='print("hello", flush=True)'),
        "lazy": stub(wrong=3),
        "gone": [sys.executable, "-S", "-c", "raise SystemExit(3)"],
    }
    found = peers.measured(400, 2, contestants, turn=2.0, look=0.01)

    assert {
        "absent": "No module named 'rival'",
        "mute": "did not answer within 2 s, in turn 1",
        "confused": "said b'hello', which is no answer, in turn 1",
        "lazy": "7 pushes have left 3 elements wrong",
        "gone": "ended (exit 3): it said nothing",
    } == found["without"]
    assert ["good"] == list(found["contestants"])
    assert {"seconds": 2e-3, "fastest": 2e-3, "slowest": 2e-3} == found["contestants"]["good"]["push"]


BUSY = """
import os, subprocess, sys
def python(does): return [sys.executable, "-S", "-c", does]
subprocess.Popen(python("while True: pass"), start_new_session=True)            # a daemon
subprocess.Popen(python("import time; time.sleep(1000)"), env={})               # one that has lost its mark
subprocess.run(["sh", "-c", '"$@" & ', "sh", *python("import time; time.sleep(1000)")])  # an orphan
print("{}", flush=True)
for line in sys.stdin:
    print("{}", flush=True)
"""


@contextmanager
def seated(script: str) -> Iterator[seats.Seat]:
    with seats.kept() as (mark, folder):
        seat = seats.Seat([sys.executable, "-S", "-c", script], mark, folder)
        try:
            yield seat
        finally:
            seat.close(kill=True)


def test_at_rest_all_that_a_contestant_started_is_stopped() -> None:
    """Daemons, orphans and children without the mark as well. They use nothing, go on when asked, stop again; stopped ones die."""
    with seated(BUSY) as seat:
        seat.answer(30.0)
        until(lambda: len(seat.processes) == 4)
        for _ in range(2):
            seat.rest()
            until(lambda: all(each.status() == psutil.STATUS_STOPPED for each in seat.processes))
            before, done = seat.cpu_seconds(), time.process_time() + 0.05
            while time.process_time() < done:  # the daemon would run meanwhile
                pass
            assert before == seat.cpu_seconds()
            seat.ask({}, 30.0)
            until(lambda used=before: seat.cpu_seconds() > used)
        processes = seat.processes
        seat.rest()
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


RUN = """
import sys, time
from shoal.bench import seats
with seats.kept() as (mark, folder):
    seat = seats.Seat([sys.executable, "-S", "-c", sys.argv[1]], mark + ".0", folder)
    seat.answer(30.0)
    seat.rest()
    print(mark, folder, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_a_run_that_is_ended(how: signal.Signals) -> None:
    """Not even what is stopped, when the run had no chance to do anything about it; nor the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, BUSY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout
        mark, folder = run.stdout.readline().split()
        assert len(seats.marked(mark)) == 4
        run.send_signal(how)
    until(lambda: not seats.marked(mark) and not Path(folder).exists())


def test_a_wrong_element_is_found() -> None:
    """One that was lost, doubled or misplaced."""
    values = rivals.gradient(400) * -3 * rivals.LR
    assert 0 == rivals.wrong(values, 3)
    assert 100 == rivals.wrong(values, 2)
    values[[5, 6]] = values[[6, 5]]
    assert 2 == rivals.wrong(values, 3)


def stubs(nbytes: int) -> peers.Commands:
    """shoal, ahead of nobody; and one that is missing at one size."""
    broken = '{"absent": "not here"}' if nbytes == 400 else '{"ready": True}'
    return {"shoal": stub(), "zmq": stub(), "ray": stub(ready=broken)}


def test_the_whole_is_printed_and_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A table with the reasons; a JSON without paths of this machine; plots with a gap where somebody is missing."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(peers, "commands", stubs)
    monkeypatch.setattr(peers, "LOOK", 0.01)
    assert 0 == peers.main("400,4kB", 3, save=str(tmp_path / "peers"))

    said = capsys.readouterr()
    assert ["measuring 400 B (1 of 2)", "measuring 4 kB (2 of 2)"] == said.err.splitlines()
    assert "raw ZeroMQ  2.00 ms (1x)  2.00 ms (1x)" in said.out
    assert re.search(r"^Ray actor {12,}2.00 ms \(1x\)$", said.out, re.MULTILINE)
    assert "without Ray actor at 400 B: not here" in said.out
    saved = (tmp_path / "peers.json").read_text()
    report = json.loads(saved)
    assert sys.executable not in saved
    assert "2.4" == report["versions"]["numpy"]
    assert [400, 4000] == [size["bytes"] for size in report["sizes"]]
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "peers.svg").read_text()


def test_that_others_are_ahead_is_said() -> None:
    """A factor below 1 appears in words; our own other ways are no rivals."""
    times: dict[str, Any] = {"seconds": 1e-3}
    size = {
        "bytes": 400,
        "contestants": {"shoal": {"push": times}, "shoal-tcp": {"push": {"seconds": 5e-4}}, "gloo": {"push": {"seconds": 2.5e-4}}},
    }  # fmt: skip
    assert ["behind at 400 B, push: of shoal's time take gloo, by hand 0.25"] == peertable.behind({"sizes": [size]})


def test_without_shoal_there_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others' figures are printed, and then it is an error."""
    monkeypatch.setattr(peers, "LOOK", 0.01)
    monkeypatch.setattr(peers, "commands", lambda nbytes: {"shoal": stub(wrong=1), "zmq": stub()})
    with pytest.raises(ShoalError, match="shoal itself has no figures for 400 B: 7 pushes have left 1 elements wrong"):
        peers.main("400", 3)
    assert "raw ZeroMQ  2.00 ms" in capsys.readouterr().out
