"""Shared by all tests: nothing may be left behind.

After every test: no new thread, child process, socket, file or shared-memory object. Waiting for that has a deadline and is no
ordering: what a test started must be gone when it ends, give or take the operating system's own time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import torch
import zmq

torch.set_num_threads(1)
hypothesis.settings.register_profile("same every time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same every time")

SETTLE = 10.0


def until(condition: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """Wait for a condition, with a deadline. Returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so after {seconds:g} s: {what or condition}")
        threading.Event().wait(0.02)
    return found


def _warm_up() -> None:
    """pyzmq starts its collector thread with the first zero-copy message; it stays, and is no leak."""
    context = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://warm")
    right.connect("inproc://warm")
    left.send(bytes(100_000), copy=False)
    right.recv()
    left.close(0)
    right.close(0)
    context.term()


_warm_up()


def _held() -> dict[str, set[Any]]:
    """What this process holds now."""
    files = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue
        if not target.startswith("/dev/") and "/mpl-data/fonts/" not in target:  # matplotlib keeps its fonts open
            files.add((entry, target))
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    return {
        "threads": {thread.name for thread in threading.enumerate()},
        "processes": {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"},
        "files": files,
        "shared memory": shared,
    }


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """The leak check."""
    before = _held()
    yield
    deadline = time.monotonic() + SETTLE
    while True:
        now = _held()
        left = {kind: now[kind] - before[kind] for kind in now if now[kind] - before[kind]}
        if not left or time.monotonic() > deadline:
            break
        threading.Event().wait(0.05)
    assert not left, f"left behind: {left}"


_states = count()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting of the machine's reaches a test, and each keeps its state in a place of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state{next(_states)}"))
    for name in [
        name for name in os.environ if name.startswith("SHOAL_") and name not in ("SHOAL_SEED", "SHOAL_SCHEDULES")
    ]:
        monkeypatch.delenv(name)
