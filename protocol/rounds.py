"""What is said in a federated round (SPEC §14.3): one frozen dataclass a message. `RoundMessage` is their union, part of `Message`.

Rules
- As in `messages`: field order is wire order, and `buffers` holds the raw frames beside the header.
- What is in buffers shows in no `repr`: of some it is secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, TypeAlias

from .schema import U32, U63, U64, Flag, Indices, Numbers, Real, Text, integer, listing, string

MAX_MEMBERS = 16_384
MAX_METRICS = 64
NOTHING, READY, APPLIED = range(3)
"""How a session ended at a shard: not at all, with an average that waits to be applied, applied."""
ROUND_CLOSED = "round_closed"
"""The code of a refusal: the session is over, or never was."""

Incarnations = Annotated[tuple[int, ...], listing(integer(0, 2**64 - 1), MAX_MEMBERS)]
Names = Annotated[tuple[str, ...], listing(string(256), MAX_METRICS)]
State = Annotated[int, integer(NOTHING, APPLIED)]
Buffers: TypeAlias = "tuple[bytes | bytearray | memoryview, ...]"


# --- coordinator and worker


@dataclass(frozen=True, slots=True)
class Invite:
    TYPE: ClassVar[int] = 66
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Advertise:
    TYPE: ClassVar[int] = 67
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Roster:
    TYPE: ClassVar[int] = 68
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Deal:
    TYPE: ClassVar[int] = 69
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Relay:
    """It is the client's turn, too."""

    TYPE: ClassVar[int] = 72
    incarnation: U64
    session: U64
    ranks: Indices
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Survivors:
    TYPE: ClassVar[int] = 76
    incarnation: U64
    session: U64
    ranks: Indices


@dataclass(frozen=True, slots=True)
class Consent:
    TYPE: ClassVar[int] = 77
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Consents:
    TYPE: ClassVar[int] = 78
    incarnation: U64
    session: U64
    ranks: Indices
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unmask:
    TYPE: ClassVar[int] = 79
    incarnation: U64
    session: U64
    ranks: Indices
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The client takes no more part. `code` is the name of an error, never its text."""

    TYPE: ClassVar[int] = 84
    incarnation: U64
    session: U64
    code: Text


# --- worker and shard


@dataclass(frozen=True, slots=True)
class Masked:
    """Bytes of the slice from `offset`."""

    TYPE: ClassVar[int] = 73
    incarnation: U64
    shard: U64
    session: U64
    offset: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Kept:
    """The slice is here up to this byte, without a gap."""

    TYPE: ClassVar[int] = 74
    incarnation: U64
    shard: U64
    session: U64
    upto: U64


# --- coordinator and shard


@dataclass(frozen=True, slots=True)
class Recall:
    TYPE: ClassVar[int] = 64
    incarnation: U64
    session: U64


@dataclass(frozen=True, slots=True)
class Recalled:
    TYPE: ClassVar[int] = 65
    incarnation: U64
    session: U64
    last: U64
    state: State
    rounds: U63
    """How many it has applied in this life."""
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Begin:
    TYPE: ClassVar[int] = 70
    incarnation: U64
    session: U64
    index: U32
    """Of the shard, in the plan."""
    members: Incarnations
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ruling:
    """Who may send, who is in the sum and who is out: all there is to know, not what has changed."""

    TYPE: ClassVar[int] = 71
    incarnation: U64
    session: U64
    number: U32
    turns: Indices
    added: Indices
    dropped: Indices


@dataclass(frozen=True, slots=True)
class Arrived:
    """These slices are here, whole; `number` is how many they are."""

    TYPE: ClassVar[int] = 75
    incarnation: U64
    session: U64
    number: U32
    ranks: Indices


@dataclass(frozen=True, slots=True)
class Finish:
    TYPE: ClassVar[int] = 80
    incarnation: U64
    session: U64
    survivors: Indices
    chosen: Indices
    """Of the survivors, those whose updates count; empty: all."""
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Finished:
    TYPE: ClassVar[int] = 81
    incarnation: U64
    session: U64
    right: Flag
    why: Text
    weight: Real
    capped: U64
    clipped: U64
    metrics: Numbers


@dataclass(frozen=True, slots=True)
class Measure:
    """How far are the updates here from each other?"""

    TYPE: ClassVar[int] = 88
    incarnation: U64
    session: U64


@dataclass(frozen=True, slots=True)
class Measured:
    TYPE: ClassVar[int] = 89
    incarnation: U64
    session: U64
    buffers: Buffers = field(repr=False)


# --- to all


@dataclass(frozen=True, slots=True)
class Released:
    """The round is complete."""

    TYPE: ClassVar[int] = 82
    incarnation: U64
    session: U64
    survivors: Indices
    weight: Real
    capped: U64
    clipped: U64
    metrics: Numbers


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The round is over, and nothing of it was applied anywhere."""

    TYPE: ClassVar[int] = 83
    incarnation: U64
    session: U64
    why: Text


@dataclass(frozen=True, slots=True)
class Noted:
    """A message of type `kind` is here; it need not be sent again."""

    TYPE: ClassVar[int] = 85
    incarnation: U64
    session: U64
    kind: U32
    number: U32


# --- between rounds


@dataclass(frozen=True, slots=True)
class Enlist:
    """This worker takes part in rounds, or not any more. It can say these metrics of each."""

    TYPE: ClassVar[int] = 86
    incarnation: U64
    willing: Flag
    metrics: Names


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the rounds are. Of `wanted` rounds 0 are without an end."""

    TYPE: ClassVar[int] = 87
    incarnation: U64
    willing: Flag
    completed: U63
    wanted: U63
    why: Text
    """Why no round is under way; empty if one is."""


RoundMessage: TypeAlias = (
    Recall
    | Recalled
    | Invite
    | Advertise
    | Roster
    | Deal
    | Begin
    | Ruling
    | Relay
    | Masked
    | Kept
    | Arrived
    | Survivors
    | Consent
    | Consents
    | Unmask
    | Finish
    | Finished
    | Measure
    | Measured
    | Released
    | Abandoned
    | Withdraw
    | Noted
)
ONE_BUFFER = (Recalled, Invite, Advertise, Deal, Begin, Relay, Masked, Consent, Consents, Unmask, Measured)
TWO_BUFFERS = (Roster, Finish)
