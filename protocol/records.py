"""Records inside messages (SPEC §7): a field of theirs that repeats, with fields of its own.

Rules
- A record is an array on the wire, in field order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .schema import U32, U63, U64, Flag, Real, Text, records


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard is. `key` is its CURVE public key in base64url, or empty."""

    index: U32
    incarnation: U64
    host: Text
    port: U32
    key: Text


@dataclass(frozen=True, slots=True)
class Member:
    """A worker in a view. One that has registered may be counted in at any shard (SPEC §6.1.5)."""

    incarnation: U64
    name: Text
    registered: Flag


@dataclass(frozen=True, slots=True)
class Phase:
    """From `clock` on steps are made so (SPEC §6.5)."""

    clock: U63
    mode: Text
    staleness: Real


Places = Annotated[tuple[Place, ...], records(Place, 1024)]
Members = Annotated[tuple[Member, ...], records(Member, 16_384)]
Phases = Annotated[tuple[Phase, ...], records(Phase, 2)]
