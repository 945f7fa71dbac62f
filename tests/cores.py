"""One server core on a bench: it hears messages one by one, in virtual time, and what it says is looked at (rung T0).

Rules
- What a core hears and says goes through the codec, so no test says what cannot be said.
- After every event the core's own invariants are checked.
- Weights are read as a worker reads them: by a pull, of a member that is never counted in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from shoal.protocol import messages as m
from shoal.protocol.effects import COORDINATOR, Log, Peer, Received, Send, Stream, Tick
from shoal.protocol.frames import decode, encode
from shoal.protocol.layout import MIN_BLOCK_BYTES, lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD
from shoal.ps.coordinator import Coordinator
from shoal.ps.settings import Settings
from shoal.ps.shard import Shard

Kind = TypeVar("Kind")
RUN, SHARD, READER = 7, 900, 99
SMALL = ModelSpec((Tensor("w", "float32", (2,)),), (SGD(lr=1.0),))


def carried(message: Any) -> Any:
    """The message as the other side reads it."""
    return decode([bytearray(frame) for frame in encode(message)])


def only(kind: type[Kind], messages: Sequence[Any]) -> Kind:
    """The one message of this kind."""
    (found,) = (message for message in messages if isinstance(message, kind))
    return found


def kinds(messages: Sequence[Any]) -> list[str]:
    return [type(message).__name__ for message in messages]


def answered(messages: Sequence[Any]) -> list[int]:
    """The requests of the pulls that were answered."""
    return [message.request for message in messages if isinstance(message, m.Values)]


def floats(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def peer_of(worker: int) -> bytes:
    return f"w{worker}".encode()


class Bench:
    """A core and its virtual time."""

    def __init__(self, core: Any) -> None:
        self.core, self.now = core, 0.0
        self.sent: list[tuple[Peer, Any]] = []
        self.logged: list[str] = []

    def event(self, event: Any) -> list[Any]:
        effects = self.core.handle(event, self.now)
        self.core.check()
        self.logged += [effect.text for effect in effects if isinstance(effect, Log)]
        said: list[tuple[Peer, Any]] = []
        for effect in effects:
            if isinstance(effect, Send):
                said.append((effect.peer, carried(effect.message)))
            elif isinstance(effect, Stream):
                said += [(effect.peer, carried(message)) for message in effect.messages]
        self.sent += said
        return [message for _, message in said]

    def hear(self, peer: Peer, message: Any) -> list[Any]:
        """What the core says when it hears this; to whom is in `sent`."""
        return self.event(Received(peer, carried(message)))

    def after(self, seconds: float) -> list[Any]:
        self.now += seconds
        return self.event(Tick())

    def to(self, peer: Peer, kind: type[Kind]) -> list[Kind]:
        """What this peer was sent of this kind."""
        return [message for to, message in self.sent if to == peer and isinstance(message, kind)]


class ShardBench(Bench):
    """Shard 0 of 1, welcomed, with a model, a first view, its workers greeted; filled by the first unless told otherwise."""

    def __init__(
        self, members: Sequence[int] = (1, 2), mode: str = "async", staleness: float = 0.0, **other: Any
    ) -> None:
        super().__init__(Shard(SHARD, "host", 1))
        self.mode, self.staleness, self.epoch, self.requests = mode, staleness, 0, 0
        self.layout = lay_out(other.pop("spec", SMALL), 1, other.pop("block_bytes", MIN_BLOCK_BYTES))
        self.sequence: Counter[int] = Counter()
        fill = other.pop("fill", True)
        self.hear(COORDINATOR, m.ShardWelcome(SHARD, RUN, 0, 15.0))
        self.hear(COORDINATOR, self.model())
        self.view(members, **other)
        if fill:
            self.fill(members[0])

    def model(self, digest: str = "") -> m.Model:
        layout = self.layout
        return m.Model(RUN, 1, layout.block_bytes, digest or layout.digest, (layout.spec.description,))

    def view(
        self,
        members: Sequence[int],
        *,
        filler: int = 1,
        quorum: int = 0,
        registered: Sequence[int] = (),
        phases: tuple[m.Phase, ...] = (),
        held: bool = False,
    ) -> list[Any]:
        """The next view, and everybody in it says hello."""
        self.epoch += 1
        rows = tuple(m.Member(inc, f"name{inc}", inc in registered) for inc in (*members, READER))
        phases = phases or (m.Phase(0, self.mode, self.staleness),)
        said = self.hear(COORDINATOR, m.View(RUN, self.epoch, phases, held, filler, quorum, rows))
        for worker in (*members, READER):
            self.hear(peer_of(worker), m.Hello(worker, RUN, self.epoch))
        return said

    def do(self, kind: Any, worker: int, *fields: Any) -> list[Any]:
        """The worker's next operation."""
        self.sequence[worker] += 1
        fields = fields or ((0,) if kind in (m.Enter, m.Pause) else ())
        return self.hear(peer_of(worker), kind(worker, SHARD, self.sequence[worker], *fields))

    def fill(self, worker: int, value: float = 0.0, epoch: int = 0) -> list[Any]:
        blocks = self.layout.blocks
        payload = tuple(np.full(b.elements, value, np.float32).tobytes() for b in blocks)
        return self.do(m.Fill, worker, epoch or self.epoch, tuple(b.index for b in blocks), payload)

    def start(self, *workers: int) -> None:
        """Count workers in, as they do it."""
        for worker in workers:
            self.do(m.Enter, worker)
        for worker in workers:
            self.do(m.Start, worker, 0)

    def push(
        self,
        worker: int,
        clock: int,
        *values: float,
        advance: bool = True,
        examples: float = 1.0,
        hyper: Any = (),
        held: bool = False,
        seen: int = 0,
    ) -> list[Any]:
        """A gradient of block 0, or none."""
        blocks, buffers = ((0,), (floats(*values),)) if values else ((), ())
        return self.do(m.Push, worker, clock, advance, examples, hyper, 0, 0, blocks, (), held, seen, buffers)

    def pull(self, worker: int, clock: int = 0, after: int = 0, since: int = 0, blocks: Any = ()) -> list[Any]:
        self.requests += 1
        return self.hear(peer_of(worker), m.Pull(worker, SHARD, self.requests, clock, after, since, 0, 0, blocks))

    def report(self) -> m.Report:
        return only(m.Report, self.after(1.0))

    @property
    def weights(self) -> list[float]:
        """Block 0."""
        return np.frombuffer(only(m.Values, self.pull(READER, blocks=(0,))).buffers[0], np.float32).tolist()


class CoordinatorBench(Bench):
    """A coordinator; shards and workers come when the test says so."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(Coordinator(RUN, Settings(**settings)))

    def shard(self, number: int = 0, port: int = 0) -> list[Any]:
        """A shard of incarnation 900 + number asks for a place."""
        join = m.ShardJoin(SHARD + number, "host", port or 1000 + number, "", -1, 0, "", ())
        return self.hear(f"s{number}".encode(), join)

    def report(self, number: int = 0, filled: bool = True, opened: bool = True, **other: Any) -> list[Any]:
        """A shard's report; of the newest epoch and the layout's digest unless told otherwise."""
        run, epoch, clocks = other.get("run", RUN), other.get("epoch", self.core.epoch), other.get("clocks", ())
        digest = other.get("digest", self.core.shards.digest)
        held, highest = other.get("held", False), other.get("highest", 4)
        how = (filled, opened, other.get("floor", 4), held, highest, clocks, other.get("counters", ()))
        return self.hear(f"s{number}".encode(), m.Report(SHARD + number, run, epoch, digest, *how))

    def join(self, worker: int, name: str = "", attempt: int = 0) -> list[Any]:
        return self.hear(peer_of(worker), m.Join(worker, name or f"name{worker}", attempt, "host", worker))

    def renew(self, worker: int, clock: int = 0, entered: bool = True, **other: Any) -> list[Any]:
        epoch, rest = other.get("epoch", self.core.epoch), [other.get(n, ()) for n in ("stats", "logged", "progress")]
        return self.hear(peer_of(worker), m.Renew(worker, epoch, clock, entered, *rest))

    def ask(self, kind: Any, worker: int, request: int, *fields: Any) -> list[Any]:
        return self.hear(peer_of(worker), kind(worker, request, *fields))

    def register(self, worker: int, request: int = 1, spec: ModelSpec = SMALL) -> list[Any]:
        return self.ask(m.Register, worker, request, (spec.description,))
