"""The `shoal` command as people type it: help, mistakes, exit codes, reports, Ctrl-C (rung T3)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from conftest import until

import shoal

COUNT = """
import sys, numpy as np, shoal
with shoal.connect() as worker:
    worker.register({"w": np.zeros(4)}, optimizer=shoal.Delta())
    for batch in worker.partition(np.arange(60), batch_size=1, partition_size=5, epochs=2):
        worker.push({"w": np.ones(4)})
        worker.clock()
        worker.log(total=worker.pull()["w"][0], argument=float(sys.argv[1]))
    worker.log(total=worker.pull()["w"][0])
    print("done", worker.name)
"""

HANG = """
import numpy as np, shoal, time, signal, os
if os.environ["SHOAL_WORKER_NAME"] == "w1":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with shoal.connect() as worker:
    worker.register({"w": np.zeros(4)}, optimizer=shoal.Delta())
    worker.clock()
    print("hanging", flush=True)
    while True:
        time.sleep(0.1)
"""


def run(*args: str, cwd: Path, timeout: float = 90.0, **env: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "shoal.cli", *args],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | env,
    )  # fmt: skip


class Started:
    """A command that goes on until it is ended."""

    def __init__(self, args: Sequence[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        self.family: list[psutil.Process] = []

    def note_family(self) -> None:
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int, timeout: float = 30.0) -> tuple[int, str, str]:
        self.note_family()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    @property
    def survivors(self) -> list[psutil.Process]:
        return [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[list[Started]]:
    """Commands to be ended whatever happens."""
    started: list[Started] = []
    yield started
    for one in started:
        one.family = one.family or (
            psutil.Process(one.process.pid).children(recursive=True) if one.process.poll() is None else []
        )
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()
        for child in one.family:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize(
    "command", [[], ["run"], ["server"], ["worker"], ["status"], ["doctor"], ["bench"], ["bench", "pushpull"]]
)
def test_help_shows_examples(command: list[str], tmp_path: Path) -> None:
    """Every command has help with an example in it."""
    done = run(*command, "--help", cwd=tmp_path)

    assert 0 == done.returncode
    assert "shoal" in done.stdout
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["frobnicate"], 64, "No such command"),
        (["run"], 64, "Missing argument 'SCRIPT'"),
        (["run", "--workerz", "3", "x.py"], 64, "No such option"),
        (["run", "missing.py"], 66, "there is no script 'missing.py'"),
        (["run", "."], 66, "is not a file"),
        (["run", "--staleness", "-2", "x.py"], 64, "--staleness is '-2': must be 0"),
        (["run", "--mode", "federated", "x.py"], 78, "2 workers cannot make a round in which"),
        (["run", "--lease", "soon", "x.py"], 64, "must be a duration such as 15s"),
        (["run", "--report", "no/such/folder/r.json", "x.py"], 78, "no file can be written there"),
        (["server", "--port", "70000"], 64, "must be from 0 to 65535"),
        (["server", "--bind", "192.0.2.7", "--insecure"], 78, "192.0.2.7 is not an address of this machine"),
        (["server", "--bind", "no.such.host.invalid"], 78, "does not resolve"),
        (["worker", "x.py"], 78, "no server is named"),
        (["worker", "--join", "shoal1:127.0.0.1:7450:abc", "x.py"], 78, "3 parts after 'shoal1', not 2 or 4"),
        (["status", "--join", "127.0.0.1:9"], 69, "cannot be reached"),
        (["doctor", "127.0.0.1:9"], 69, "nothing listens at 127.0.0.1:9"),
        (["doctor", "no.such.host.invalid"], 69, "does not resolve"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_a_code(args: list[str], code: int, told: str, tmp_path: Path) -> None:
    """What is wrong, in words, with the exit code that sysexits has for it; never a traceback."""
    (tmp_path / "x.py").write_text("print('x')")
    done = run(*args, cwd=tmp_path)

    assert code == done.returncode
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_run_trains_and_reports(tmp_path: Path) -> None:
    """Scripts get their arguments, output its prefix; the report and the closing table say what was done."""
    (tmp_path / "count.py").write_text(COUNT)
    done = run(
        "run", "-n", "2", "--servers", "2", "--staleness", "inf", "--report", "r.json", "count.py", "7", cwd=tmp_path
    )
    report = json.loads((tmp_path / "r.json").read_text())

    assert 0 == done.returncode, done.stderr
    assert {"[w0] done w0", "[w1] done w1"} == set(done.stdout.split("\n")[:2])
    assert "finished" in done.stderr
    assert ("async", "inf", 2, 2, 120, 24) == tuple(
        report[key] for key in ("mode", "staleness", "workers", "servers", "steps", "completed_partitions")
    )
    assert (0, 0, 0) == tuple(report[key] for key in ("lost_partitions", "re_leased_partitions", "lost_workers"))
    assert {"total": 120.0, "argument": 7.0} == report["logged"]
    assert report["seconds"] > 0
    assert report["bytes"] == report["bytes_pushed"] + report["bytes_pulled"] > 0
    assert sum(report["staleness_histogram"].values()) >= 120


@pytest.mark.parametrize(
    ("script", "code", "told"),
    [
        ("import sys; sys.exit(3)", 3, "failed before the first step (exit 3)"),
        ("this is no Python", 1, "SyntaxError"),
        ("import shoal\nshoal.connect(); raise RuntimeError('boom')", 1, "RuntimeError: boom"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", 139, "killed by SIGSEGV"),
        ("print('hello')", 0, "does the script call shoal.connect()?"),
    ],
)
def test_scripts_that_fail(script: str, code: int, told: str, tmp_path: Path) -> None:
    """A script's own exit code is the run's; the words say what happened."""
    (tmp_path / "bad.py").write_text(script)
    done = run("run", "-n", "2", "bad.py", cwd=tmp_path)

    assert code == done.returncode
    assert told in done.stdout + done.stderr


def test_one_that_fails_late_is_a_lost_worker(tmp_path: Path) -> None:
    """A worker that fails after the first step: the others finish its data; its exit code is the run's."""
    script = COUNT.replace("        worker.clock()\n", "        worker.clock()\n        fail(worker)\n").replace(
        "with shoal",
        "def fail(worker):\n    if worker.name == 'w1' and worker.stats.steps > 5: sys.exit(9)\nwith shoal",
    )
    (tmp_path / "late.py").write_text(script)
    done = run("run", "-n", "2", "--report", "r.json", "late.py", "7", cwd=tmp_path)
    report = json.loads((tmp_path / "r.json").read_text())

    assert 9 == done.returncode
    assert "worker w1 is gone (exit 9)" in done.stderr
    assert "[w0] done w0" in done.stdout
    assert report["completed_partitions"] >= 24
    assert {"w0": 0, "w1": 9} == report["worker_exits"]


def test_a_worker_taken_away_is_forgiven(tmp_path: Path) -> None:
    """SIGKILL from outside: the others do its data at once, without waiting for the lease, and the run has succeeded."""
    script = COUNT.replace("        worker.clock()\n", "        worker.clock()\n        die(worker)\n").replace(
        "with shoal",
        "import os, signal\ndef die(worker):\n"
        "    if worker.name == 'w1' and worker.stats.steps > 5: os.kill(os.getpid(), signal.SIGKILL)\nwith shoal",
    )
    (tmp_path / "killed.py").write_text(script)
    started = time.monotonic()
    done = run(
        "run", "-n", "2", "--lease", "60s", "--staleness", "0", "--report", "r.json", "killed.py", "7", cwd=tmp_path
    )
    report = json.loads((tmp_path / "r.json").read_text())

    assert 0 == done.returncode, done.stderr
    assert time.monotonic() - started < 45
    assert 1 == report["lost_workers"] == report["re_leased_partitions"]


def test_a_script_that_prints_a_lot(tmp_path: Path) -> None:
    """200,000 lines from two workers arrive whole, each with its prefix."""
    (tmp_path / "loud.py").write_text("for i in range(100_000): print('line', i)")
    done = run("run", "-n", "2", "loud.py", cwd=tmp_path)
    lines = done.stdout.splitlines()

    assert 0 == done.returncode
    assert 200_000 == len(lines)
    assert {"[w0] line 99999", "[w1] line 99999"} <= set(lines)


def test_ctrl_c_ends_a_run_in_order(tmp_path: Path, start: list[Started]) -> None:
    """Once, and everything ends: also a worker that will not hear; no process is left, and the code is 130."""
    (tmp_path / "hang.py").write_text(HANG)
    one = Started(["run", "-n", "2", "--report", "r.json", "hang.py"], tmp_path)
    start.append(one)
    assert one.process.stdout is not None
    while one.process.stdout.readline().split()[-1] != "hanging":
        pass
    code, _, errors = one.end(signal.SIGINT)

    assert 130 == code
    assert "stopping the workers" in errors
    assert "Traceback" not in errors
    until(lambda: not one.survivors)
    assert json.loads((tmp_path / "r.json").read_text())["exit_code"] == 130


def test_a_server_prints_what_to_type(tmp_path: Path, start: list[Started]) -> None:
    """`shoal server`: the join string in a file, whole; status and doctor find it; a worker trains; Ctrl-C ends it cleanly."""
    (tmp_path / "count.py").write_text(COUNT)
    one = Started(["server", "--port", "0", "--shards", "2", "--join-file", "join"], tmp_path)
    start.append(one)
    join = until(lambda: (tmp_path / "join").exists() and (tmp_path / "join").read_text().strip())
    assert 0o600 == (tmp_path / "join").stat().st_mode & 0o777

    doctor = run("doctor", join, "--json", cwd=tmp_path)
    found = json.loads(doctor.stdout)
    assert (0, True) == (doctor.returncode, found["ok"])
    assert ["name", "tcp", "greeting", "keys", "version", "clock", "bandwidth", "shard 0", "shard 1"] == [
        step["step"] for step in found["steps"]
    ]

    trained = run("worker", "--join", join, "--name", "alone", "count.py", "7", cwd=tmp_path)
    assert "[alone] done alone" in trained.stdout
    assert 0 == trained.returncode
    status = json.loads(run("status", "--json", cwd=tmp_path, SHOAL_JOIN=join).stdout)
    assert (120, ["left"]) == (status["totals"]["steps"], [w["state"] for w in status["workers"]])
    assert "alone" in run("status", "--join", join, cwd=tmp_path).stdout

    code, _, errors = one.end(signal.SIGINT)
    assert 0 == code
    assert f"SHOAL_JOIN='{join}' python train.py" in errors
    assert not (tmp_path / "join").exists()
    assert not one.survivors


def test_a_port_in_use(tmp_path: Path) -> None:
    """The coordinator's port, or a shard's that was asked for, is taken: it says which, and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("server", "--port", str(port), cwd=tmp_path)
        beside = run("server", "--port", str(port - 1), cwd=tmp_path)

    assert 69 == done.returncode == beside.returncode
    for one in (done, beside):
        assert f"port {port} on 127.0.0.1 is in use" in one.stderr
        assert "--port 0" in one.stderr


def test_a_worker_is_started_again(tmp_path: Path) -> None:
    """`shoal worker` starts a failing script again, under its name and as a later attempt; and gives up with its code."""
    (tmp_path / "flaky.py").write_text(
        "import shoal, sys, os\n"
        "with shoal.connect() as worker:\n"
        "    print('attempt', os.environ['SHOAL_WORKER_ATTEMPT'], worker.name, flush=True)\n"
        "    if int(os.environ['SHOAL_WORKER_ATTEMPT']) < int(sys.argv[1]): os._exit(5)\n"
    )
    with shoal.LocalCluster() as cluster:
        done = run("worker", "--join", cluster.join, "--name", "phoenix", "flaky.py", "1", cwd=tmp_path)
        lost = run("worker", "--join", cluster.join, "--max-restarts", "1", "flaky.py", "9", cwd=tmp_path)

    assert 0 == done.returncode
    assert ["[phoenix] attempt 0 phoenix", "[phoenix] attempt 1 phoenix"] == done.stdout.splitlines()
    assert "failed (exit 5); starting it again" in done.stderr
    assert 5 == lost.returncode
    assert "has failed 2 times" in lost.stderr


def test_precedence(tmp_path: Path) -> None:
    """Flag before environment before shoal.toml before default; a mistake in the file is named with its place."""
    (tmp_path / "e.py").write_text("import shoal; print(shoal.connect().mode)")
    (tmp_path / "shoal.toml").write_text('mode = "sync"\n[run]\nworkers = 1\n')

    assert "[w0] sync" in run("run", "e.py", cwd=tmp_path).stdout
    assert "[w0] async" in run("run", "e.py", cwd=tmp_path, SHOAL_MODE="async").stdout
    assert "[w0] sync" in run("run", "--mode", "sync", "e.py", cwd=tmp_path, SHOAL_MODE="async").stdout
    wrong = run("run", "e.py", cwd=tmp_path, SHOAL_MODE="sideways")
    assert (78, True) == (wrong.returncode, "$SHOAL_MODE is 'sideways': must be one of async, sync" in wrong.stderr)
    (tmp_path / "shoal.toml").write_text("stalenes = 3\n")
    typo = run("run", "e.py", cwd=tmp_path)
    assert (78, True) == (typo.returncode, "no setting stalenes. Try: staleness" in typo.stderr)


def test_a_second_coordinator(tmp_path: Path, start: list[Started]) -> None:
    """Two servers on one port: the second is refused, the first goes on."""
    one = Started(["server", "--port", "0", "--join-file", "join"], tmp_path)
    start.append(one)
    join = until(lambda: (tmp_path / "join").exists() and (tmp_path / "join").read_text().strip())
    second = run("server", "--port", join.rpartition(":")[2], cwd=tmp_path)

    assert (69, True) == (second.returncode, "is in use" in second.stderr)
    assert 0 == run("status", "--join", join, cwd=tmp_path).returncode
    assert 0 == one.end(signal.SIGTERM)[0]
