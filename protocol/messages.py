"""Everything that can be said, one frozen dataclass a message (SPEC §7). `Message` is their union.

Rules
- Field order is wire order. `buffers` is not in the header: it holds the raw frames beside it.
- A message says nothing about sockets, time or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from .asking import Answer, Echo, Echoed, Inquire, Switch, Switched
from .cuts import CutMessage
from .evaluating import EvaluationMessage
from .records import Member as Member
from .records import Members, Phases, Places
from .records import Phase as Phase
from .records import Place as Place
from .rounds import Enlist, Progress, RoundMessage
from .schema import (
    I64,
    U32,
    U63,
    U64,
    Buffers,
    Flag,
    Hyper,
    Indices,
    LongText,
    Marks,
    Numbers,
    PullCodec,
    PushCodec,
    Real,
    Refusals,
    Requests,
    Text,
)
from .tasking import TaskMessage

# --- answers that any request may get


@dataclass(frozen=True, slots=True)
class Refused:
    """Its shape is the same in every version of the protocol (SPEC §2.4)."""

    TYPE: ClassVar[int] = 1
    request: U64
    code: Text
    text: LongText


@dataclass(frozen=True, slots=True)
class Waiting:
    TYPE: ClassVar[int] = 2
    request: U64
    joined: U32
    wanted: U32
    what: Text


# --- worker and coordinator: membership (SPEC §3)


@dataclass(frozen=True, slots=True)
class Join:
    TYPE: ClassVar[int] = 10
    incarnation: U64
    name: Text
    attempt: U32
    host: Text
    pid: U32


@dataclass(frozen=True, slots=True)
class Welcome:
    TYPE: ClassVar[int] = 11
    incarnation: U64
    run: U64
    worker: U32
    epoch: U64
    lease: Real
    phases: Phases
    nonfinite: Text
    shards: Places


@dataclass(frozen=True, slots=True)
class Renew:
    TYPE: ClassVar[int] = 12
    incarnation: U64
    epoch: U64
    clock: U63
    entered: Flag
    stats: Numbers
    logged: Numbers
    progress: Marks


@dataclass(frozen=True, slots=True)
class Renewed:
    TYPE: ClassVar[int] = 13
    incarnation: U64
    epoch: U64


@dataclass(frozen=True, slots=True)
class Evicted:
    TYPE: ClassVar[int] = 14
    incarnation: U64


@dataclass(frozen=True, slots=True)
class Cluster:
    """The shards have changed, or this worker is asked to fill some."""

    TYPE: ClassVar[int] = 15
    incarnation: U64
    epoch: U64
    shards: Places
    phases: Phases
    fill: Indices


@dataclass(frozen=True, slots=True)
class Leave:
    TYPE: ClassVar[int] = 16
    incarnation: U64
    request: U64
    stats: Numbers
    logged: Numbers
    progress: Marks


@dataclass(frozen=True, slots=True)
class Left:
    TYPE: ClassVar[int] = 17
    incarnation: U64
    request: U64


# --- worker and coordinator: the model (SPEC §4.3) and the data (SPEC §9)


@dataclass(frozen=True, slots=True)
class Register:
    TYPE: ClassVar[int] = 20
    incarnation: U64
    request: U64
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Registered:
    TYPE: ClassVar[int] = 21
    incarnation: U64
    request: U64
    shards: U32
    block_bytes: U32
    digest: Text


@dataclass(frozen=True, slots=True)
class Declare:
    TYPE: ClassVar[int] = 22
    incarnation: U64
    request: U64
    job: Text
    length: U64
    batch: U32
    size: U64
    seed: U64
    epoch: U32


@dataclass(frozen=True, slots=True)
class Declared:
    TYPE: ClassVar[int] = 23
    incarnation: U64
    request: U64
    size: U64


@dataclass(frozen=True, slots=True)
class Claim:
    TYPE: ClassVar[int] = 24
    incarnation: U64
    request: U64
    job: Text
    epochs: U32


@dataclass(frozen=True, slots=True)
class Leased:
    TYPE: ClassVar[int] = 25
    incarnation: U64
    request: U64
    lease: U64
    epoch: U32
    start: U64
    stop: U64
    oldest: U32
    """The first epoch of which something is left to do."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    TYPE: ClassVar[int] = 26
    incarnation: U64
    request: U64


@dataclass(frozen=True, slots=True)
class Complete:
    TYPE: ClassVar[int] = 27
    incarnation: U64
    request: U64
    lease: U64
    done: U64


@dataclass(frozen=True, slots=True)
class Completed:
    TYPE: ClassVar[int] = 28
    incarnation: U64
    request: U64


# --- shard and coordinator (SPEC §3.1, §3.2)


@dataclass(frozen=True, slots=True)
class ShardJoin:
    TYPE: ClassVar[int] = 30
    incarnation: U64
    host: Text
    port: U32
    key: Text
    index: I64
    shards: U32
    digest: Text
    phases: Phases
    """None before the first view; else of its last, for a coordinator that was restarted."""


@dataclass(frozen=True, slots=True)
class ShardWelcome:
    TYPE: ClassVar[int] = 31
    incarnation: U64
    run: U64
    index: U32
    lease: Real


@dataclass(frozen=True, slots=True)
class View:
    TYPE: ClassVar[int] = 32
    run: U64
    epoch: U64
    phases: Phases
    held: Flag
    """Apply no step that nobody has begun here yet: another phase is being agreed on (SPEC §6.5)."""
    filler: U64
    quorum: U32
    members: Members


@dataclass(frozen=True, slots=True)
class Model:
    TYPE: ClassVar[int] = 33
    run: U64
    shards: U32
    block_bytes: U32
    digest: Text
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Report:
    TYPE: ClassVar[int] = 34
    incarnation: U64
    run: U64
    epoch: U64
    digest: Text
    filled: Flag
    opened: Flag
    floor: U64
    held: Flag
    highest: U63
    """The highest clock that anybody has reached here; that will stay so while `held`."""
    clocks: Marks
    counters: Numbers


# --- worker and shard: getting to know each other (SPEC §3.1, §3.2)


@dataclass(frozen=True, slots=True)
class Hello:
    TYPE: ClassVar[int] = 40
    incarnation: U64
    run: U64
    epoch: U64


@dataclass(frozen=True, slots=True)
class Greeting:
    TYPE: ClassVar[int] = 41
    incarnation: U64
    shard: U64
    index: U32


@dataclass(frozen=True, slots=True)
class Stranger:
    TYPE: ClassVar[int] = 42
    incarnation: U64
    shard: U64


# --- worker and shard: the stream (SPEC §5)


@dataclass(frozen=True, slots=True)
class Enter:
    TYPE: ClassVar[int] = 43
    incarnation: U64
    shard: U64
    seq: U64
    clock: U63
    """The worker's own; it is counted in at the least of all."""


@dataclass(frozen=True, slots=True)
class Fill:
    TYPE: ClassVar[int] = 45
    incarnation: U64
    shard: U64
    seq: U64
    epoch: U64
    blocks: Indices
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Start:
    TYPE: ClassVar[int] = 46
    incarnation: U64
    shard: U64
    seq: U64
    clock: U63


@dataclass(frozen=True, slots=True)
class Push:
    TYPE: ClassVar[int] = 47
    incarnation: U64
    shard: U64
    seq: U64
    clock: U63
    advance: Flag
    examples: Real
    hyper: Hyper
    region: U32
    """Where the gradients are; 0: in the buffers."""
    codec: PushCodec
    """In what form they are in the buffers (SPEC §12)."""
    blocks: Indices
    ranges: Indices
    held: Flag
    """Without `advance`: keep this until the step ends. With it: what is kept counts; otherwise it is dropped."""
    seen: U64
    """The version of this shard that the gradients were computed on; 0: none that is known (SPEC §13.1)."""
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Pause:
    TYPE: ClassVar[int] = 48
    incarnation: U64
    shard: U64
    seq: U64
    clock: U63


@dataclass(frozen=True, slots=True)
class Ack:
    TYPE: ClassVar[int] = 49
    incarnation: U64
    shard: U64
    seq: U64
    gap: Flag
    min_clock: U64
    refusals: Refusals


# --- worker and shard: reading (SPEC §6.2, §6.4)


@dataclass(frozen=True, slots=True)
class Pull:
    TYPE: ClassVar[int] = 50
    incarnation: U64
    shard: U64
    request: U64
    clock: U63
    after: U64
    since: U64
    region: U32
    """Where the values are wanted; 0: in buffers."""
    codec: PullCodec
    """In what form they are wanted in buffers (SPEC §12)."""
    blocks: Indices


@dataclass(frozen=True, slots=True)
class Values:
    TYPE: ClassVar[int] = 51
    incarnation: U64
    shard: U64
    request: U64
    part: U32
    parts: U32
    version: U64
    min_clock: U64
    region: U32
    codec: PullCodec
    blocks: Indices
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Probe:
    TYPE: ClassVar[int] = 52
    incarnation: U64
    shard: U64


@dataclass(frozen=True, slots=True)
class Alive:
    TYPE: ClassVar[int] = 53
    incarnation: U64
    shard: U64
    seq: U64
    min_clock: U64
    slowest: Text
    slowest_clock: U64
    filled: Flag
    parked: Requests


# --- worker and shard: sharing memory on one machine (SPEC §11)


@dataclass(frozen=True, slots=True)
class Share:
    """A region is open as file `fd` of process `pid`. The buffer is its token."""

    TYPE: ClassVar[int] = 54
    incarnation: U64
    shard: U64
    region: U32
    pid: U32
    fd: U32
    size: U64
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Shared:
    TYPE: ClassVar[int] = 55
    incarnation: U64
    shard: U64
    region: U32
    accepted: Flag
    why: Text


@dataclass(frozen=True, slots=True)
class Unshare:
    TYPE: ClassVar[int] = 56
    incarnation: U64
    shard: U64
    region: U32


Operation: TypeAlias = Fill | Enter | Start | Push | Pause

Message: TypeAlias = (
    Refused
    | Waiting
    | Join
    | Welcome
    | Renew
    | Renewed
    | Evicted
    | Cluster
    | Leave
    | Left
    | Register
    | Registered
    | Declare
    | Declared
    | Claim
    | Leased
    | Exhausted
    | Complete
    | Completed
    | ShardJoin
    | ShardWelcome
    | View
    | Model
    | Report
    | Hello
    | Greeting
    | Stranger
    | Enter
    | Fill
    | Start
    | Push
    | Pause
    | Ack
    | Pull
    | Values
    | Probe
    | Alive
    | Share
    | Shared
    | Unshare
    | Inquire
    | Answer
    | Echo
    | Echoed
    | Switch
    | Switched
    | RoundMessage
    | Enlist
    | Progress
    | TaskMessage
    | CutMessage
    | EvaluationMessage
)
