"""What a worker's half of a round is told, and what it asks for (SPEC §14): `round` decides, `federation` carries it out.

Rules
- Frozen, and light to import: who never federates pays for no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..protocol.effects import Linked, Received, Send, Tick
from ..protocol.errors import ShoalError
from ..protocol.rounds import Abandoned, Consents, Invite, Noted, Relay, Released, Roster, Survivors
from ..protocol.secure.plan import Plan

if TYPE_CHECKING:
    from ..protocol.secure.noise import Array


@dataclass(frozen=True)
class Input:
    """What a client puts into a round.

    Attributes:
        update: its new weights less those that it was given: float32 or float64, one-dimensional, in the plan's order.
        weight: how much it counts, such as its number of examples. metrics: by name, those that the plan asks for.
        model: the digest of the weights that it was given, as it computed it.
    """

    update: Array
    weight: float
    metrics: Mapping[str, float]
    model: bytes

    def __repr__(self) -> str:
        return f"Input({len(self.update)} elements)"


@dataclass(frozen=True, slots=True)
class Trained:
    """Event: the training of this session is over."""

    session: int
    given: Input


@dataclass(frozen=True, slots=True)
class Shards:
    """Event: the lives of the shards, by index."""

    incarnations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """Event: this worker was evicted, or its coordinator has a new life."""

    why: str


@dataclass(frozen=True, slots=True)
class Declined:
    """Event: nothing will be put into this session."""

    session: int
    why: str


@dataclass(frozen=True, slots=True)
class Invited:
    """Effect: a round begins. Pull, train as the plan says, then `Trained`."""

    session: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class Remember:
    """Effect: write down that shares were given for this round, or that it is complete, before what follows is done."""

    run: int
    round: int


@dataclass(frozen=True, slots=True)
class Result:
    """Of a round that this client was part of.

    Attributes:
        survivors: how many. weight: the sum of their relative weights. metrics: averages.
        capped: of how many the weight was cut off. clipped: elements of all updates that were.
    """

    survivors: int
    weight: float
    metrics: Mapping[str, float]
    capped: int
    clipped: int


@dataclass(frozen=True, slots=True)
class Over:
    """Effect: a session has ended.

    Attributes:
        plan: None if it could not be read. result: None if there is an error.
        released: were shares given?
        spent: was all of the input sent? Others may have opened the sum that it is in; it MUST NOT be put into another session.
        abandoned: did it end for everybody, without a sum?
    """

    session: int
    plan: Plan | None
    result: Result | None
    error: ShoalError | None
    released: bool
    spent: bool
    abandoned: bool = False


RoundEvent: TypeAlias = Received | Linked | Tick | Trained | Declined | Shards | Lost
RoundEffect: TypeAlias = Send | Invited | Remember | Over


KINDS = frozenset({Invite, Released, Abandoned, Noted, Roster, Relay, Survivors, Consents})
"""What the coordinator says. A shard says `Kept`, and both `Refused`."""
