"""The first 64 bytes of a ZeroMQ connection (ZMTP 3, RFC 23): who is there, and does it ask for keys?

Rules
- We send no mechanism of our own: the side that sees a mismatch hangs up, and its own greeting may be lost with it.
- Asked only when a handshake has failed and nobody said why, or by `shoal doctor`. Never on the way of a message.
"""

from __future__ import annotations

import socket

NOT_ZMTP = "?"
_SIZE = 64


def mechanism(host: str, port: int, seconds: float) -> tuple[str, str]:
    """Greet a server and read its greeting.

    Args:
        seconds: for connecting, and for each wait after.

    Returns:
        The security mechanism (`"NULL"`, `"CURVE"`) and the version of ZMTP (`"3.1"`). `NOT_ZMTP` and nothing if what listens
        there says something else; two empty strings if it says nothing, or cannot be reached.
    """
    theirs = b""
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.settimeout(seconds)
            connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01")  # the signature and the version
            while len(theirs) < _SIZE and (more := connection.recv(_SIZE - len(theirs))):
                theirs += more
    except OSError:
        pass
    if len(theirs) < 32 or theirs[0] != 0xFF or theirs[9] != 0x7F:
        return (NOT_ZMTP if theirs else ""), ""
    return theirs[12:32].rstrip(b"\0").decode("ascii", "replace"), f"{theirs[10]}.{theirs[11]}"
