"""Federated rounds between the real halves, in one process: what every party computes and says, on a virtual clock.

What is real
- The coordinator's half, every shard's and every client's are those that run in production. Each message is encoded by its sender
  and decoded by its receiver; a party's seconds are the processor time of that and of what it does about it.

What is not
- Sockets and the network: a message takes `DELAY`, whatever its size. Training: it takes no time, and the updates are given.
- Clients that drop out are silent from some message on; everybody learns it by a deadline, which costs virtual time alone.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from ..protocol.effects import COORDINATOR, Received, Send, Tick
from ..protocol.errors import ShoalError
from ..protocol.frames import decode, encode
from ..protocol.rounds import Advertise, Consent, Deal, Finish, Masked, Unmask
from ..protocol.secure.noise import Array
from ..protocol.secure.plan import Policy
from ..protocol.session import blocks_digest, model_digest
from ..ps.accumulator import Accumulator, Apply
from ..ps.recipe import Recipe
from ..ps.round import Say
from ..ps.rounds import Concluded, Placed, Rounds, Workers
from ..worker.parley import Input, Invited, Shards, Trained
from ..worker.round import RoundClient

DELAY = 2e-4
"""Virtual seconds that a message is under way."""
LAYOUT = bytes(range(32))
FIRST_SHARD = 1 << 20
"""Incarnations of shards begin here."""
LONGEST = 1e5
"""Virtual seconds after which a round that has not ended is an error of ours."""
SAID: tuple[type[Any], ...] = (Advertise, Deal, Masked, Consent, Unmask)
"""What a client says in a round, stage by stage."""


@dataclass
class Costs:
    """Of one round.

    Attributes:
        clients: processor seconds, by incarnation. coordinator: the same. shards: the same, by index.
        unmask: of `shards`, those from the moment on when the coordinator says which masks to take off.
        said: bytes that a client has sent, by incarnation. heard: that it was sent.
        messages: how many, by kind. held: bytes beside its weights that a shard has held, the most of all.
        took: virtual seconds. released: was there a sum? members: who is in it, from 1 on.
        average: of the update, all shards' parts, or empty.
    """

    clients: dict[int, float] = field(default_factory=dict)
    coordinator: float = 0.0
    shards: dict[int, float] = field(default_factory=dict)
    unmask: dict[int, float] = field(default_factory=dict)
    said: Counter[int] = field(default_factory=Counter)
    heard: Counter[int] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    held: int = 0
    took: float = 0.0
    released: bool = False
    members: tuple[int, ...] = ()
    average: Array = field(default_factory=lambda: np.zeros(0, np.float32))


class Arena:
    """A coordinator, shards and clients.

    Args:
        clients: how many. sizes: elements of each shard. recipe: of the rounds.
        update: of a client, by number from 0: float32, all elements; it is not changed. weights: how much each counts.
        seed: of the draws that are not secrets.

    Attributes:
        costs: of the last round. neighbours: with how many a client has had masks in it.
    """

    def __init__(
        self,
        clients: int,
        sizes: tuple[int, ...],
        recipe: Recipe,
        update: Callable[[int], Array],
        weights: Callable[[int], float] = lambda number: 1.0,
        seed: int = 0,
    ) -> None:
        self._now = 0.0
        self._sizes, self._update, self._weights = sizes, update, weights
        self._random = random.Random(seed)  # noqa: S311 - which clients are drawn
        self._rounds = Rounds(1, recipe, self._random.randrange)
        self._digests = [blocks_digest([bytes(4 * size)]) for size in sizes]
        self._shards = [Accumulator(FIRST_SHARD + i, size, self._digest(i)) for i, size in enumerate(sizes)]
        policy = Policy(recipe.protection, minimum=2 if recipe.protection == "secagg" else 1)
        self._clients = {1 + i: RoundClient(1 + i, f"c{i:05}", policy, sum(sizes), LAYOUT) for i in range(clients)}
        self._queue: deque[tuple[float, int, Any, Any]] = deque()
        """When, to whom, from whom, frames."""
        self._silent: Mapping[int, type[Any]] = {}
        self._finishing: set[int] = set()
        self._ended: Concluded | None = None
        self.costs = Costs()
        self.neighbours = 0
        lives = tuple(shard.incarnation for shard in self._shards)
        for client in self._clients.values():
            client.handle(Shards(lives), 0.0)
        self._tell(Workers({i: client.name for i, client in self._clients.items()}))
        self._placed = Placed(lives, sizes, LAYOUT)

    def _digest(self, index: int) -> Callable[[], bytes]:
        return lambda: self._digests[index]

    def round(self, silent: Mapping[int, type[Any]] | None = None) -> Costs:
        """One, from the moment on when the shards are asked what they hold.

        Args:
            silent: the first of `SAID` that a client does not say any more, by its number from 0.

        Raises:
            ShoalError: it has not ended.
        """
        self.costs, self._ended = Costs(), None
        self._silent = {1 + number: stage for number, stage in (silent or {}).items()}
        began = self._now
        self._tell(self._placed)
        while self._ended is None:
            if self._queue:
                self._now, to, by, frames = self._queue.popleft()
                self._hear(to, by, frames)
            else:
                self._wait()
            if self._now - began > LONGEST:
                raise ShoalError("a simulated round has not ended", cause="a fault of shoal's", hint="please report it")
        self._queue.clear()
        self.costs.took = self._now - began
        return self.costs

    # --- who hears what

    def _wait(self) -> None:
        """Nothing is under way: on to the next deadline."""
        alive = {i: client for i, client in self._clients.items() if i not in self._silent}
        wakes = [self._rounds.wake_at, *(s.wake_at for s in self._shards), *(c.wake_at for c in alive.values())]
        then = min(wakes)
        if then == inf:
            raise ShoalError("a simulated round stands still", cause="a fault of shoal's", hint="please report it")
        self._now = max(self._now, then)
        if self._rounds.wake_at <= self._now:
            self._tell(Tick())
        for index, shard in enumerate(self._shards):
            if shard.wake_at <= self._now:
                self._at_shard(index, Tick())
        for incarnation, client in alive.items():
            if client.wake_at <= self._now:
                self._at_client(incarnation, Tick())

    def _hear(self, to: int, by: int, frames: list[bytes]) -> None:
        if to == COORDINATOR:
            self._tell(by, frames)
        elif to >= FIRST_SHARD:
            self._at_shard(to - FIRST_SHARD, by, frames)
        else:
            self._at_client(to, by, frames)

    def _tell(self, event: Any, frames: list[bytes] | None = None) -> None:
        started = time.perf_counter()
        if frames is not None:
            event = Received(event, decode(frames))
        session = self._rounds.session
        effects = self._rounds.handle(event, self._now)
        said = [
            (effect.to, COORDINATOR, encode(effect.message), effect.message)
            for effect in effects
            if isinstance(effect, Say)
        ]
        self.costs.coordinator += time.perf_counter() - started
        for effect in effects:
            if isinstance(effect, Concluded):
                self._ended = effect
                self.costs.released = effect.released is not None
                self.costs.members = session.survivors if session and effect.released else ()
        self._send(said)

    def _at_shard(self, index: int, event: Any, frames: list[bytes] | None = None) -> None:
        shard, started = self._shards[index], time.perf_counter()
        if frames is not None:
            event = Received(event, decode(frames))
            if isinstance(event.message, Finish):
                self._finishing.add(index)
        effects = shard.handle(event, self._now)
        said = [
            (each.peer, shard.incarnation, encode(each.message), each.message)
            for each in effects
            if isinstance(each, Send)
        ]
        seconds = time.perf_counter() - started
        self.costs.shards[index] = self.costs.shards.get(index, 0.0) + seconds
        if index in self._finishing:
            self.costs.unmask[index] = self.costs.unmask.get(index, 0.0) + seconds
        self.costs.held = max(self.costs.held, shard.holds)
        for each in effects:
            if isinstance(each, Apply):
                self._finishing.discard(index)
                self.costs.average = np.concatenate([self.costs.average, each.update])
        self._send(said)

    def _at_client(self, incarnation: int, event: Any, frames: list[bytes] | None = None) -> None:
        client, started = self._clients[incarnation], time.perf_counter()
        if frames is not None:
            event = Received(event, decode(frames))
            self.costs.heard[incarnation] += sum(map(len, frames))
        effects = client.handle(event, self._now)
        for each in list(effects):
            if isinstance(each, Invited):
                self.neighbours = each.plan.degree_of(len(self._clients))
                model = model_digest(LAYOUT, self._digests)
                given = Input(self._update(incarnation - 1), self._weights(incarnation - 1), {}, model)
                effects += client.handle(Trained(each.session, given), self._now)
        said = [
            (
                _from_client(each.peer),
                incarnation,
                encode(each.message),
                each.message,
            )
            for each in effects
            if isinstance(each, Send) and not self._lost(incarnation, each.message)
        ]
        seconds = time.perf_counter() - started
        self.costs.clients[incarnation] = self.costs.clients.get(incarnation, 0.0) + seconds
        for _, _, sent, _ in said:
            self.costs.said[incarnation] += sum(map(len, sent))
        self._send(said)

    def _lost(self, incarnation: int, message: Any) -> bool:
        """Is this client silent by now?"""
        last = self._silent.get(incarnation)
        return last is not None and (type(message) not in SAID or SAID.index(type(message)) >= SAID.index(last))

    def _send(self, said: list[tuple[Any, int, list[Any], Any]]) -> None:
        """To whom, by whom, frames and message. A client knows a shard by its index."""
        for to, by, frames, message in said:
            self.costs.messages[type(message).__name__] += 1
            peer = by - FIRST_SHARD if by >= FIRST_SHARD and to != COORDINATOR else by
            self._queue.append((self._now + DELAY, to, peer, [bytes(frame) for frame in frames]))


def _from_client(peer: Any) -> int:
    return COORDINATOR if peer == COORDINATOR else FIRST_SHARD + int(peer)
