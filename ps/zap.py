"""Who may connect: the ZAP handler (RFC 27) behind CURVE (SPEC §10.1).

Rules
- Keys on the list are let in, and nothing else: no other domain, no other mechanism.
- It is bound before the socket that it guards, in a context of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import zmq
from zmq.utils import z85

DOMAIN = b"shoal"


class Zap:
    """Answers the handshakes of one context.

    Args:
        allowed: raw 32-byte CURVE public keys, by name of who holds them.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Iterable[tuple[str, bytes]]) -> None:
        self._allowed = {key: name for name, key in allowed}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        """Answer the handshakes that wait."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._verdict(frames))

    def _verdict(self, frames: list[bytes]) -> list[bytes]:
        if len(frames) != 7:
            return [b"1.0", frames[1] if len(frames) > 1 else b"", b"500", b"malformed", b"", b""]
        version, request, domain, _address, _identity, mechanism, key = frames
        name = self._allowed.get(key) if (version, domain, mechanism) == (b"1.0", DOMAIN, b"CURVE") else None
        if name is None:
            return [version, request, b"400", b"this key is not on the list", b"", b""]
        return [version, request, b"200", b"", name.encode(), b""]

    def close(self) -> None:
        self.socket.close(0)


def secure(socket: zmq.Socket[bytes], secret: bytes) -> None:
    """Make a socket that is about to be bound demand CURVE and ask the handler."""
    socket.curve_server = True
    socket.curve_secretkey = z85.encode(secret)
    socket.zap_domain = DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
