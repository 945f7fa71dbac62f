"""The messages by which a worker reads all parameters as they are at one boundary of versions (SPEC §15).

Rules
- A cut is named by its maker's incarnation and a number that this incarnation gives once. Whoever knows both may read it.
- Nothing here changes a weight: what is repeated, late or lost costs time and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .schema import U63, U64, Buffers, Indices, Marks, Text


@dataclass(frozen=True, slots=True)
class Freeze:
    """Say how far every stream is, and apply no later step for now."""

    TYPE: ClassVar[int] = 90
    incarnation: U64
    shard: U64
    cut: U64


@dataclass(frozen=True, slots=True)
class Frozen:
    """By worker, the first clock of which nothing is in the weights; one more where a part of a step is."""

    TYPE: ClassVar[int] = 91
    incarnation: U64
    shard: U64
    cut: U64
    closed: U63
    """Steps below it that are averaged, are in the weights."""
    reached: Marks


@dataclass(frozen=True, slots=True)
class Settle:
    """Apply every worker's steps below these clocks and none above; keep the values, and go on."""

    TYPE: ClassVar[int] = 92
    incarnation: U64
    shard: U64
    cut: U64
    closed: U63
    reached: Marks


@dataclass(frozen=True, slots=True)
class CutKept:
    """The values are kept."""

    TYPE: ClassVar[int] = 93
    incarnation: U64
    shard: U64
    cut: U64
    closed: U63
    min_clock: U63
    round: U63
    """The last federated round that was applied in this life of the shard, counted from 1; 0: none."""
    version: U64


@dataclass(frozen=True, slots=True)
class Take:
    """Send these blocks of a cut."""

    TYPE: ClassVar[int] = 94
    incarnation: U64
    shard: U64
    maker: U64
    cut: U64
    blocks: Indices


@dataclass(frozen=True, slots=True)
class Piece:
    TYPE: ClassVar[int] = 95
    incarnation: U64
    shard: U64
    maker: U64
    cut: U64
    blocks: Indices
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody wants the cut any more."""

    TYPE: ClassVar[int] = 96
    incarnation: U64
    shard: U64
    maker: U64
    cut: U64


@dataclass(frozen=True, slots=True)
class NoCut:
    """There is no such cut here, or there will be none."""

    TYPE: ClassVar[int] = 97
    incarnation: U64
    shard: U64
    maker: U64
    cut: U64
    why: Text


CutMessage: TypeAlias = Freeze | Frozen | Settle | CutKept | Take | Piece | Release | NoCut
