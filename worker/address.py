"""Is there such a host? Asked before a connection is tried, which would be tried for long."""

from __future__ import annotations

import socket

from ..protocol.errors import NoServerError
from ..protocol.join import JoinAddress


def check_resolves(address: JoinAddress) -> None:
    """
    Raises:
        NoServerError: the host's name is not known here.
    """
    try:
        socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NoServerError(
            f"the name {address.host!r} does not resolve: {getattr(error, 'strerror', '') or error}",
            cause="a typing mistake, or a name that only the server's network knows",
            hint="the server's IP address instead",
        ) from None
