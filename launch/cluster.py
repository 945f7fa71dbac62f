"""`LocalCluster`: real server processes on this machine, for notebooks and tests (DESIGN §8)."""

from __future__ import annotations

import logging
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

    Raises:
        ConfigError: a setting that is wrong. NoServerError: a process did not start.
    """

    def __init__(self, **settings: Any) -> None:
        given = {"port": 0} | settings
        self._servers = Servers(settle(SERVER, given, "server"), log=relay)

    @property
    def join(self) -> str:
        """The join string, as `shoal server` prints it."""
        return self._servers.join

    @property
    def pids(self) -> dict[str, Any]:
        """Process ids by role: `{"coordinator": …, "shards": […]}`."""
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
        """End the processes. Again changes nothing."""
        self._servers.close()

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
