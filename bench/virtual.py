"""What two cores cannot show, simulated: many workers and shards, with the real cores, on a virtual clock.

What is real
- The coordinator, every shard and every worker is the core that runs in production. Whatever a server hears was encoded by its
  sender; a server's time for it is the processor time that decoding it, handling it and encoding what it says to it took in this
  very run. A server does one thing at a time: what comes meanwhile waits, and that is the queueing.

What is not
- Sockets and the network: a message takes `DELAY`, whatever its size, none is lost, and the system calls of sending and receiving
  are not counted. Workers compute on machines of their own, which cost nothing here.
- The model: a block of 4 kB for each shard. A real one adds its bytes' way and its update, which `shoal bench pushpull` measures.

Rules
- Everything random comes from one seed. What is measured is not the same twice, but the median of a message's kind is.
"""

from __future__ import annotations

import gc
import heapq
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import count
from math import inf
from statistics import median
from typing import Any

from ..protocol.effects import COORDINATOR, Linked, Open, Received, Resolve, Send, Stream, Tick
from ..protocol.errors import ShoalError
from ..protocol.frames import decode, encode
from ..protocol.layout import MIN_BLOCK_BYTES
from ..protocol.messages import Message
from ..protocol.model import ModelSpec, Tensor
from ..protocol.records import Place
from ..protocol.rules import SGD
from ..ps.coordinator import Coordinator
from ..ps.settings import Settings
from ..ps.shard import Shard
from ..worker import calls
from ..worker.core import Core

DELAY = 2e-4
"""Seconds that a message is under way."""
ARRIVALS = 100.0
"""Workers that come in a second."""
STEP = 1.0
"""Seconds that a worker computes between a pull and the next push, give or take a fifth."""
LEASE = 15.0
PAYLOAD = bytes(MIN_BLOCK_BYTES)
GIVE_UP = 600.0
"""Virtual seconds after which a run that has not ended is an error of ours."""


class _World:
    """The virtual clock: what is due next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._number), what))

    def run(self, done: Callable[[], bool]) -> None:
        """Until `done`."""
        while not done():
            if not self._due or self.now > GIVE_UP:
                raise ShoalError(f"a simulated run has not ended after {self.now:.0f} virtual seconds")
            self.now, _, what = heapq.heappop(self._due)
            what()


class _Server:
    """A process of one core: one thing at a time. It counts what it hears, says and takes."""

    def __init__(self, world: _World, core: Any) -> None:
        self.world, self.core = world, core
        self.doors: dict[Any, Callable[[list[Any] | None, Message], None]] = {}
        """By peer, how a message reaches it: as frames, or to a worker as it is."""
        self._free_at, self._tick_at = 0.0, -1.0
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self.began_at, self.busy = self.world.now, 0.0
        self.heard, self.said = 0, 0
        self.bytes_heard, self.bytes_said = 0, 0
        self.waits: list[float] = []
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def hear(self, peer: Any, frames: list[Any]) -> None:
        """Frames have come; they are looked at when what came before is done."""
        started = time.thread_time()
        message = decode(frames)
        self.heard += 1
        self.bytes_heard += sum(map(len, frames))
        self._handle(type(message).__name__, Received(peer, message), started)

    def event(self, event: Any) -> None:
        self._handle(type(event).__name__, event, time.thread_time())

    def _handle(self, kind: str, event: Any, started: float) -> None:
        begins = max(self.world.now, self._free_at)
        self.waits.append(begins - self.world.now)
        letters = []
        for effect in self.core.handle(event, begins):
            messages: Iterable[Message] = [effect.message] if isinstance(effect, Send) else ()
            if isinstance(effect, Stream):
                messages = effect.messages
            letters += [(effect.peer, encode(message), message) for message in messages]
        taken = time.thread_time() - started
        self.seconds[kind].append(taken)
        self.busy += taken
        self._free_at = begins + taken
        for peer, frames, message in letters:
            self.said += 1
            self.bytes_said += sum(map(len, frames))
            door = self.doors.get(peer)
            if door is not None:
                self.world.at(self._free_at + DELAY, lambda d=door, f=frames, m=message: d(f, m))  # type: ignore[misc]
        self._schedule()

    def _schedule(self) -> None:
        wake = max(self.core.wake_at, self._free_at)
        if wake == inf or self.world.now < self._tick_at <= wake:
            return
        self._tick_at = wake

        def tick() -> None:
            if self._tick_at == wake:
                self._tick_at = -1.0
                self.event(Tick())

        self.world.at(wake, tick)


class _Client:
    """A worker: joins, registers, then some steps of computing, pushing and pulling."""

    def __init__(self, cluster: _Cluster, number: int, steps: int) -> None:
        self._cluster, self._world, self._left = cluster, cluster.world, steps
        self.name = f"w{number}".encode()
        entropy = cluster.random.getrandbits
        self.core = Core(Place(0, 0, "c", 1, ""), (f"w{number}", 0, "simulated", number), lambda: entropy(64) | 1)
        self._tickets = count(1)
        self._waiting: dict[int, Callable[[], None]] = {}
        self._tick_at = -1.0
        self._linked: set[int] = set()

    def start(self) -> None:
        self._call(calls.OpenCalled, self._register)

    def _register(self) -> None:
        self._call(calls.RegisterCalled, self._run, self._cluster.spec.description, lambda _: PAYLOAD)

    def _run(self) -> None:
        self._cluster.running += 1
        self._compute()

    def _compute(self) -> None:
        self._world.at(self._world.now + STEP * self._cluster.random.uniform(0.8, 1.2), self._push)

    def _push(self) -> None:
        layout = self.core.layout
        assert layout is not None
        parts = tuple(calls.Part(block.shard, (block.index,), (), (PAYLOAD,)) for block in layout.blocks)
        self._call(calls.PushCalled, lambda: None, parts, True, 1.0, ())
        self._call(calls.PullCalled, self._step_over, {block.shard: () for block in layout.blocks}, {})

    def _step_over(self) -> None:
        self._left -= 1
        if self._left:
            return self._compute()
        self._cluster.done += 1

    def _call(self, make: Any, then: Callable[[], None], *args: Any) -> None:
        ticket = next(self._tickets)
        self._waiting[ticket] = then
        self.give(make(ticket, *args))

    def _link(self, peer: int) -> None:
        self._linked.add(peer)
        self.give(Linked(peer))

    def give(self, event: Any) -> None:
        """An event reaches the core; its effects are performed."""
        world = self._world
        for effect in self.core.handle(event, world.now):
            match effect:
                case Send(peer, message) if peer in self._linked:  # a socket that is not connected takes nothing
                    server, frames = self._cluster.server(peer), encode(message)
                    world.at(world.now + DELAY, lambda s=server, f=frames: s.hear(self.name, f))  # type: ignore[misc]
                case Open(peer):
                    self._cluster.server(peer).doors[self.name] = lambda _, message, p=peer: self.give(  # type: ignore[misc]
                        Received(p, message)
                    )
                    world.at(world.now + DELAY, lambda p=peer: self._link(p))  # type: ignore[misc]
                case Resolve(ticket, _):
                    self._waiting.pop(ticket)()
        self._schedule()

    def _schedule(self) -> None:
        wake = max(self.core.wake_at, self._world.now)
        if wake == inf or self._world.now <= self._tick_at <= wake:
            return
        self._tick_at = wake

        def tick() -> None:
            if self._tick_at == wake:
                self._tick_at = -1.0
                self.give(Tick())

        self._world.at(wake, tick)


class _Cluster:
    """A coordinator, shards, and workers who come one after the other."""

    def __init__(self, workers: int, shards: int, steps: int, seed: int) -> None:
        self.world, self.random = _World(), random.Random(seed)  # noqa: S311 - a simulation
        self.spec = ModelSpec((Tensor("w", "float32", (shards * len(PAYLOAD) // 4,)),), (SGD(lr=1e-6),))
        settings = Settings(
            lease=LEASE, min_workers=workers, min_shards=shards, block_bytes=MIN_BLOCK_BYTES, staleness=3.0
        )
        self.coordinator = _Server(self.world, Coordinator(1, settings))
        self.shards = [_Server(self.world, Shard(100 + i, f"s{i}", 1 + i)) for i in range(shards)]
        self._places: dict[int, _Server] = {}
        self.running = self.done = 0
        for number, shard in enumerate(self.shards):
            self._introduce(f"s{number}".encode(), shard)
        self.world.at(0.0, lambda: self.coordinator.event(Tick()))
        self._clients = [_Client(self, number, steps) for number in range(workers)]
        for number, client in enumerate(self._clients):
            self.world.at(1.0 + number / ARRIVALS, client.start)

    def _introduce(self, name: bytes, shard: _Server) -> None:
        shard.doors[COORDINATOR] = lambda frames, _: self.coordinator.hear(name, frames or [])
        self.coordinator.doors[name] = lambda frames, _: shard.hear(COORDINATOR, frames or [])
        self.world.at(0.0, lambda: shard.event(Linked(COORDINATOR)))

    def server(self, peer: Any) -> _Server:
        """Who is at this index, as the coordinator has said."""
        if peer == COORDINATOR:
            return self.coordinator
        if peer not in self._places:
            place = next(place for place in self.coordinator.core.shards.places if place.index == peer)
            self._places[peer] = self.shards[place.incarnation - 100]
        return self._places[peer]

    def joined(self) -> bool:
        return self.running == len(self._clients)

    def over(self) -> bool:
        return self.done == len(self._clients)

    def begin(self) -> None:
        for server in (self.coordinator, *self.shards):
            server.begin()


def simulate(workers: int, shards: int, steps: int = 2, seed: int = 1) -> dict[str, Any]:
    """Run one cluster; what its servers had to do while workers came, and while they trained.

    Returns:
        By phase (`joining`, `training`): virtual seconds; for the coordinator, for the mean and for the busiest shard messages and
        bytes a second in and out, the share of a core, and what messages waited, in seconds. By kind of server, the median seconds
        of each kind of event, with how many there were.
    """
    collecting = gc.isenabled()
    gc.disable()  # a collection would be counted to whoever was at work
    try:
        cluster = _Cluster(workers, shards, steps, seed)
        phases = {}
        costs: dict[str, Any] = {}
        for phase, done in (("joining", cluster.joined), ("training", cluster.over)):
            cluster.begin()
            cluster.world.run(done)
            phases[phase] = _phase(cluster)
            for name, servers in (("coordinator", [cluster.coordinator]), ("shard", cluster.shards)):
                costs.setdefault(name, {})[phase] = _costs(servers)
    finally:
        if collecting:
            gc.enable()
    return {"workers": workers, "shards": shards, "steps": steps, "phases": phases, "costs": costs}


def _phase(cluster: _Cluster) -> dict[str, Any]:
    found = [_load(server) for server in cluster.shards]
    mean = {name: sum(load[name] for load in found) / len(found) for name in found[0]}
    return {
        "seconds": cluster.world.now - cluster.coordinator.began_at,
        "coordinator": _load(cluster.coordinator),
        "shard": mean,
        "busiest_shard": max(found, key=lambda load: load["busy"]),
    }


def _load(server: _Server) -> dict[str, float]:
    seconds = server.world.now - server.began_at
    waits = sorted(server.waits) or [0.0]
    rates = {
        "heard": server.heard,
        "said": server.said,
        "bytes_heard": server.bytes_heard,
        "bytes_said": server.bytes_said,
        "busy": server.busy,
    }
    spread = {
        "wait_median": waits[len(waits) // 2],
        "wait_99": waits[int(0.99 * (len(waits) - 1))],
        "wait_most": waits[-1],
    }
    return {name: amount / seconds for name, amount in rates.items()} | spread


def _costs(servers: list[_Server]) -> dict[str, dict[str, float]]:
    merged: defaultdict[str, list[float]] = defaultdict(list)
    for server in servers:
        for kind, taken in server.seconds.items():
            merged[kind] += taken
    totals = Counter({kind: sum(taken) for kind, taken in merged.items()})
    return {
        kind: {"median": median(merged[kind]), "count": float(len(merged[kind])), "total": total}
        for kind, total in totals.most_common()
    }
