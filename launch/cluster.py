"""`LocalCluster`: real server processes on this machine, for notebooks and tests (DESIGN §8)."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

from .inquiry import inquire
from .mode import change
from .servers import Servers
from .settings import SERVER, settle

logger = logging.getLogger("shoal.server")


class LocalCluster:
    """A coordinator and shards on loopback; a context manager.

    Args:
        settings: what `shoal server` takes, by the same words: shards, mode, staleness, lease, min_workers, state_dir, …
            Without `state_dir` models and tasks are kept in a temporary folder, and end with the cluster.

    Raises:
        ConfigError: a setting that is wrong. NoServerError: a process did not start.
    """

    def __init__(self, **settings: Any) -> None:
        settled = settle(SERVER, {"port": 0} | settings, "server")
        self._folder = None if settled["state_dir"] else tempfile.TemporaryDirectory(prefix="shoal-")
        if self._folder is not None:
            settled["state_dir"] = self._folder.name
        try:
            self._servers = Servers(settled, log=relay)
        except BaseException:
            self._forget()
            raise

    @property
    def join(self) -> str:
        """The join string, as `shoal server` prints it."""
        return self._servers.join

    @property
    def pids(self) -> dict[str, Any]:
        """Process ids by role: `{"coordinator": …, "shards": […], "dispatcher": …}`."""
        return self._servers.pids

    def status(self) -> dict[str, Any]:
        """What `shoal status --json` prints."""
        return inquire(self._servers.address, "status")

    def switch(self, mode: str, staleness: float | None = None) -> dict[str, Any]:
        """Train on in another mode, as `shoal mode` does. Returns mode, staleness, and the clock from which on.

        Raises:
            ShoalError: the servers refuse, and why.
        """
        return change(self._servers.address, mode, None if staleness is None else str(staleness))

    def close(self) -> None:
        """End the processes, and forget what they kept if no `state_dir` was given. Again changes nothing."""
        self._servers.close()
        self._forget()

    def _forget(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def relay(line: str) -> None:
    """A line that a server process logged, into this process's logging."""
    level, _, text = line.partition(" ")
    number = logging.getLevelName(level.upper())
    if isinstance(number, int):
        logger.log(number, text)
    else:
        logger.error(line)
