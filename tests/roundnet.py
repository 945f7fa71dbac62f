"""Federated rounds on the fake network: the three halves as they are, each in a core that does the least around it.

Rules
- Every message is encoded and decoded; what any of them looked like is kept in `wire`.
- What a client put into a session is remembered here, so that what the shards apply can be compared with the plain average.
- The servers' keys are the system's, the schedule is the seed's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
from simnet import Faults, Node, Sim

from shoal.protocol.effects import COORDINATOR, Linked, Log, Received, Send
from shoal.protocol.join import CLEAR
from shoal.protocol.messages import Hello
from shoal.protocol.secure.fixed import UNIFORM, ratio
from shoal.protocol.secure.keys import Identity
from shoal.protocol.secure.plan import Plan, Policy
from shoal.protocol.session import blocks_digest, model_digest
from shoal.ps.accumulator import Accumulator, Apply
from shoal.ps.recipe import Recipe
from shoal.ps.round import Say, Session, Stage
from shoal.ps.rounds import Concluded, Placed, Rounds, Workers
from shoal.worker.parley import Input, Invited, Over, Remember, Trained
from shoal.worker.parley import Shards as ShardsAre
from shoal.worker.round import RoundClient

LAYOUT = bytes(range(32))
SHARD = 1 << 20
"""Incarnations of shards begin here."""
DEADLINES = (5.0, 20.0, 5.0, 20.0, 5.0, 5.0, 10.0)


@dataclass
class World:
    """What all nodes of a simulation share."""

    net: RoundNet
    shards: int
    sizes: tuple[int, ...]
    inputs: dict[tuple[int, str], Input] = field(default_factory=dict)
    """By session and name."""
    plans: dict[int, Plan] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)


class CoordinatorCore:
    def __init__(self, world: World, run: int, recipe: Recipe, peers: dict[str, bytes] | None = None) -> None:
        self.world = world
        self.rounds = Rounds(run, recipe, world.net.random.randrange, peers)
        self.routes: dict[int, Any] = {}
        self.names: dict[int, str] = {}
        self.hosts: dict[int, int] = {}
        self.ended: list[Concluded] = []
        self.lie: Callable[[int, Any], list[Any]] = lambda to, message: [message]
        """What is sent instead, by a server that lies."""
        self.log: list[str] = []

    @property
    def wake_at(self) -> float:
        return self.rounds.wake_at

    def handle(self, event: Any, now: float) -> list[Any]:
        effects: list[Any] = []
        match event:
            case Received(peer, Hello() as hello):
                self.routes[hello.incarnation] = peer
                if hello.incarnation >= SHARD:
                    self.hosts[int(hello.epoch)] = hello.incarnation
                    if len(self.hosts) == self.world.shards:
                        here = tuple(self.hosts[index] for index in range(self.world.shards))
                        effects = self.rounds.handle(Placed(here, self.world.sizes, LAYOUT), now)
                else:
                    self.names[hello.incarnation] = f"w{hello.incarnation}"
                    effects = self.rounds.handle(Workers(dict(self.names)), now)
            case _:
                effects = self.rounds.handle(event, now)
        if self.rounds.session is not None:
            self.world.sessions[self.rounds.session.number] = self.rounds.session
        return self.perform(effects)

    def gone(self, incarnation: int, now: float) -> list[Any]:
        """A lease has ended."""
        self.names.pop(incarnation, None)
        return self.perform(self.rounds.handle(Workers(dict(self.names)), now))

    def perform(self, effects: list[Any]) -> list[Any]:
        out = []
        for effect in effects:
            match effect:
                case Say(to, message):
                    if to in self.routes:
                        out += [Send(self.routes[to], each) for each in self.lie(to, message)]
                case Concluded():
                    self.ended.append(effect)
                case Log():
                    self.log.append(effect.text)
        return out


class Greets:
    """Says hello until the coordinator says something."""

    def __init__(self, hello: Hello) -> None:
        self._hello, self._at = hello, inf

    def greet(self, event: Any, now: float) -> list[Any]:
        if isinstance(event, Linked) and event.peer == COORDINATOR:
            self._at = now
        elif isinstance(event, Received) and event.peer == COORDINATOR:
            self._at = inf
        if now < self._at:
            return []
        self._at = now + 1.0
        return [Send(COORDINATOR, self._hello)]


class ShardCore(Greets):
    def __init__(self, world: World, index: int, life: int = 0) -> None:
        self.world, self.index = world, index
        self.incarnation = SHARD + 100 * index + life
        super().__init__(Hello(self.incarnation, 0, index))
        self.weights = np.zeros(world.sizes[index], np.float32)
        self.accumulator = Accumulator(self.incarnation, world.sizes[index], self.digest)
        self.applied: list[tuple[int, int, np.ndarray[Any, Any]]] = []
        self.peak = 0

    def digest(self) -> bytes:
        return blocks_digest([self.weights.tobytes()])

    @property
    def wake_at(self) -> float:
        return min(self.accumulator.wake_at, self._at)

    def handle(self, event: Any, now: float) -> list[Any]:
        out = self.greet(event, now)
        if isinstance(event, Linked):
            return out
        for effect in self.accumulator.handle(event, now):
            if isinstance(effect, Apply):
                self.weights += effect.update
                self.applied.append((effect.run, effect.round, effect.update.copy()))
            else:
                out.append(effect)
        self.peak = max(self.peak, self.accumulator.holds)
        return out


class WorkerCore(Greets):
    """Trains for `seconds` of virtual time, unless `trains` says that it does not."""

    def __init__(self, world: World, client: RoundClient, seconds: Callable[[], float]) -> None:
        super().__init__(Hello(client.incarnation, 0, 0))
        self.world, self.client, self.seconds = world, client, seconds
        self.remembered: list[tuple[int, int]] = []
        self.ends: list[Over] = []
        self.make: Callable[[Plan], Input] = self.plain
        self.edit: Callable[[Any], Any] = lambda effect: effect
        """A client that lies."""
        self._trained: list[tuple[float, int, Plan]] = []

    @property
    def wake_at(self) -> float:
        return min([self.client.wake_at, self._at, *(when for when, _, _ in self._trained)], default=inf)

    def model(self) -> bytes:
        shards = self.world.net.shards
        return model_digest(LAYOUT, [shards[index].digest() for index in range(self.world.shards)])

    def plain(self, plan: Plan) -> Input:
        draw = np.random.default_rng([self.client.incarnation, plan.round])
        update = draw.uniform(-plan.clip, plan.clip, plan.elements).astype(np.float32)
        metrics = {name: float(draw.normal()) for name in plan.metrics}
        return Input(update, float(draw.integers(1, 9)), metrics, self.model())

    def handle(self, event: Any, now: float) -> list[Any]:
        shards = tuple(self.world.net.shards[index].incarnation for index in range(self.world.shards))
        effects = [*self.client.handle(ShardsAre(shards), now), *self.client.handle(event, now)]
        for when, session, plan in list(self._trained):
            if when <= now:
                self._trained.remove((when, session, plan))
                given = self.make(plan)
                self.world.inputs[session, self.client.name] = given
                effects += self.client.handle(Trained(session, given), now)
        out = self.greet(event, now)
        for effect in effects:
            match effect:
                case Invited(session, plan):
                    self.world.plans[session] = plan
                    self._trained.append((now + self.seconds(), session, plan))
                case Remember(run, number):
                    self.remembered.append((run, number))
                case Over():
                    self.ends.append(effect)
                case _:
                    edited = self.edit(effect)
                    out += edited if isinstance(edited, list) else [edited]
        return out


class RoundNet(Sim):
    """A cluster.

    Args:
        sizes: elements of each shard.
    """

    def __init__(
        self,
        seed: int,
        workers: int,
        sizes: tuple[int, ...] = (5,),
        recipe: Recipe | None = None,
        faults: Faults | None = None,
        policy: Policy | None = None,
        seconds: float = 0.5,
    ) -> None:
        super().__init__(seed, faults or Faults())
        self.wishes: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self.recipe = recipe or Recipe(rounds=1)
        if self.recipe.deadlines[0] == 20.0:
            self.recipe = replace(self.recipe, deadlines=DEADLINES)
        self.recipe = replace(self.recipe, least=max(self.recipe.least, workers))
        self.world = World(self, len(sizes), sizes)
        self.wire: list[tuple[str, Any]] = []
        """To whom, and which frames."""
        self.identities = {f"w{number}": Identity.fresh() for number in range(1, workers + 1)}
        self.peers = {name: each.public for name, each in self.identities.items()}
        self.seconds = seconds
        self.policy = policy or Policy(self.recipe.protection, minimum=1 if self.recipe.protection == CLEAR else 2)
        self.coordinator = self.start_coordinator(1)
        self.shards: dict[int, ShardCore] = {}
        for index in range(len(sizes)):
            self.start_shard(index)
        self.workers: dict[str, WorkerCore] = {}
        for number in range(1, workers + 1):
            self.start_worker(number)

    def start_coordinator(self, run: int) -> CoordinatorCore:
        peers = self.peers if self.recipe.active else None
        self.coordinator = CoordinatorCore(self.world, run, self.recipe, peers)
        self.add(Node("coordinator", self.coordinator))
        return self.coordinator

    def start_shard(self, index: int, life: int = 0) -> ShardCore:
        core = ShardCore(self.world, index, life)
        self.shards[index] = core
        node = self.add(Node(f"s{index}", core))
        self.door(node, COORDINATOR, "coordinator")
        return core

    def start_worker(self, number: int) -> WorkerCore:
        name = f"w{number}"
        identity = self.identities[name] if self.recipe.active else None
        peers = self.peers if self.recipe.active else None
        sizes = sum(self.world.sizes)
        client = RoundClient(number, name, self.policy, sizes, LAYOUT, identity, peers)
        core = WorkerCore(self.world, client, lambda: self.random.uniform(0.5, 1.5) * self.seconds)
        self.workers[name] = core
        node = self.add(Node(name, core))
        self.door(node, COORDINATOR, "coordinator")
        for index in range(self.world.shards):
            self.door(node, index, f"s{index}")
        return core

    def _deliver(self, name: str, peer: Any, frames: list[bytes]) -> None:
        self.wire.append((name, frames))
        super()._deliver(name, peer, frames)

    def lose(self, name: str, lease: float = 1.0) -> None:
        """A worker dies; the coordinator learns it when its lease has ended."""
        self.crash(name)
        incarnation = int(name[1:])
        node = self.nodes.get("coordinator")

        def told() -> None:
            if self.nodes.get("coordinator") is node and node is not None:
                for effect in node.core.gone(incarnation, self.now):
                    self._send(node, effect.peer, effect.message)
                self._schedule_tick(node)

        self.at(self.now + lease, told)

    # --- going on

    def when(self, condition: Callable[[], bool], act: Callable[[], None]) -> None:
        """Do something once, the moment that a condition holds; looked at after every event."""
        self.wishes.append((condition, act))

    def give(self, node: Node, event: Any) -> None:
        super().give(node, event)
        for wish in list(self.wishes):
            if wish[0]():
                self.wishes.remove(wish)
                wish[1]()

    @property
    def stage(self) -> Stage | None:
        """Of the session under way."""
        session = self.coordinator.rounds.session
        return session.stage if session else None

    def go(self, rounds: int = 1, until: float = 400.0) -> bool:
        """Until so many sessions have ended, and everybody knows it."""

        return self.run(self.now + until, lambda: self.over(rounds))

    def over(self, rounds: int = 1) -> bool:
        """Have so many sessions of this coordinator ended, and is nobody told of them any more? The next may have begun."""
        ended, session = self.coordinator.ended, self.coordinator.rounds.session
        return len(ended) >= rounds and (session is None or session.number != ended[-1].session)

    # --- what must hold

    def expected(self, session: int) -> tuple[np.ndarray[Any, Any], list[str], float]:
        """The plain weighted average of a session's survivors, their names, and how far off the shards may be."""
        held, plan = self.world.sessions[session], self.world.plans[session]
        names = [f"w{incarnation}" for incarnation in held.survivors]
        inputs = [self.world.inputs[session, name] for name in names]
        weights = [
            UNIFORM.value if plan.uniform else ratio(each.weight, plan.reference, plan.cap).value for each in inputs
        ]
        updates = [np.clip(each.update.astype(np.float64), -plan.clip, plan.clip) for each in inputs]
        mean = np.average(updates, axis=0, weights=weights)
        scale = plan.scale(len(held._members))
        step = 0.5 if plan.bits == 32 else 1.0
        bound = len(names) * step / (scale.units * sum(weights)) + 4e-7 * plan.clip
        return mean, names, bound

    def check(self) -> int:
        """Every round that was released is the average of its survivors at every shard, and nothing else is; how many were."""
        sums = [0] * self.world.shards
        for end in self.coordinator.ended:
            if end.released is None:
                continue
            mean, names, bound = self.expected(end.session)
            assert len(names) == len(end.released.survivors) >= self.world.plans[end.session].minimum
            start = 0
            for index, size in enumerate(self.world.sizes):
                shard = self.shards[index]
                found = [
                    u for run, number, u in shard.applied if (run, number) == (self.coordinator.rounds.run, end.round)
                ]
                assert len(found) == 1, (index, end)
                assert np.abs(found[0] - mean[start : start + size]).max(initial=0.0) <= bound
                sums[index] += 1
                start += size
        assert all(len(shard.applied) == sums[index] for index, shard in self.shards.items())
        return sums[0]
