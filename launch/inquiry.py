"""Asking a server a question without joining: what `shoal status` and `doctor` do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..protocol.asking import Answer, Echo, Echoed, Inquire, Switch, Switched
from ..protocol.effects import COORDINATOR, Denied, Linked, Open, Received
from ..protocol.errors import AuthError, NoServerError, VersionError
from ..protocol.join import JoinAddress, key_text, read_key
from ..protocol.messages import Message, Refused
from ..worker.wires import Wires

TIMEOUT = 5.0
AGAIN = 1.0
"""Seconds after which a request for a change is repeated."""


class Inquiry:
    """One connection to one server; a context manager. Not for several threads."""

    def __init__(self, address: JoinAddress) -> None:
        self._address = address
        self._wires = Wires(address.secret)
        self._linked = False
        self._request = 0
        key = key_text(address.server_key) if address.server_key else ""
        self._wires.open(Open(COORDINATOR, address.host, address.port, key))

    def connect(self, timeout: float = TIMEOUT) -> None:
        """Wait for the handshake.

        Raises:
            AuthError: the keys do not fit. NoServerError: no handshake in time.
        """
        self._until(lambda message: False, timeout, linked=True)

    def ask(self, what: str, timeout: float = TIMEOUT) -> tuple[dict[str, Any], float]:
        """A question. Returns (the answer, the answerer's clock in seconds since 1970)."""
        answer = self._exchange(lambda request: Inquire(request, what), timeout)
        assert isinstance(answer, Answer)
        return json.loads(bytes(answer.buffers[0])), answer.wall

    def echo(self, payload: bytes, timeout: float = TIMEOUT) -> None:
        """Send bytes there and back."""
        self._exchange(lambda request: Echo(request, (payload,)), timeout)

    def switch(self, mode: str, staleness: float, timeout: float) -> Switched | Refused:
        """Another mode, please; said again each second, for a request may be lost with a connection."""
        deadline = time.monotonic() + timeout
        if not self._linked:
            self.connect(timeout)
        self._request += 1
        request = self._request
        while True:
            self._wires.send(COORDINATOR, Switch(request, mode, staleness))
            again = time.monotonic() + AGAIN
            last = again >= deadline
            try:
                answer: Switched | Refused = self._until(
                    lambda message: isinstance(message, Switched | Refused) and message.request == request, AGAIN
                )
            except NoServerError:
                if last:
                    raise
                continue
            if isinstance(answer, Switched) or answer.code != "early" or last:
                return answer
            time.sleep(max(0.0, again - time.monotonic()))  # shards say once a second how far they are

    def _exchange(self, make: Callable[[int], Message], timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        if not self._linked:
            self.connect(timeout)
        self._request += 1
        request = self._request
        self._wires.send(COORDINATOR, make(request))
        return self._until(
            lambda message: isinstance(message, Answer | Echoed) and message.request == request,
            deadline - time.monotonic(),
        )

    def _until(self, wanted: Any, timeout: float, linked: bool = False) -> Any:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                state = "is connected but does not answer" if self._linked else "cannot be reached"
                raise NoServerError(
                    f"the server at {self._address.address} {state} (waited {timeout:.3g} s)",
                    cause="it is not started, or a firewall is between",
                    hint="shoal doctor",
                )
            self._wires.flush()
            for event in self._wires.events(self._wires.poller.poll(int(min(left, 0.2) * 1000))):
                match event:
                    case Linked():
                        self._linked = True
                        if linked:
                            return None
                    case Denied(_, why):
                        raise AuthError(
                            f"the server at {self._address.address} was reached, but {why}", hint="shoal doctor"
                        )
                    case Received(_, Refused(_, "version", text)):
                        raise VersionError(text)
                    case Received(_, message) if wanted(message):
                        return message

    def close(self) -> None:
        self._wires.close()

    def __enter__(self) -> Inquiry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tasks_of(address: JoinAddress, timeout: float = TIMEOUT) -> dict[str, Any] | None:
    """How the cluster's dispatcher is; None where there is none that answers."""
    place = inquire(address, "dispatcher", timeout)
    if not place or (address.server_key and not place.get("key")):
        return None
    key = read_key(place["key"], "dispatcher's key") if place["key"] else b""
    there = replace(address, host=str(place["host"]), port=int(place["port"]), server_key=key)
    try:
        return inquire(there, "status", timeout)
    except NoServerError:
        return None


def inquire(address: JoinAddress, what: str, timeout: float = TIMEOUT) -> dict[str, Any]:
    """One question, one answer.

    Raises:
        NoServerError, AuthError, VersionError: as they say.
    """
    with Inquiry(address) as inquiry:
        return inquiry.ask(what, timeout)[0]
