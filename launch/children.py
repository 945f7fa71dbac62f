"""Child processes: servers, which speak JSON on their pipes, and their end.

Rules
- A server child lives as long as its standard input is open: if the parent goes, however it goes, so does the child.
- Children are in a session of their own, so that Ctrl-C reaches the parent alone, which then ends them in order.
- Whatever a child prints is read, line by line, so that no pipe fills; reading ends with the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from ..protocol.errors import ConfigError, NoServerError

READY_TIMEOUT = 120.0
"""Seconds for a server process to begin to listen; importing torch on a busy machine takes most of it."""
GRACE = 5.0
"""Seconds between asking a process to end and ending it."""
LONGEST_LINE = 64 * 1024


def lines_of(stream: IO[bytes], take: Callable[[str], None]) -> threading.Thread:
    """Hand each line of a child's output to `take`, in a thread that ends with the stream."""

    def read() -> None:
        with stream:
            while line := stream.readline(LONGEST_LINE):
                with contextlib.suppress(
                    Exception
                ):  # a closed terminal must not stop the reading: the child would block or die
                    take(line.decode("utf-8", "replace").rstrip("\n"))

    thread = threading.Thread(target=read, name="shoal output", daemon=True)
    thread.start()
    return thread


class ServerProcess:
    """One coordinator, shard or dispatcher.

    Args:
        config: as `shoal.ps.__main__` reads it.
        log: takes each line that the process logs.
    """

    def __init__(self, config: dict[str, Any], log: Callable[[str], None]) -> None:
        self.role = str(config["role"])
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.ps"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=environment,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._log = lines_of(self._process.stderr, log)
        self.port = 0
        self.tell(config)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, words: dict[str, Any]) -> None:
        """Say something to the process; one that is gone does not hear it."""
        assert self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()

    def ready(self, timeout: float = READY_TIMEOUT) -> int:
        """Wait until it listens. Returns its port.

        Raises:
            ConfigError: it cannot listen there. NoServerError: it ended, or did not begin in time.
        """
        assert self._process.stdout
        deadline = time.monotonic() + timeout
        while not select.select([self._process.stdout], [], [], 0.2)[0]:
            if time.monotonic() > deadline:
                raise NoServerError(
                    f"a {self.role} process did not begin to listen within {timeout:g} s", cause="a very busy machine"
                )
        line = self._process.stdout.readline()
        if not line:
            raise NoServerError(
                f"a {self.role} process ended at its start (exit {self._process.wait()}); its output is above"
            )
        words = json.loads(line)
        if "error" in words:
            raise ConfigError(words["error"], hint=words.get("hint", ""))
        self.port = int(words["port"])
        return self.port

    def wait(self) -> str:
        """Until it has ended; how, for people."""
        return describe_exit(self._process.wait())

    def ended(self) -> str:
        """How it ended, for people; "" while it runs."""
        code = self._process.poll()
        return "" if code is None else describe_exit(code)

    def close(self) -> None:
        """Ask it to end; end it if it does not."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.join(GRACE)


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
