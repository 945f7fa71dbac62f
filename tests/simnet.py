"""A network and a clock that are not real: real cores, encoded messages, one seed (rung T1 of the test ladder).

Rules
- Everything random comes from one `random.Random(seed)`, so a seed gives the same run, event for event.
- Every message is encoded on one side and decoded on the other.
- After every event the core's invariants are checked.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import Any

from shoal.protocol.effects import (
    Attach,
    Attached,
    Fail,
    Linked,
    Log,
    Open,
    Received,
    Resolve,
    Send,
    Stream,
    Tick,
    Unlinked,
)
from shoal.protocol.frames import decode, encode

MOST_HURRIED = 10_000
"""More is no haste but a loop: where it is real, it takes a core."""


@dataclass(frozen=True)
class Faults:
    """Chances for each message; delays in virtual seconds."""

    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.005
    reset: float = 0.0
    """The connection breaks just before the message and is made again; what was on it is lost."""


class Node:
    """A process: a core, and its connections to servers by peer index."""

    def __init__(self, name: str, core: Any) -> None:
        self.name, self.core = name, core
        self.doors: dict[int, str] = {}
        self.stopped = False
        self.tick_at = -1.0
        self.held: list[Any] = []
        self.hurried = 0
        """Events in a row after which it wanted a tick at once."""
        self.on_effect: Callable[[Any, float], None] = lambda effect, now: None


class Sim:
    """Delivers messages between nodes in virtual time."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.random = random.Random(seed)
        self.faults = faults
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.log: list[str] = []
        self.cut: set[frozenset[str]] = set()
        self.memory: dict[bytes, bytearray] = {}
        """Regions by their tokens."""
        self.strange: set[str] = set()
        """Nodes on other machines: they can open no region."""
        self.quiet = False
        """Faults are over: let everything finish."""
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._lives: dict[tuple[str, int], int] = {}
        """Connections by node and door: which life of each is the present one."""

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._number), what))

    def run(self, until: float, done: Callable[[], bool]) -> bool:
        """Go on until `done`, or the virtual time is up, or nothing is left to happen."""
        while self._queue and not done():
            when, _, what = heapq.heappop(self._queue)
            if when > until:
                return False
            self.now = max(self.now, when)
            what()
        return done()

    # --- nodes

    def add(self, node: Node) -> Node:
        self.nodes[node.name] = node
        self.at(self.now, lambda: self.give(node, Tick()))
        return node

    def door(self, node: Node, peer: int, server: str) -> None:
        """`node` connects to `server` under the index `peer`."""
        node.doors[peer] = server
        self._connect(node, peer)

    def _connect(self, node: Node, peer: int) -> None:
        server = node.doors[peer]
        life = self._lives[node.name, peer] = self._lives.get((node.name, peer), 0) + 1

        def made() -> None:
            if self.nodes.get(node.name) is not node or self._lives[node.name, peer] != life:
                return
            if server not in self.nodes or frozenset((node.name, server)) in self.cut:
                self.at(self.now + 0.1, made)  # as a socket does: it tries again
            else:
                self.give(node, Linked(peer))

        self.at(self.now + self.random.uniform(0.0, self.faults.delay), made)

    def break_link(self, node: Node, peer: int) -> None:
        self.give(node, Unlinked(peer))
        self._connect(node, peer)

    def crash(self, name: str) -> None:
        self.nodes.pop(name)
        for node in list(self.nodes.values()):
            for peer, server in list(node.doors.items()):
                if server == name:
                    self.break_link(node, peer)

    def stop(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after so long: what arrives meanwhile is seen then."""
        node = self.nodes[name]
        node.stopped = True

        def go_on() -> None:
            node.stopped = False
            held, node.held = node.held, []
            for event in held:
                self.give(node, event)
            self.give(node, Tick())

        self.at(self.now + seconds, go_on)

    def give(self, node: Node, event: Any) -> None:
        """An event reaches a core; its effects are performed."""
        if self.nodes.get(node.name) is not node:
            return
        if node.stopped:
            if not isinstance(event, Tick):
                node.held.append(event)
            return
        effects = node.core.handle(event, self.now)
        if hasattr(node.core, "check"):
            node.core.check()
        for effect in effects:
            match effect:
                case Send(peer, message):
                    self._send(node, peer, message)
                case Stream(peer, messages):
                    self._stream(node, peer, messages)
                case Open(peer, host, _, _):
                    self.door(node, peer, host)
                case Attach(peer, offer):
                    found = None if node.name in self.strange else self.memory.get(bytes(offer.buffers[0]))
                    memory = memoryview(found) if found is not None else None
                    self.at(self.now, lambda p=peer, o=offer, m=memory: self.give(node, Attached(p, o, m)))
                case Log(level, text):
                    self.log.append(f"{self.now:9.3f} {node.name}: {level}: {text}")
                case Resolve() | Fail():
                    node.on_effect(effect, self.now)
        self._schedule_tick(node)

    def _stream(self, node: Node, peer: Any, messages: Iterator[Any]) -> None:
        """The peer reads slowly: other events come in between, and in between the messages, too."""

        def go_on() -> None:
            if self.nodes.get(node.name) is not node:
                return
            message = next(messages, None)
            if message is not None:
                self._send(node, peer, message)
                self._stream(node, peer, messages)

        self.at(self.now + self.random.uniform(0.0, 2 * self.faults.delay), go_on)

    def _schedule_tick(self, node: Node) -> None:
        node.hurried = node.hurried + 1 if node.core.wake_at <= self.now else 0
        assert node.hurried < MOST_HURRIED, f"{node.name} wants ticks without an end"
        wake = max(node.core.wake_at, self.now + 1e-6)
        if wake == inf or self.now < node.tick_at <= wake:
            return
        node.tick_at = wake

        def tick() -> None:
            if node.tick_at == wake:
                node.tick_at = -1.0
                self.give(node, Tick())

        self.at(wake, tick)

    # --- messages

    def _send(self, node: Node, peer: Any, message: Any) -> None:
        frames = [bytes(frame) for frame in encode(message)]
        if isinstance(peer, int):  # toward a server
            server = node.doors.get(peer)
            if server is None:
                return
            life = self._lives[node.name, peer]
            if not self.quiet and self.random.random() < self.faults.reset:
                self.at(self.now, lambda: self.break_link(node, peer) if self.nodes.get(node.name) is node else None)
                return
            route = f"{node.name}|{peer}|{life}".encode()
            self._carry((node.name, peer), life, server, lambda: self._deliver(server, route, frames))
        else:  # toward whoever connected
            client, door, number = peer.decode().split("|")
            self._carry((client, int(door)), int(number), node.name, lambda: self._deliver(client, int(door), frames))

    def _carry(self, door: tuple[str, int], life: int, server: str, deliver: Callable[[], None]) -> None:
        ends = frozenset((door[0], server))
        faults = self.faults if not self.quiet else Faults()
        if self.random.random() < faults.drop:
            return
        copies = 2 if self.random.random() < faults.repeat else 1
        for _ in range(copies):

            def arrive() -> None:
                if self._lives.get(door) == life and ends not in self.cut:
                    deliver()

            self.at(self.now + self.random.uniform(1e-4, faults.delay), arrive)

    def _deliver(self, name: str, peer: Any, frames: list[bytes]) -> None:
        node = self.nodes.get(name)
        if node is not None:
            self.give(node, Received(peer, decode(frames)))
