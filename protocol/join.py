"""The join string: address, server key and credential in one line (SPEC §10.2).

Rules
- It is a secret when it holds one: `repr` and errors never show it whole.
- A string that is wrong says what is wrong with it.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field

from .errors import ConfigError

PREFIX = "shoal1"
SECAGG, CLEAR = "secagg", "clear"
"""Protections of federated rounds: masked, or every update as it is."""
DEFAULT_PORT = 7450
MAX_NAME = 128
"""Bytes of a worker's name, or of a host."""
_HINT = "copy the whole line that `shoal server` printed"


@dataclass(frozen=True, slots=True)
class JoinAddress:
    """Where a coordinator is, and the keys to it: raw 32 bytes each, or empty on loopback and with --insecure.

    Attributes:
        protection: what whoever joins with it demands of federated rounds, unless told otherwise: the operator has said so where
            the address comes from, not over the wire.
    """

    host: str
    port: int
    server_key: bytes = b""
    secret: bytes = field(default=b"", repr=False)
    protection: str = SECAGG

    @property
    def address(self) -> str:
        return f"{bracket(self.host)}:{self.port}"

    def __str__(self) -> str:
        """The join string itself: treat it like a password if it holds a secret."""
        text = f"{PREFIX}:{self.address}"
        if self.server_key:
            text += f":{key_text(self.server_key)}:{key_text(self.secret)}"
        return text if self.protection == SECAGG else f"{text}:{self.protection}"


def read_join(text: str) -> JoinAddress:
    """Parse a join string. A plain `HOST:PORT` or `HOST` is taken as an address without keys.

    Raises:
        ConfigError: it is not a join string; the text says which part is wrong.
    """
    text = text.strip().strip("'\"")
    text = text.removeprefix("SHOAL_JOIN=").strip("'\"")
    if not text:
        raise ConfigError("the join string is empty", hint=_HINT)
    if text.startswith(PREFIX + ":"):
        body = text[len(PREFIX) + 1 :]
    elif re.match(r"shoal\d+:", text):
        raise ConfigError(f"the join string begins with {text.split(':')[0]!r}, not {PREFIX!r}", hint=_HINT)
    else:
        body = text
    host, rest = _split_host(body)
    parts = rest.split(":") if rest else []
    protection = parts.pop() if len(parts) > 1 and parts[-1] == CLEAR else SECAGG
    port = _port(parts[0]) if parts else DEFAULT_PORT
    if len(parts) <= 1:
        return JoinAddress(host, port, protection=protection)
    if len(parts) != 3:
        raise ConfigError(
            f"the join string has {len(parts) + 1} parts after {PREFIX!r}, not 2 or 4",
            cause="it was cut short",
            hint=_HINT,
        )
    return JoinAddress(host, port, read_key(parts[1], "server key"), read_key(parts[2], "secret"), protection)


def key_text(key: bytes) -> str:
    """32 raw bytes as unpadded base64url."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def read_key(text: str, what: str) -> bytes:
    """The 32 raw bytes behind `key_text`.

    Raises:
        ConfigError: not 43 characters of base64url.
    """
    try:
        key = base64.b64decode(text + "=", altchars=b"-_", validate=True)
        if len(key) != 32 or key_text(key) != text:
            raise ValueError
    except (ValueError, binascii.Error):
        raise ConfigError(
            f"the {what} has {len(text)} characters and is not a key", cause="the line was cut or mistyped", hint=_HINT
        ) from None
    return key


def bracket(host: str) -> str:
    """An IPv6 address in brackets, anything else as it is."""
    return f"[{host}]" if ":" in host else host


def _split_host(body: str) -> tuple[str, str]:
    if body.startswith("["):
        host, closed, rest = body[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ConfigError(f"the address {body[:60]!r} has no closing bracket", hint=_HINT)
        rest = rest[1:]
    else:
        host, _, rest = body.partition(":")
    if not host or any(c.isspace() or c in "/@" for c in host):
        raise ConfigError(f"{host[:60]!r} is not a host", hint=_HINT)
    return host, rest


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text) < 65536:
        return int(text)
    raise ConfigError(f"{text[:20]!r} is not a port", hint=_HINT)


def is_name(text: str) -> bool:
    """Can this be the name of a worker or a host? Names reach terminals and logs (SPEC §2.3)."""
    return len(text.encode("utf-8", "replace")) <= MAX_NAME and text.isprintable()
