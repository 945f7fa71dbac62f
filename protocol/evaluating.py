"""The messages by which workers evaluate a version together, each a part of the held-out data (SPEC §17).

Rules
- A part counts once, with all that its holder measured of it, or not at all.
- All parts of one evaluation are measured on one cut (SPEC §15).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeAlias

from .schema import U32, U63, U64, Numbers, Real, Text, records

LATER, MAKE, DONE = "later", "make", "done"
MOST_RESULTS = 64
"""In one message."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A version's sums over all of a held-out set. `clock` counts rounds where the mode is `federated`."""

    number: U32
    name: Text
    mode: Text
    clock: U63
    examples: U64
    workers: U32
    lost: U32
    seconds: Real
    sums: Numbers


Results = Annotated[tuple[Evaluated, ...], records(Evaluated, MOST_RESULTS)]


@dataclass(frozen=True, slots=True)
class Assess:
    """Give me a part of an evaluation: of the version due at a clock, or of one after the evaluation `after` - 1."""

    TYPE: ClassVar[int] = 180
    incarnation: U64
    request: U64
    name: Text
    length: U64
    size: U64
    due: U63
    after: U32


@dataclass(frozen=True, slots=True)
class Assessed:
    """`make` the cut, ask again `later`, or it is `done`."""

    TYPE: ClassVar[int] = 181
    incarnation: U64
    request: U64
    state: Text
    number: U32


@dataclass(frozen=True, slots=True)
class Apportioned:
    """Examples `[start, stop)` are yours, to be measured on this cut."""

    TYPE: ClassVar[int] = 182
    incarnation: U64
    request: U64
    lease: U64
    maker: U64
    cut: U64
    start: U64
    stop: U64


@dataclass(frozen=True, slots=True)
class Cut:
    """The cut is made; or `why` not."""

    TYPE: ClassVar[int] = 183
    incarnation: U64
    request: U64
    name: Text
    cut: U64
    mode: Text
    clock: U63
    key: Text
    why: Text


@dataclass(frozen=True, slots=True)
class Sums:
    """What was measured of a part; or `why` it was not."""

    TYPE: ClassVar[int] = 184
    incarnation: U64
    request: U64
    lease: U64
    sums: Numbers
    why: Text


@dataclass(frozen=True, slots=True)
class Review:
    """Tell me the results from this number on."""

    TYPE: ClassVar[int] = 185
    incarnation: U64
    request: U64
    since: U32


@dataclass(frozen=True, slots=True)
class Reviewed:
    TYPE: ClassVar[int] = 186
    incarnation: U64
    request: U64
    results: Results


EvaluationMessage: TypeAlias = Assess | Assessed | Apportioned | Cut | Sums | Review | Reviewed
