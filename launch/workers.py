"""Worker processes: a user's script, with the join string in its environment and a prefix on its output.

Rules
- The script is run as `python SCRIPT ARGS` runs it; only the environment says that it is a worker.
- It is ended as people end programs: asked by SIGINT, told by SIGTERM, killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..protocol.errors import ConfigError
from .children import GRACE, describe_exit, lines_of

Write = Callable[[str, bool], None]
"""Takes a line of output, and whether it is of standard error."""


class ScriptMissing(ConfigError):
    """There is no such script."""


def check_script(script: str) -> None:
    """
    Raises:
        ScriptMissing: there is no file of this name.
    """
    path = Path(script)
    if not path.exists():
        raise ScriptMissing(f"there is no script {script!r}", cause="a typing mistake, or another folder")
    if not path.is_file():
        raise ScriptMissing(f"{script!r} is not a file", hint="the script that trains, as in `python SCRIPT`")


class WorkerProcess:
    """One life of a worker's process.

    Args:
        write: takes its output, line by line, from several threads.
    """

    def __init__(self, name: str, script: str, args: Sequence[str], join: str, attempt: int, write: Write) -> None:
        self.name, self.attempt = name, attempt
        self.stopped = False
        """It was told to end while it ran: its exit status is ours, not the script's."""
        environment = os.environ | {
            "SHOAL_JOIN": join,
            "SHOAL_WORKER_NAME": name,
            "SHOAL_WORKER_ATTEMPT": str(attempt),
            "PYTHONUNBUFFERED": "1",
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [sys.executable, script, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        assert self._process.stdout and self._process.stderr
        self._errors = _Errors(lambda line: write(f"[{name}] {line}", True))
        self._threads = [
            lines_of(self._process.stdout, lambda line: write(f"[{name}] {line}", False)),
            lines_of(self._process.stderr, self._errors.take),
        ]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def ended(self) -> str:
        """How it ended, for people; "" while it runs."""
        return "" if self.code is None else describe_exit(self.code)

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C would."""
        self._errors.hold()
        self._signal(signal.SIGINT)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.code is None:
            self.stopped = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)  # its own children too

    def finish(self) -> None:
        """After its end: read what is left of its output, and end what it left running in its session."""
        self._process.wait()
        for thread in self._threads:
            thread.join(0.5)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join(GRACE)
        self._errors.release()


class _Errors:
    """A worker's standard error. After an interrupt, the traceback of KeyboardInterrupt is no news and is left out."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._held: list[str] | None = None
        self._lock = threading.Lock()

    def take(self, line: str) -> None:
        with self._lock:
            if self._held is not None:
                self._held.append(line)
                return
        self._write(line)

    def hold(self) -> None:
        with self._lock:
            if self._held is None:
                self._held = []

    def release(self) -> None:
        with self._lock:
            held, self._held = self._held or [], None
        if held and held[-1].startswith("KeyboardInterrupt"):
            first = next((i for i, line in enumerate(held) if line.startswith("Traceback ")), len(held))
            held = held[:first]
        for line in held:
            self._write(line)


def stop(workers: Sequence[WorkerProcess], patient: Callable[[float], bool]) -> None:
    """End processes in order: ask, tell, kill.

    Args:
        patient: waits so many seconds; False says not to wait at all.
    """
    for step, seconds in (
        (WorkerProcess.interrupt, GRACE),
        (WorkerProcess.terminate, 2.0),
        (WorkerProcess.kill, GRACE),
    ):
        for worker in workers:
            step(worker)
        deadline = time.monotonic() + seconds
        while any(worker.code is None for worker in workers) and time.monotonic() < deadline:
            if not patient(0.05):
                break
    for worker in workers:
        worker.finish()
