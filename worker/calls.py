"""What a user's thread asks of the worker's core. Each is an event; the answer comes as `Resolve` or `Fail` of its ticket.

Rules
- A ticket is a number that the client chose; a call without one wants no answer.
- Buffers belong to the core until the ticket has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..protocol.codecs import RAW
from ..protocol.messages import Message
from ..protocol.schema import Buffer, Buffers
from ..protocol.secure.plan import Plan, Policy
from .parley import Input


@dataclass(frozen=True, slots=True)
class OpenCalled:
    """Join. Resolved (None) when every shard has greeted."""

    ticket: int


@dataclass(frozen=True, slots=True)
class RegisterCalled:
    """Register a model and enter the clocks. Resolved with its `Layout`.

    Args:
        source: block number -> its values now; asked only if this worker is to fill a shard.
    """

    ticket: int
    description: bytes
    source: Callable[[int], Buffer]


@dataclass(frozen=True, slots=True)
class Part:
    """What goes to one shard in one message: blocks of it, whole or in ranges (SPEC §7), in a codec (SPEC §12)."""

    shard: int
    blocks: tuple[int, ...]
    ranges: tuple[int, ...]
    buffers: Buffers
    codec: int = RAW


@dataclass(frozen=True, slots=True)
class ShareCalled:
    """Offer a region to the shards of this machine. Resolved when all have answered: by shard, why not, or ""."""

    ticket: int
    region: int
    pid: int
    fd: int
    size: int
    token: bytes


@dataclass(frozen=True, slots=True)
class UnshareCalled:
    """A region is used no more."""

    region: int


@dataclass(frozen=True, slots=True)
class EarlyCalled:
    """Send these blocks of the step that is being made, whole, to the shards that do not have `region`."""

    parts: tuple[Part, ...]
    region: int = 0


@dataclass(frozen=True, slots=True)
class PushCalled:
    """Push, and with `advance` finish the step. Resolved (None) when every shard has applied it.

    Args:
        early: what was sent early of this step is what these parts say; otherwise it does not count.
        region: the region that the parts' buffers lie in, at their blocks' places; 0: anywhere.
    """

    ticket: int
    parts: tuple[Part, ...]
    advance: bool
    examples: float
    hyper: tuple[tuple[float, ...], ...]
    region: int = 0
    early: bool = False


@dataclass(frozen=True, slots=True)
class PullCalled:
    """Read blocks. Resolved with a `Pulled`.

    Args:
        blocks: by shard; an empty tuple means all blocks of that shard.
        held: by shard, the incarnation and version that the caller has all blocks of.
        region: where shards of this machine may write them; 0: nowhere.
        sink: takes each block that comes in a buffer, and the codec that it is in, as it comes, though the pull may fail yet; None:
            the answer has them. Raises ProtocolError for what cannot be decoded.
        codec: what is to travel in; only with a sink.
    """

    ticket: int
    blocks: Mapping[int, tuple[int, ...]]
    held: Mapping[int, tuple[int, int]]
    region: int = 0
    sink: Callable[[int, Buffer, int], None] | None = None
    codec: int = RAW


@dataclass(frozen=True, slots=True)
class Pulled:
    """An answer: the blocks that had changed, unless a region or a sink has them; by shard, incarnation and version of all.

    Args:
        clock, min_clock: the reader's clock, and the least of all, when it was answered.
    """

    blocks: Mapping[int, Buffer]
    versions: Mapping[int, tuple[int, int]]
    clock: int
    min_clock: int


@dataclass(frozen=True, slots=True)
class CutCalled:
    """Read all blocks as they are at one boundary of versions (SPEC §15). Resolved with a `CutMade`.

    Args:
        sink: takes each block; what an attempt that failed has given is given again.
        maker, number: of a cut that another worker has made; 0: make one.
        keep: others will read it: the shards keep it until it is released.
    """

    ticket: int
    sink: Callable[[int, Buffer], None]
    maker: int = 0
    number: int = 0
    keep: bool = False


@dataclass(frozen=True, slots=True)
class CutReleased:
    """Nobody wants this cut any more."""

    maker: int
    number: int


@dataclass(frozen=True, slots=True)
class CutMade:
    """An answer. Of one that another has made, only `maker` and `number` are known.

    Args:
        clocks: by worker's incarnation, below which its steps are in it. closed: below which averaged steps are.
        clock: the least of those counted in. round: federated rounds that are in it.
        versions: by shard, its incarnation and version.
    """

    maker: int
    number: int
    clocks: Mapping[int, int]
    closed: int
    clock: int
    round: int
    versions: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class PauseCalled:
    """Leave the clocks until `ResumeCalled`: this worker has no data for now and must hold nobody up."""


@dataclass(frozen=True, slots=True)
class ResumeCalled:
    """Enter the clocks again. Resolved (None) when that is done."""

    ticket: int


@dataclass(frozen=True, slots=True)
class DeclareCalled:
    """Declare a data set. Resolved with the partition's size, in examples."""

    ticket: int
    job: str
    length: int
    batch: int
    size: int
    seed: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ClaimCalled:
    """Ask for a range of an epoch below `epochs`. Resolved with a `Lease`, None when all are complete, or `Federated`."""

    ticket: int
    job: str
    epochs: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Examples `[start, stop)` of an epoch's order, for the life of `incarnation`."""

    incarnation: int
    number: int
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class DoneCalled:
    """`done` examples of a lease are processed; told to the coordinator once everything pushed so far is acknowledged.

    Args:
        over: this worker does no more of it; what is left is free again.
    """

    lease: Lease
    done: int
    over: bool


@dataclass(frozen=True, slots=True)
class AskCalled:
    """Ask the coordinator what `make(incarnation, request)` says. Resolved with the message that answers it."""

    ticket: int
    make: Callable[[int, int], Message]


@dataclass(frozen=True, slots=True)
class LogCalled:
    """Named numbers, for status and report."""

    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CloseCalled:
    """Say goodbye. Resolved (None) when the coordinator knows; then the core wants nothing more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Federated:
    """In place of a lease: the cluster makes federated rounds now, and data stay where they are."""


@dataclass(frozen=True, slots=True)
class EnlistCalled:
    """Take part in federated rounds. Resolved with how many are complete, when the coordinator knows of this worker.

    Args:
        policy: what this worker demands of each. metrics: names of what it can say of each.
    """

    ticket: int
    policy: Policy
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NextCalled:
    """Wait for a round. Resolved with a `RoundBegun`, or with a `NoRound`.

    Args:
        until: when so many are complete nobody waits any more; None: as many as the cluster makes.
    """

    ticket: int
    until: int | None


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """An answer: pull, train, then `TrainedCalled` or `DeclineCalled`."""

    session: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class NoRound:
    """An answer: there is no other.

    Args:
        over: are as many complete as were wanted? If not, the mode has changed.
    """

    over: bool


@dataclass(frozen=True, slots=True)
class TrainedCalled:
    """Put this into a round. Resolved with the `Over` of its session; fails if it takes nothing more."""

    ticket: int
    session: int
    given: Input


@dataclass(frozen=True, slots=True)
class DeclineCalled:
    """Nothing will be put into this session."""

    session: int
    why: str


@dataclass(frozen=True, slots=True)
class RetireCalled:
    """Take part in no more rounds."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this ticket any more."""

    ticket: int


Call: TypeAlias = (
    OpenCalled
    | RegisterCalled
    | ShareCalled
    | UnshareCalled
    | EarlyCalled
    | PushCalled
    | PullCalled
    | CutCalled
    | CutReleased
    | PauseCalled
    | ResumeCalled
    | DeclareCalled
    | ClaimCalled
    | DoneCalled
    | AskCalled
    | LogCalled
    | CloseCalled
    | Cancelled
    | EnlistCalled
    | NextCalled
    | TrainedCalled
    | DeclineCalled
    | RetireCalled
)
