"""How clients and executors find the dispatcher: they ask the coordinator, and ask again when the connection breaks (SPEC §16.2).

Rules
- Part of a core: it takes events and says effects, and has no clock.
- Where the coordinator has keys the dispatcher has, or is not talked to.
"""

from __future__ import annotations

import json
from math import inf

from ..protocol.asking import Answer, Inquire
from ..protocol.effects import COORDINATOR, Denied, Effect, Linked, Open, Received, Send, Unlinked
from ..protocol.errors import AuthError, NoServerError, ServerLost, VersionError, WaitTimeout
from ..protocol.join import bracket
from ..protocol.messages import Refused
from ..protocol.records import Place

DISPATCHER = 0
"""Its peer index, for clients and executors."""
RETRY = 1.0
SILENT = 5.0
"""Seconds without a connection after which a dispatcher is said to be gone."""


class Finder:
    """Of one client or executor.

    Args:
        coordinator: where it is, with its key.
    """

    def __init__(self, coordinator: Place) -> None:
        self._coordinator = coordinator
        self._opened = False
        self._reached = False
        self._place: tuple[str, int, str] | None = None
        self.linked = False
        self.error: Exception | None = None
        """Why there is no use in going on."""
        self._ask_at = -inf
        self._request = 0
        self._missed_since = 0.0

    @property
    def wake_at(self) -> float:
        return self._ask_at if self._reached and not self.linked else inf

    def handle(self, event: object, now: float) -> list[Effect]:
        """What there is to do about an event; any event will do. Afterwards `linked` says whether the dispatcher is there."""
        out: list[Effect] = []
        if not self._opened:
            self._opened, self._missed_since = True, now
            place = self._coordinator
            out.append(Open(COORDINATOR, place.host, place.port, place.key))
        match event:
            case Linked(peer):
                self._reached |= peer == COORDINATOR
                self.linked |= peer == DISPATCHER
                self._ask_at = now if peer == COORDINATOR else self._ask_at
            case Unlinked(peer) if peer == DISPATCHER:
                self.linked, self._missed_since, self._ask_at = False, now, now
            case Denied(peer, why):
                who = "the server" if peer == COORDINATOR else "the dispatcher"
                self.error = AuthError(f"{who} was reached, but {why}", hint="shoal doctor")
            case Received(_, Refused(_, "version", text)):
                self.error = VersionError(text, hint="install the same shoal on both sides")
            case Received(peer, Answer(request, _, buffers)) if peer == COORDINATOR and request == self._request:
                out += self._told(bytes(buffers[0]))
        if not self.linked and self._reached and now >= self._ask_at:
            self._ask_at = now + RETRY
            self._request += 1
            out.append(Send(COORDINATOR, Inquire(self._request, "dispatcher")))
        return out

    def _told(self, answer: bytes) -> list[Effect]:
        found = json.loads(answer)
        if not found or not isinstance(found, dict):
            return []
        place = str(found["host"]), int(found["port"]), str(found["key"])
        if self._coordinator.key and not place[2]:
            self.error = AuthError("the dispatcher has no key, while the cluster has", hint="shoal status")
            return []
        if place == self._place:
            return []
        self._place = place
        return [Open(DISPATCHER, *place)]

    def timed_out(self, seconds: float, now: float, what: str) -> Exception:
        """The error for a wait that has ended at its time-out."""
        where = f"{bracket(self._coordinator.host)}:{self._coordinator.port}"
        if self.error is not None:
            return self.error
        if not self._reached:
            return NoServerError(
                f"no server at {where} after {seconds:g} s",
                cause="the server is not started, or a firewall is between",
                hint="shoal doctor",
            )
        if not self.linked and now - self._missed_since >= min(seconds, SILENT):
            return ServerLost(
                f"the dispatcher of the cluster at {where} is not there", cause="its process ended", hint="shoal status"
            )
        return WaitTimeout(f"not done after {seconds:g} s: {what}", hint="a longer timeout, or `shoal tasks ls`")
