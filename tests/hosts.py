"""Hosts on one machine: network namespaces, each with a cable to a switch (rung T4).

Rules
- The machine's own network is not touched: the bridge stands in a namespace too, and goes with it.
- Every name holds the process id, so that two runs never meet. What a run that was killed has left is removed by the next.
- What runs on a host is ended before the host is removed, whatever happened; `remains` says what is left.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import until

IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
PREFIX = f"shoal{os.getpid()}-"
SWITCH = f"{PREFIX}sw"
FORBIDDEN = ("not permitted", "Permission denied", "not supported", "Unknown device type", "Read-only file system")
"""What `ip` says where a machine does not allow namespaces, bridges or links. Any other failure is a fault of ours."""


class NoHosts(Exception):
    """This machine cannot have such hosts, and why."""


def ip(*words: str) -> str:
    """One `ip` command. Returns what it printed."""
    if IP is None:
        raise NoHosts("there is no `ip` in PATH, /usr/sbin or /sbin")
    done = subprocess.run([IP, *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        told = f"`ip {' '.join(words)}` failed: {done.stderr.strip()}"
        raise NoHosts(told) if any(reason in done.stderr for reason in FORBIDDEN) else AssertionError(told)
    return done.stdout


class Process:
    """A command on a host. Its output, both kinds, is in a file, so that no pipe fills."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=log.parent, env=os.environ | env
            )

    @property
    def text(self) -> str:
        return self._log.read_text()

    def ended(self, seconds: float = 60.0) -> int:
        """Wait for its end. Returns the exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.text}") from None

    def interrupt(self) -> int:
        """Ctrl-C. Returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self.ended()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Hosts:
    """Hosts by name. `folder` takes the output of what runs on them.

    Raises:
        NoHosts: not on this machine.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self.addresses = {name: f"10.0.0.{number}" for number, name in enumerate(names, 1)}
        self._folder, self._started = folder, list[Process]()
        self._spaces = [SWITCH, *(PREFIX + name for name in names)]
        for space in spaces():
            if not Path("/proc", space.removeprefix("shoal").partition("-")[0]).exists():
                _remove(space)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for space in self._spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", SWITCH, "type", "bridge")
        ip("-n", SWITCH, "link", "set", SWITCH, "up")
        for name, address in self.addresses.items():
            space = PREFIX + name
            ip("-n", SWITCH, "link", "add", f"{space}p", "type", "veth", "peer", "name", f"{space}e", "netns", space)
            ip("-n", SWITCH, "link", "set", f"{space}p", "master", SWITCH, "up")
            ip("-n", space, "address", "add", f"{address}/24", "dev", f"{space}e")
            ip("-n", space, "link", "set", f"{space}e", "up")

    def cut(self, name: str) -> None:
        """Pull the host's plug out of the switch."""
        ip("-n", SWITCH, "link", "set", f"{PREFIX}{name}p", "down")

    def restore(self, name: str) -> None:
        """Put it in again."""
        ip("-n", SWITCH, "link", "set", f"{PREFIX}{name}p", "up")

    def _on(self, name: str, args: Sequence[str]) -> list[str]:
        assert IP is not None
        return [IP, "netns", "exec", PREFIX + name, sys.executable, *args]

    def run(self, name: str, *args: str) -> subprocess.CompletedProcess[str]:
        """`python ARGS` on a host, to its end."""
        return subprocess.run(self._on(name, args), capture_output=True, text=True, timeout=30, cwd=self._folder)

    def start(self, name: str, *args: str, **env: str) -> Process:
        """`python ARGS` on a host; it goes on by itself."""
        log = self._folder / f"{name}.log"
        self._started.append(
            Process(self._on(name, args), log, {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | env)
        )
        return self._started[-1]

    def close(self) -> None:
        """End what runs, remove the hosts. Can be called at any time, and twice."""
        for process in self._started:
            process.kill()
        for space in spaces(PREFIX):
            _remove(space)


def spaces(prefix: str = "shoal") -> list[str]:
    """The namespaces of our runs, by name."""
    found = [line.split()[0] for line in ip("netns", "list").splitlines()] if IP else []
    return [name for name in found if re.fullmatch(r"shoal[0-9]+-\w+", name) and name.startswith(prefix)]


def remains() -> list[str]:
    """What is left of this run on this machine: namespaces, bridges, links."""
    return spaces(PREFIX) + [name for name in os.listdir("/sys/class/net") if name.startswith(PREFIX)]


def _remove(space: str) -> None:
    """End what runs in a namespace, children of children too, and remove it."""

    def ended() -> bool:
        found = ip("netns", "pids", space).split()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return not found

    until(ended, 10, f"the processes in {space} end")
    ip("netns", "delete", space)


@contextmanager
def hosts_of(names: Sequence[str], folder: Path) -> Iterator[Hosts]:
    """Hosts for the time of a block; nothing of them remains."""
    hosts = Hosts(names, folder)
    try:
        yield hosts
    finally:
        hosts.close()
    assert not remains()
