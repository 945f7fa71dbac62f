"""What a core hears and what it may ask of its loop.

Rules
- A core has one mutating method, `handle(event, now) -> list[Effect]`, and a property `wake_at`: the time of the next `Tick`
  that it wants (`inf`: none). `now` is in seconds, monotonic, and may be virtual.
- Effects are performed in the order given.
- A peer is a routing id (a server's view of a worker) or an index (a worker's view of the servers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from .messages import Message, Share

Peer: TypeAlias = "bytes | int"

COORDINATOR = -1
"""The peer index of the coordinator, for shards and workers. Shards are 0, 1, …"""


@dataclass(frozen=True, slots=True)
class Received:
    """A message came in. It is well formed; whether it makes sense is for the core to say."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message came in that could not be decoded, or a connection that was refused. `reason` is the counter (SPEC §2.2)."""

    peer: Peer
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Linked:
    """A connection to `peer` was made, for the first time or anew. What was on the old one may be lost."""

    peer: int


@dataclass(frozen=True, slots=True)
class Unlinked:
    """The connection to `peer` broke."""

    peer: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The server at `peer` was reached and refused the handshake. `why` says which key is at fault (SPEC §10.4)."""

    peer: int
    why: str


@dataclass(frozen=True, slots=True)
class Send:
    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class Stream:
    """Send these, each made when the peer has taken the one before it; other events may come in between."""

    peer: Peer
    messages: Iterator[Message]


@dataclass(frozen=True, slots=True)
class Open:
    """Connect to a server; a connection under the same index is closed first. `key` is base64url or empty."""

    peer: int
    host: str
    port: int
    key: str


@dataclass(frozen=True, slots=True)
class Resolve:
    """The call that holds this ticket has its answer."""

    ticket: int
    value: Any


@dataclass(frozen=True, slots=True)
class Fail:
    """The call that holds this ticket ends with an error."""

    ticket: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Log:
    """`level` is a name of the logging module's."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The loop ends; `error` says why if it is not the plain end."""

    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """Open the region that `peer` offers. The loop answers with `Attached`."""

    peer: Peer
    offer: Share


@dataclass(frozen=True, slots=True)
class Attached:
    """A region was opened, or was not, for the reason `why`. `memory` is all of it, writable."""

    peer: Peer
    offer: Share
    memory: memoryview | None
    why: str = ""


Effect: TypeAlias = "Send | Stream | Open | Resolve | Fail | Log | Stop | Attach"
