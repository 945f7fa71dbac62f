"""Server processes: ready or not and why, what they print, how they end (rung T3). A shell script plays the bad ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import until

from shoal.launch import children
from shoal.launch.children import LONGEST_LINE, ServerProcess, describe_exit, lines_of
from shoal.protocol.errors import ConfigError, NoServerError


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ServerProcess]:
    """Starts a process that runs these lines of shell instead of a server."""
    monkeypatch.setattr(children, "GRACE", 0.3)

    def start(script: str, log: Callable[[str], None] = lambda line: None) -> ServerProcess:
        path = tmp_path / "server"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(children, "sys", SimpleNamespace(executable=str(path)))
        return ServerProcess({"role": "shard"}, log)

    return start


def test_lines_come_one_by_one() -> None:
    """Whole, without their ends; bytes that are no text are shown, an endless line comes in pieces, the last needs no end."""
    read, write = os.pipe()
    found: list[str] = []
    thread = lines_of(os.fdopen(read, "rb"), found.append)
    with os.fdopen(write, "wb") as pipe:
        pipe.write(b"one\n\ntwo \xff\n" + b"x" * (LONGEST_LINE + 5) + b"\nend")
    thread.join(10)

    assert ["one", "", "two \ufffd", "x" * LONGEST_LINE, "xxxxx", "end"] == found
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit 0"), (3, "exit 3"), (-9, "killed by SIGKILL"), (-11, "killed by SIGSEGV"), (-99, "killed by signal 99")],
)
def test_an_exit_in_words(code: int, words: str) -> None:
    """Signals by name."""
    assert words == describe_exit(code)


def test_a_real_server_from_start_to_end() -> None:
    """It says its port, is in a session of its own, ends when its standard input does, and hears what it is told till then."""
    settings = {"mode": "async", "staleness": 1.0, "nonfinite": "error", "lease": 5.0}
    settings |= {"min_workers": 1, "min_shards": 1, "block_bytes": 4096, "insecure": False}
    settings |= {"recipe": {}}
    config = {
        "role": "coordinator",
        "bind": "127.0.0.1",
        "port": 0,
        "allowed": [],
        "identities": {},
        "settings": settings,
    }
    server = ServerProcess(config, lambda line: None)
    try:
        assert 0 < server.ready() == server.port
        second = ServerProcess(config | {"port": server.port}, lambda line: None)
        with pytest.raises(ConfigError, match=f"port {server.port} on 127.0.0.1 is in use") as caught:
            second.ready()
        second.close()
        assert "--port 0" in caught.value.hint
        assert server.pid == os.getsid(server.pid) != os.getsid(0)
        server.tell({"died": "nobody"})
        assert "" == server.ended()
    finally:
        server.close()

    assert "exit 0" == server.ended()
    server.tell({"died": "nobody"})  # it does not hear, and that is no error


def test_a_server_that_ends_at_its_start(act: Callable[..., ServerProcess]) -> None:
    """Its exit code, and what it said before, which says why."""
    said: list[str] = []
    server = act("echo 'no such library' >&2; exit 3", said.append)
    with pytest.raises(NoServerError, match=r"a shard process ended at its start \(exit 3\)"):
        server.ready()
    server.close()

    assert ["no such library"] == said


def test_a_server_that_does_not_begin(act: Callable[..., ServerProcess]) -> None:
    """There is a time-out; a process that does not go when its input ends is ended."""
    server = act("exec sleep 60")
    with pytest.raises(NoServerError, match="a shard process did not begin to listen within 0.3 s"):
        server.ready(0.3)
    server.close()

    assert "killed by SIGKILL" == server.ended()
    assert not psutil.pid_exists(server.pid)


def test_a_server_that_says_why_it_cannot(act: Callable[..., ServerProcess]) -> None:
    """Its words are the error's."""
    server = act("""echo '{"error": "the port is taken", "hint": "--port 0"}'""")
    with pytest.raises(ConfigError) as caught:
        server.ready()
    server.close()

    assert ("the port is taken", "--port 0") == (caught.value.what, caught.value.hint)


def test_how_it_ended_is_known_without_waiting(act: Callable[..., ServerProcess]) -> None:
    """ "" while it runs; killed from outside, by what."""
    server = act("""echo '{"port": 5}'; exec sleep 60""")
    assert (5, "") == (server.ready(), server.ended())
    os.kill(server.pid, signal.SIGKILL)

    assert "killed by SIGKILL" == until(server.ended)
    server.close()
    server.close()  # again changes nothing


def test_secrets_go_by_standard_input(act: Callable[..., ServerProcess]) -> None:
    """What is told arrives as lines of JSON, and is neither an argument nor in the environment."""
    heard: list[str] = []
    over = threading.Event()

    def log(line: str) -> None:
        heard.append(line)
        if line == "over":
            over.set()

    server = act("head -n 2 >&2; echo $0 $* >&2; env >&2; echo over >&2", log)
    words: dict[str, Any] = {"died": 'quo"ted\n'}
    server.tell(words)
    assert over.wait(20)
    server.close()

    assert ['{"role": "shard"}', '{"died": "quo\\"ted\\n"}'] == heard[:2]
    assert "-P -m shoal.ps" in heard[2]
    assert not any("ted" in line and "quo" in line for line in heard[2:])
    assert "PYTHONUNBUFFERED=1" in heard
