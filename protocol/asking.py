"""What somebody who does not train asks servers (SPEC §7): how they are, how far, and for another mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .schema import U63, U64, Buffers, Real, Text


@dataclass(frozen=True, slots=True)
class Inquire:
    TYPE: ClassVar[int] = 60
    request: U64
    what: Text


@dataclass(frozen=True, slots=True)
class Answer:
    """`wall` is the answerer's clock, seconds since 1970. The buffer is JSON, UTF-8."""

    TYPE: ClassVar[int] = 61
    request: U64
    wall: Real
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Echo:
    TYPE: ClassVar[int] = 62
    request: U64
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Echoed:
    TYPE: ClassVar[int] = 63
    request: U64
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Switch:
    """Train in this mode from some clock on (SPEC §6.5)."""

    TYPE: ClassVar[int] = 57
    request: U64
    mode: Text
    staleness: Real


@dataclass(frozen=True, slots=True)
class Switched:
    """Steps from `clock` on are made so."""

    TYPE: ClassVar[int] = 58
    request: U64
    clock: U63
    mode: Text
    staleness: Real
