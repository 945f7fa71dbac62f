"""Where the dispatcher is, as the coordinator remembers it (SPEC §16.2)."""

from __future__ import annotations

from math import inf
from typing import Any

from ..protocol.join import is_name
from ..protocol.tasking import Host

SILENT = 5.0
"""Seconds after which one that says nothing is not there."""


class Hosted:
    """The last one that has spoken."""

    def __init__(self) -> None:
        self._last: Host | None = None
        self._heard_at = -inf

    def heard(self, message: Host, now: float) -> None:
        """It is there. One that no address can be made of is not."""
        if is_name(message.host) and 1 <= message.port <= 65535:
            self._last, self._heard_at = message, now

    def place(self, now: float) -> dict[str, Any]:
        """Host, port and key; empty where there is none."""
        if self._last is None or now - self._heard_at >= SILENT:
            return {}
        return {"host": self._last.host, "port": self._last.port, "key": self._last.key}
