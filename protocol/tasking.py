"""What is said about tasks and versions of models (SPEC §16): one frozen dataclass a message. `TaskMessage` is their union.

Rules
- As in `messages`: field order is wire order, and `buffers` holds the raw frames beside the header.
- One message carries many tasks, a buffer for each: what costs is the message.
- A client, an executor and a publisher name themselves by an incarnation that they have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeAlias

from .schema import U32, U64, Flag, LongText, Real, Text, integer, listing, pairing, records, string

MOST = 1024
"""Tasks in a message."""
MOST_MODELS = 256

_u64, _u32, _text, _long = integer(0, 2**64 - 1), integer(0, 2**32 - 1), string(256), string(4096)
Texts = Annotated[tuple[str, ...], listing(_text, MOST_MODELS)]
LongTexts = Annotated[tuple[str, ...], listing(_long, MOST)]
TaskNumbers = Annotated[tuple[int, ...], listing(_u64, MOST)]
Items = Annotated[tuple[int, ...], listing(_u32, MOST)]
Failures = Annotated[tuple[tuple[str, str], ...], listing(pairing(_text, _long), MOST_MODELS)]
Buffers: TypeAlias = "tuple[bytes | bytearray | memoryview, ...]"


@dataclass(frozen=True, slots=True)
class Asked:
    """A task. `model`: only its versions, or empty. `items`: inputs in it. The rest as in `tasks.allot.Needs`."""

    number: U64
    kind: Text
    model: Text
    items: U32
    latency: Real
    quality: Real
    privacy: Text
    budget: Real
    deadline: Real


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a task. `code`: empty where its buffer is the output, else why there is none, and `text` says it.

    `identity`: of the version. `seconds`: from its coming to its answer.
    """

    number: U64
    code: Text
    text: LongText
    model: Text
    version: U32
    identity: Text
    executor: Text
    seconds: Real


@dataclass(frozen=True, slots=True)
class Valued:
    """How good an answer was: of whose task, which, and a reward from 0 to 1."""

    owner: U64
    number: U64
    reward: Real


@dataclass(frozen=True, slots=True)
class Recalled:
    """Feedback: at which place in the order of its coming, on whose task, which, a reward, and of which version the answer was.

    `kept`: are inputs and truth remembered?
    """

    place: U64
    owner: U64
    number: U64
    identity: Text
    reward: Real
    kept: Flag


Askeds = Annotated[tuple[Asked, ...], records(Asked, MOST)]
Tolds = Annotated[tuple[Told, ...], records(Told, MOST)]
Valueds = Annotated[tuple[Valued, ...], records(Valued, MOST)]
Recalleds = Annotated[tuple[Recalled, ...], records(Recalled, MOST)]


# --- client and dispatcher


@dataclass(frozen=True, slots=True)
class Submit:
    TYPE: ClassVar[int] = 100
    client: U64
    tasks: Askeds
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Taken:
    """These are kept now, whatever happens to the dispatcher."""

    TYPE: ClassVar[int] = 101
    client: U64
    numbers: TaskNumbers


@dataclass(frozen=True, slots=True)
class Busy:
    """These were not taken: the queue is full. `after`: seconds in which there may be room."""

    TYPE: ClassVar[int] = 102
    client: U64
    numbers: TaskNumbers
    after: Real


@dataclass(frozen=True, slots=True)
class Answers:
    TYPE: ClassVar[int] = 103
    client: U64
    answers: Tolds
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Heard:
    TYPE: ClassVar[int] = 104
    client: U64
    numbers: TaskNumbers


@dataclass(frozen=True, slots=True)
class Feedback:
    """A buffer for each: what was right, or nothing."""

    TYPE: ClassVar[int] = 105
    client: U64
    request: U64
    values: Valueds
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Counted:
    """`unknown`: how many were of no task that is remembered."""

    TYPE: ClassVar[int] = 106
    client: U64
    request: U64
    unknown: U32


@dataclass(frozen=True, slots=True)
class Recollect:
    """What was fed back of a kind of task after this place in the order of its coming. `data`: with inputs and truths."""

    TYPE: ClassVar[int] = 113
    client: U64
    request: U64
    kind: Text
    after: U64
    most: U32
    data: Flag


@dataclass(frozen=True, slots=True)
class Recollected:
    """Feedback, in that order. A buffer each: the inputs' length as a little-endian u32, they, and what was right; or empty."""

    TYPE: ClassVar[int] = 114
    client: U64
    request: U64
    values: Recalleds
    buffers: Buffers = field(repr=False)


# --- publisher and dispatcher


@dataclass(frozen=True, slots=True)
class Upload:
    """A piece of a safetensors file that has this SHA-256 in the end."""

    TYPE: ClassVar[int] = 107
    client: U64
    request: U64
    weights: Text
    total: U64
    offset: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """So many bytes of it are there."""

    TYPE: ClassVar[int] = 108
    client: U64
    request: U64
    upto: U64


@dataclass(frozen=True, slots=True)
class Publish:
    """Make a version of what was uploaded. The buffer is what is to be on its card, as JSON."""

    TYPE: ClassVar[int] = 109
    client: U64
    request: U64
    weights: Text
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Published:
    """The buffer is the card."""

    TYPE: ClassVar[int] = 110
    client: U64
    request: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Govern:
    """`what`: promote, rollback or canary, the last with the share of tasks that go to it."""

    TYPE: ClassVar[int] = 111
    client: U64
    request: U64
    what: Text
    name: Text
    version: U32
    share: Real
    why: LongText


@dataclass(frozen=True, slots=True)
class Governed:
    """This version is the one that was promoted, gone back to, or is tried."""

    TYPE: ClassVar[int] = 112
    client: U64
    request: U64
    version: U32


# --- executor and dispatcher


@dataclass(frozen=True, slots=True)
class Offer:
    """An executor, and how it is now; said each second, and when something changes.

    `models`: names of those that it serves. `open`: it may see what its versions may see; else only data with these labels.
    `free`: bytes. `loaded`, `failed`: identities of versions, the latter with the reason. `batches`: work that it has not done yet.
    """

    TYPE: ClassVar[int] = 115
    executor: U64
    name: Text
    models: Texts
    open: Flag
    data: Texts
    price: Real
    free: Real
    loaded: Texts
    failed: Failures
    batches: TaskNumbers


@dataclass(frozen=True, slots=True)
class Load:
    """These versions are to be held, and no others that are not at work. A card each in the buffers."""

    TYPE: ClassVar[int] = 116
    executor: U64
    identities: Texts
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Fetch:
    TYPE: ClassVar[int] = 117
    executor: U64
    weights: Text
    offset: U64


@dataclass(frozen=True, slots=True)
class Chunk:
    TYPE: ClassVar[int] = 118
    executor: U64
    weights: Text
    offset: U64
    total: U64
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Work:
    """Tasks of one version, an input each in the buffers. `items`: how many inputs are in each."""

    TYPE: ClassVar[int] = 119
    executor: U64
    batch: U64
    identity: Text
    items: Items
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Done:
    """`errors`: of each task empty, or why it has no output; then its buffer is empty. `seconds`: that the batch took."""

    TYPE: ClassVar[int] = 120
    executor: U64
    batch: U64
    seconds: Real
    errors: LongTexts
    buffers: Buffers = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settled:
    """The batch's outcome is known."""

    TYPE: ClassVar[int] = 121
    executor: U64
    batch: U64


@dataclass(frozen=True, slots=True)
class Retire:
    """An executor ends."""

    TYPE: ClassVar[int] = 122
    executor: U64


# --- dispatcher and coordinator


@dataclass(frozen=True, slots=True)
class Host:
    """A dispatcher is here; said each second. Who wants to know asks the coordinator (`Inquire` "dispatcher")."""

    TYPE: ClassVar[int] = 123
    incarnation: U64
    host: Text
    port: U32
    key: Text


TaskMessage: TypeAlias = (
    Submit
    | Taken
    | Busy
    | Answers
    | Heard
    | Feedback
    | Counted
    | Recollect
    | Recollected
    | Upload
    | Uploaded
    | Publish
    | Published
    | Govern
    | Governed
    | Offer
    | Load
    | Fetch
    | Chunk
    | Work
    | Done
    | Settled
    | Retire
    | Host
)

ONE_BUFFER = (Upload, Publish, Published, Chunk)
COUNTED: dict[type[Any], str] = {
    Submit: "tasks",
    Answers: "answers",
    Feedback: "values",
    Recollected: "values",
    Load: "identities",
    Work: "items",
    Done: "errors",
}
"""Messages with a buffer for each entry of this field."""
