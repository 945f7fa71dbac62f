"""A contestant of `shoal bench peers` in processes of its own, which are stopped while others have their turn.

What a contestant is: a command that speaks lines of JSON (`shoal.bench.rivals`)
- It says `{"ready": true}` when it can begin, or `{"absent": why}`, or `{"failed": why}`, and then ends.
- `{"rounds": n}`, on its standard input, is answered with the seconds of each round, `{"push": […], "pull": […]}`.
- `{"check": true}` is answered with `{"pushes": n, "wrong": elements}`. At the end of its standard input it ends.

Rules
- Whatever it starts carries its mark, an environment variable, or descends from who does. So daemons are found, too.
- At rest all its processes are stopped (SIGSTOP); they go on (SIGCONT) when it is asked something.
- It is ended by process ids, whatever happens to whom: a keeper, a process that outlives the run, ends all that carry the run's
  mark, stopped or not, and removes its folder, as soon as the run lets go of it or dies.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from ..protocol.errors import ShoalError

MARK = "SHOAL_BENCH_MARK"
GRACE = 3.0
"""Seconds that a contestant has to end by itself."""
ENDING = 30.0
LONGEST_REASON = 300


class Seat:
    """One contestant: started when made, then awake.

    Args:
        command: what runs it. mark: of all that it starts. folder: exists; its home, its temporary files, its errors.
    """

    def __init__(self, command: Sequence[str], mark: str, folder: Path) -> None:
        self._mark, self._errors = mark, folder / "errors"
        self._known: set[Any] = set()
        self._unread = b""
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env=_environment(folder, mark),
            )

    @property
    def processes(self) -> set[Any]:
        """Everything of this contestant that lives, as `psutil.Process`."""
        self._known = {each for each in self._known | marked(self._mark) if _alive(each)}
        return self._known

    def ask(self, words: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Wake it, say something, and take the answer. Raises as `answer`."""
        self.wake()
        assert self._process.stdin
        with suppress(BrokenPipeError):  # then it has ended, which the answer says
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()
        return self.answer(timeout)

    def answer(self, timeout: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            ShoalError: it says nothing in time, has ended, or says what is no answer. The message is why, for people.
        """
        assert self._process.stdout
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise ShoalError(f"did not answer within {timeout:g} s")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise ShoalError(self._last_words())
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ShoalError(f"said {line[:80]!r}, which is no answer")
        return found

    def _last_words(self) -> str:
        said = self._errors.read_text(errors="replace").strip().splitlines()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        return f"ended (exit {self._process.poll()}): {(said or ['it said nothing'])[-1]}"[:LONGEST_REASON]

    def rest(self) -> None:
        """Stop all its processes. One that is found running may have started another: so until all that are found are stopped."""
        stopped: set[Any] = set()
        while running := self.processes - stopped:
            for process in running:
                _signal(process, signal.SIGSTOP)
            stopped |= running

    def wake(self) -> None:
        """Let its processes go on."""
        for process in self.processes:
            _signal(process, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """What its processes have used so far, of all cores together."""
        used = 0.0
        for process in self.processes:
            with suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def close(self, *, kill: bool = False) -> None:
        """End it: by itself if it can, else (or if `kill`) by force. Nothing of it is left."""
        assert self._process.stdin and self._process.stdout
        known = self.processes
        if not kill:
            self.wake()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if not kill:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        end(self._mark, known)
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def kept() -> Iterator[tuple[str, Path]]:
    """A mark for a run, and a folder. What carries the mark, with or without more behind it, ends with this context or with
    this process, and the folder goes."""
    mark, folder = secrets.token_hex(8), Path(tempfile.mkdtemp(prefix="shoal-peers-"))
    keeper = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, mark, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
    assert keeper.stdin
    try:
        yield mark, folder
    finally:
        keeper.stdin.close()
        keeper.wait()


def _environment(folder: Path, mark: str) -> dict[str, str]:
    """One thread, no setting of the user's, and a home that goes with the run."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SHOAL_", "RAY_"))}
    return inherited | {MARK: mark, "OMP_NUM_THREADS": "1", "HOME": str(folder), "TMPDIR": str(folder)}


def marked(mark: str) -> set[Any]:
    """Processes with this mark, or with it and more behind a dot; and their descendants, which may have cleared theirs."""
    found: set[Any] = set()
    parents: dict[Any, int] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            parents[process] = process.ppid()
            theirs = process.environ().get(MARK, "")
            if theirs == mark or theirs.startswith(f"{mark}."):
                found.add(process)
    while more := {each for each, parent in parents.items() if parent in {one.pid for one in found}} - found:
        found |= more
    return found


def end(mark: str, known: Set[Any] = frozenset()) -> None:
    """Kill what carries a mark, and what is known to belong to it, until nothing is left. A process that is stopped dies, too.

    Raises:
        ShoalError: the kernel does not let one go.
    """
    deadline = time.monotonic() + ENDING
    while left := {each for each in known | marked(mark) if _alive(each)}:  # again: one may just have started another
        if time.monotonic() > deadline:
            raise ShoalError(f"not dead {ENDING:g} s after they were killed: {sorted(each.pid for each in left)}")
        for process in left:
            _signal(process, signal.SIGKILL)
        time.sleep(0.02)


def _signal(process: Any, number: int) -> None:
    with suppress(psutil.Error):  # psutil looks whether the id is still the same process's
        process.send_signal(number)


def _alive(process: Any) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def main(mark: str, folder: str) -> None:
    """The keeper."""
    sys.stdin.read()
    end(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
