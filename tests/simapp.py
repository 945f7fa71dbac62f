"""A simulated cluster: real cores, and workers that run the training loop of the README as a little state machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from typing import Any

import numpy as np
from history import CutDone, History, Life, PullDone, Update, Violation
from simevals import Appraising
from simnet import Faults, Node, Sim

from shoal.protocol.codecs import BF16, FP16, RAW, Codec
from shoal.protocol.coding import decode, encode
from shoal.protocol.effects import COORDINATOR, Fail, Received, Resolve, Tick
from shoal.protocol.errors import ServerLost, WorkerEvicted
from shoal.protocol.messages import Place, Switch
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.records import Phase, Phases
from shoal.protocol.rules import SGD
from shoal.ps.coordinator import Coordinator
from shoal.ps.settings import Settings
from shoal.ps.shard import Shard
from shoal.worker import calls
from shoal.worker.core import Core

ELEMENTS = 1024
"""Elements of each shard's one block, and updates that a run may make."""

ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11}
"""Of a value that was pulled, relative to it."""


@dataclass(frozen=True)
class Job:
    """What the workers train on."""

    length: int = 40
    batch: int = 4
    size: int = 8
    epochs: int = 2


class Memory:
    """A region: what a worker shares with the shards of its machine. `numbers` gives each a number of its own."""

    def __init__(self, app: App) -> None:
        sim = app.cluster.sim
        assert app.core.layout is not None
        self.number = next(app.cluster.region_numbers)
        self.token = sim.random.randbytes(32)
        self.spans = app.core.layout.plan.blocks
        self.bytes = sim.memory[self.token] = bytearray(app.core.layout.plan.size)
        app._call(calls.ShareCalled, lambda _: None, self.number, 1, 3, len(self.bytes), self.token)

    def block(self, index: int) -> memoryview:
        start, stop = self.spans[index]
        return memoryview(self.bytes)[start:stop]


class App(Appraising):
    """One worker process: registers, then claims, pulls, computes, pushes, until the data is done."""

    def __init__(self, cluster: Cluster, name: str, attempt: int, pace: float) -> None:
        self.cluster, self.name, self.pace = cluster, name, pace
        sim = cluster.sim
        self.core = Core(
            Place(0, 0, "coordinator", 1, ""), (name, attempt, "sim", 1), lambda: sim.random.getrandbits(63) | 1
        )
        self.node = Node(name, self.core)
        self.node.on_effect = self._on_effect
        self.finished = False
        self.errors: list[Exception] = []
        self._tickets = count(1)
        self._then: dict[int, Callable[[Any], None]] = {}
        self._lease: calls.Lease | None = None
        self._at = 0
        self._life: Life | None = None
        self._paused = False
        self._own: list[int] = []
        self._held: dict[int, Any] = {}
        """What it pulled last, by block: it fills a shard with that."""
        self._shown: Memory | None = None
        """Where pulls may be written."""
        self._seen = b""
        """What was there when the last pull was answered."""
        self._free: list[Memory] = []
        """Where pushes may lie, used by none."""
        sim.add(self.node)
        self._call(calls.OpenCalled, self._opened)

    # --- the script

    def _opened(self, _: Any) -> None:
        spec = self.cluster.spec
        zeros = np.zeros(ELEMENTS, np.float32).tobytes()

        def source(block: int) -> bytes:
            values = self._held.get(block, zeros)
            shard = self.core.fleet.layout.blocks[block].shard
            self.cluster.fillings[self.core.incarnation, shard] = np.frombuffer(values, np.float32).tolist()
            return values

        self._call(calls.RegisterCalled, self._registered, spec.description, source)

    def _registered(self, _: Any) -> None:
        job = self.cluster.job
        self._call(calls.DeclareCalled, lambda _: self._next_lease(), "data", job.length, job.batch, job.size, 0, 0)

    def _next_lease(self) -> None:
        self._call(calls.ClaimCalled, self._leased, "data", self.cluster.job.epochs)

    def _leased(self, lease: calls.Lease | None) -> None:
        if lease is None:
            self._give(calls.PauseCalled())
            return self._pull(self._finish)
        if lease.incarnation != self.core.incarnation:
            return self._next_lease()
        self._lease, self._at = lease, lease.start
        self._call(calls.ResumeCalled, lambda _: self._step())

    def _step(self) -> None:
        assert self._lease is not None
        if self._lease.incarnation != self.core.incarnation or self._at >= self._lease.stop:
            return self._next_lease()
        self._pull(self._compute)

    def _compute(self) -> None:
        sim = self.cluster.sim
        sim.at(sim.now + sim.random.uniform(0.2, 1.8) * self.pace, self._push)

    def _push(self) -> None:
        if self.cluster.sim.nodes.get(self.name) is not self.node:
            return
        if self.node.stopped:
            return self.cluster.sim.at(self.cluster.sim.now + 0.05, self._push)
        lease = self._lease
        assert lease is not None
        if lease.incarnation != self.core.incarnation or not self.core.fleet.running:
            return self._pull(self._next_lease)
        stop = min(self._at + self.cluster.job.batch, lease.stop)
        update = self.cluster.new_update(self.core, lease, self._at, stop)
        self._own.append(update.element)
        payload = np.zeros(ELEMENTS, np.float32)
        payload[update.element] = -1.0
        memory = (self._free.pop() if self._free else Memory(self)) if self.cluster.sharing else None
        parts = []
        for block in self.core.layout.blocks:
            buffer: Any = payload.tobytes()
            near = memory is not None and (update.element + block.index) % 2 == 0
            codec = RAW if near else self.cluster.push_codec.number
            if memory is not None and codec == RAW:
                memory.block(block.index)[:] = buffer
                buffer = memory.block(block.index)
            elif codec != RAW:
                buffer = bytes(encode(self.cluster.push_codec, payload))
            parts.append(calls.Part(block.shard, (block.index,), (), (buffer,), codec))

        def acked(result: Any) -> None:
            update.acked_at = self.cluster.sim.now
            if memory is not None:
                self._free.append(memory)

        def lost(error: Exception) -> None:
            if memory is not None:  # a shard may yet read it: it is never used again
                self._give(calls.UnshareCalled(memory.number))
            self._lost(update, error)

        number = memory.number if memory else 0
        if self.cluster.piecemeal and self.cluster.sim.random.random() < 0.3:  # gradients first, the step's end after
            self._call(calls.PushCalled, lambda _: None, tuple(parts), False, update.examples, (), number, failed=lost)
            parts, early = [], False
        else:
            early = self._early(parts, number)
        self._call(calls.PushCalled, acked, tuple(parts), True, update.examples, (), number, early, failed=lost)
        self._at = stop
        self._give(calls.DoneCalled(lease, stop - lease.start, stop == lease.stop))
        self._step()

    def cut(self, patience: float) -> None:
        """Read everything as it is at one boundary, beside all else; after so long nobody waits for it any more."""
        sim = self.cluster.sim
        layout, asked, values = self.core.layout, sim.now, dict[int, list[float]]()
        if layout is None or self.finished or sim.nodes.get(self.name) is not self.node:
            return

        def sink(block: int, payload: Any) -> None:
            values[layout.blocks[block].shard] = np.frombuffer(payload, np.float32).tolist()

        def made(cut: calls.CutMade) -> None:
            history.cuts.append(CutDone(asked, sim.now, values, dict(cut.clocks), cut.closed))

        history, ticket = self.cluster.history, self._call(calls.CutCalled, made, sink, failed=lambda _: None)
        sim.at(sim.now + patience, lambda: self._give(calls.Cancelled(ticket)) if ticket in self._then else None)

    def _early(self, parts: list[calls.Part], region: int) -> bool:
        """Now and then some of it leaves before; now and then that was something else, and must not count."""
        random = self.cluster.sim.random
        if random.random() < 0.6:
            return False
        right = random.random() < 0.7
        for part in parts:
            if random.random() < 0.7:
                buffer = bytes(part.buffers[0]) if right else np.full(ELEMENTS, 7.0, np.float32).tobytes()
                codec = part.codec if right else RAW
                self._give(calls.EarlyCalled((calls.Part(part.shard, part.blocks, (), (buffer,), codec),), region))
        return right

    def _lost(self, update: Update, error: Exception) -> None:
        update.failed, update.lost_with = True, type(error).__name__
        if not isinstance(error, WorkerEvicted | ServerLost):
            self.errors.append(error)

    def _pull(self, then: Callable[[], None]) -> None:
        asked = self.cluster.sim.now
        own = tuple(self._own)
        blocks = {block.shard: () for block in self.core.layout.blocks}

        def pulled(answer: calls.Pulled) -> None:
            life = self.core.incarnation
            own_now = tuple(e for e in own if self.cluster.history.updates[e].incarnation == life)
            values = {}
            for block in self.core.layout.blocks:
                found = answer.blocks.get(block.index, came.get(block.index))
                if found is None:
                    assert shown is not None
                    found = shown.block(block.index)
                self._held[block.index] = bytes(found)
                values[block.shard] = np.frombuffer(found, np.float32).tolist()
            self.cluster.history.pulls.append(
                PullDone(life, answer.clock, asked, self.cluster.sim.now, values, own_now, self.core.fleet.running)
            )
            self._seen = bytes(shown.bytes) if shown else b""
            if not self.cluster.exempt(self.name, asked):
                self.cluster.history.waits.append((self.name, asked, self.cluster.sim.now))
            then()

        if self.cluster.sharing and self._shown is None:
            self._shown = Memory(self)
        elif self._shown is not None and bytes(self._shown.bytes) != self._seen:
            raise Violation(f"{self.name}: a shard wrote to a region while nobody waited for it")
        shown = self._shown
        number, codec = shown.number if shown else 0, self.cluster.pull_codec.number
        came: dict[int, Any] = {}

        def sink(block: int, payload: Any, codec: int) -> None:
            found = decode(codec, payload, ELEMENTS)
            if shown is None:
                came[block] = found
            else:  # as a worker has it: one memory for both ways, and what came last counts
                shown.block(block)[:] = found.tobytes()

        what = (blocks, {}, number, sink if codec else None, codec)
        self._call(calls.PullCalled, pulled, *what, failed=lambda error: self._retry(error, then))

    def _retry(self, error: Exception, then: Callable[[], None]) -> None:
        if not isinstance(error, ServerLost):
            self.errors.append(error)
        if self._shown is not None:  # a shard may yet write to it
            self._give(calls.UnshareCalled(self._shown.number))
            self._shown, self._seen = None, b""
        self._pull(then)

    def _finish(self) -> None:
        self._call(calls.CloseCalled, self._closed)

    def _closed(self, _: Any) -> None:
        self.finished = True

    # --- plumbing

    def _call(
        self, kind: Any, then: Callable[[Any], None], *args: Any, failed: Callable[[Exception], None] | None = None
    ) -> int:
        ticket = next(self._tickets)

        def again(error: Exception) -> None:
            if isinstance(error, ServerLost):  # a script would raise; this one is stubborn
                self._call(kind, then, *args, failed=failed)
            else:
                self.errors.append(error)

        self._then[ticket] = then
        self._then[-ticket] = failed or again
        self._give(kind(ticket, *args))
        return ticket

    def _give(self, event: Any) -> None:
        # From within an effect the core is not in `handle` any more, but its effects are still being performed: wait for the queue.
        self.cluster.sim.at(self.cluster.sim.now, lambda: self.cluster.sim.give(self.node, event))

    def _on_effect(self, effect: Resolve | Fail, now: float) -> None:
        match effect:
            case Resolve(ticket, value):
                self._then.pop(-ticket)
                self._then.pop(ticket)(value)
            case Fail(ticket, error):
                self._then.pop(ticket)
                self._then.pop(-ticket)(error)


class Cluster:
    """A coordinator, shards and workers in one simulation."""

    def __init__(
        self,
        seed: int,
        *,
        workers: int = 3,
        shards: int = 2,
        mode: str = "async",
        staleness: float = 1.0,
        lease: float = 3.0,
        faults: Faults = Faults(),  # noqa: B008 - frozen
        job: Job = Job(),
        min_workers: int = 1,
        sharing: bool = False,
        push_codec: Codec = Codec(),  # noqa: B008 - frozen
        pull_codec: Codec = Codec(),  # noqa: B008 - frozen
        make_shard: Callable[..., Shard] = Shard,
        make_coordinator: Callable[..., Coordinator] = Coordinator,
        make_app: Callable[..., App] = App,
    ) -> None:
        self.sim = Sim(seed, faults)
        self.job, self.lease, self.sharing = job, lease, sharing
        self.push_codec, self.pull_codec = push_codec, pull_codec
        self.region_numbers = count(1)
        self.history = History({0: Phase(0, mode, staleness)}, sharing, ROUNDING.get(pull_codec.number, 0.0))
        self.spec = ModelSpec((Tensor("marks", "float32", (shards * ELEMENTS,)),), (SGD(lr=1.0),))
        self.settings = Settings(
            mode=mode,
            staleness=staleness,
            lease=lease,
            min_workers=min_workers,
            min_shards=shards,
            block_bytes=4 * ELEMENTS,
        )
        self.make_shard, self.make_coordinator, self.make_app = make_shard, make_coordinator, make_app
        self.apps: dict[str, App] = {}
        self.marks: dict[int, set[int]] = {}
        """Elements that have changed in cuts that were evaluated, by the cuts' clocks."""
        self.piecemeal = False
        """Are some steps pushed in several messages?"""
        self.to_come = 0
        """Workers that will be restarted."""
        self._attempts: dict[str, int] = {}
        self._live: set[int] = set()
        self._filled: dict[int, int] = {}
        self.fillings: dict[tuple[int, int], list[float]] = {}
        """What a filler gave last, by its incarnation and the shard."""
        self.troubled: dict[str, float] = {}
        self._elements = count()
        self._clocks_lost = False
        self.start_coordinator()
        for index in range(shards):
            self.start_shard(index)
        for index in range(workers):
            self.start_worker(f"w{index}")

    # --- processes

    def start_coordinator(self) -> None:
        self.coordinator = self.make_coordinator(self.sim.random.getrandbits(63), self.settings)
        self.add_coordinator()

    def add_coordinator(self) -> None:
        self.sim.add(Node("coordinator", self.coordinator))

    def start_shard(self, index: int) -> None:
        node = Node(f"s{index}", self.make_shard(self.sim.random.getrandbits(63) | 1, f"s{index}", 1))
        self.sim.add(node)
        self.sim.door(node, COORDINATOR, "coordinator")

    def crash_server(self, name: str, seconds: float) -> None:
        """SIGKILL, and a new process at the same address after so long; it knows nothing.

        Who starts the coordinator of a run that has begun lets it wait for no quorum again: some workers may be done.
        """
        self.sim.crash(name)

        def again() -> None:
            if name == "coordinator":
                if self.coordinator.opened_at is not None:
                    self.settings = replace(self.settings, min_workers=1)
                self.start_coordinator()
            else:
                self.start_shard(int(name[1:]))
            self.watch()

        self.sim.at(self.sim.now + seconds, again)

    def switch(self, mode: str, staleness: float) -> None:
        """An operator asks for another mode. Who restarts the coordinator afterwards gives that mode, too."""
        node = self.sim.nodes.get("coordinator")
        if node is not None:
            self.sim.give(node, Received(b"operator|0|0", Switch(1, mode, staleness)))

    def start_worker(self, name: str, attempt: int = 0) -> None:
        self.apps[name] = self.make_app(self, name, attempt, pace=self.sim.random.choice((0.01, 0.03, 0.1)))

    def restart_worker(self, name: str) -> None:
        self.to_come -= 1
        self._attempts[name] = self._attempts.get(name, 0) + 1
        self.start_worker(name, self._attempts[name])

    def crash_worker(self, name: str) -> None:
        app = self.apps.pop(name)
        self.sim.crash(name)
        life = self.history.lives.get(app.core.incarnation)
        if life is not None:
            life.ended_at = min(life.ended_at, self.sim.now)

    def trouble(self, name: str) -> None:
        """From now on this worker's waits are its own fault."""
        self.troubled[name] = self.sim.now

    def exempt(self, name: str, asked: float) -> bool:
        return name in self.troubled

    # --- the record

    def new_update(self, core: Core, lease: calls.Lease, start: int, stop: int) -> Update:
        element = next(self._elements)
        assert element < ELEMENTS, "too many updates for one run"
        examples = float(stop - start)
        update = Update(element, core.incarnation, core.stats.clock, examples, lease.epoch, start, stop, self.sim.now)
        self.history.updates[element] = update
        return update

    def watch(self) -> None:
        """After every event: who is counted in, who has ended, which modes. An observer from above, not part of the system."""
        if "coordinator" in self.sim.nodes:
            self._live = {life.incarnation for life in self.coordinator.members}
            self._phase(self.coordinator.modes.phases)
        live, now = self._live, self.sim.now
        for shard in self.shards():
            if shard.filled and self._filled.get(shard.index) != shard.incarnation:
                if shard.index in self._filled:
                    values = self.fillings[shard._view.filler, shard.index]
                    self.history.refilled[shard.index].append((now, {i for i, v in enumerate(values) if v}))
                self._filled[shard.index] = shard.incarnation
        for app in self.apps.values():
            core = app.core
            if core.fleet.running and core.incarnation in live:
                life = self.history.lives.get(core.incarnation)
                if life is None:
                    life = self.history.lives[core.incarnation] = Life(
                        app.name, core.incarnation, now, core.stats.clock
                    )
                if not life.counted or life.counted[-1][1] <= now:
                    life.counted.append((now, inf))
                    self._resumed(life, core)
        for life in self.history.lives.values():
            running = any(
                app.core.incarnation == life.incarnation and app.core.fleet.running for app in self.apps.values()
            )
            if life.counted and life.counted[-1][1] == inf and (not running or life.incarnation not in live):
                life.counted[-1] = (life.counted[-1][0], now)
            if life.incarnation not in live and life.ended_at == inf:
                life.ended_at = now

    def _phase(self, known: Phases) -> None:
        """What the coordinator goes by: its settings if it is new, until a shard with a layout tells it what was agreed."""
        phases, updates, newest = self.history.phases, self.history.updates.values(), known[-1]
        if not updates:
            for clock in [clock for clock in phases if clock > newest.clock]:
                del phases[clock]
            phases.update({phase.clock: phase for phase in known})
            self.settings = replace(self.settings, mode=newest.mode, staleness=newest.staleness)
        elif newest.clock > max(phases):
            if any(update.clock >= newest.clock for update in updates if update.incarnation in self._live):
                raise Violation(f"{newest} begins where somebody has been")
            self._clocks_lost |= any(update.clock >= newest.clock for update in updates)
            phases[newest.clock] = newest
            self.settings = replace(self.settings, mode=newest.mode, staleness=newest.staleness)

    def _resumed(self, life: Life, core: Core) -> None:
        """A worker that was counted out may come back at a higher clock."""
        done = sum(update.incarnation == life.incarnation for update in self.history.updates.values())
        life.start_clock = core.stats.clock - done

    def check_evaluations(self) -> None:
        """Every part counts once, and all of an evaluation are of one version."""
        for result in self.coordinator.evaluations.results:
            marks = dict(result.sums).get("marks", 0.0) / self.job.length
            if result.examples != self.job.length or marks not in self.marks[result.clock]:
                raise Violation(f"evaluation {result}: {marks} of {self.marks[result.clock]}")

    @property
    def forgotten(self) -> bool:
        """Did all who knew of a change of mode, or of how far others were, die at the same time? Then nobody is to blame."""
        return self._clocks_lost or self.coordinator.modes.now != self.history.phases[max(self.history.phases)]

    def final_values(self) -> dict[int, list[float]]:
        found = {}
        for shard in self.shards():
            if shard.weights is not None and shard.weights.filled:
                store = shard.weights.store
                (block,) = store.blocks
                found[shard.index] = np.frombuffer(store.snapshot(block), np.float32).tolist()
        return found

    def shards(self) -> list[Shard]:
        return [node.core for node in self.sim.nodes.values() if isinstance(node.core, Shard)]

    def run(self, until: float = 600.0) -> bool:
        """Until every worker has finished its data. False if the virtual time ran out."""
        give = self.sim.give

        def observed(node: Node, event: Any) -> None:
            give(node, event)
            self.watch()

        self.sim.give = observed  # type: ignore[method-assign]
        finished = self.sim.run(until, lambda: not self.to_come and all(app.finished for app in self.apps.values()))
        if finished:  # the last view, which lacks those who have left, may close the last step
            self.sim.quiet = True
            self.sim.run(self.sim.now + 3.0, lambda: False)
        return finished


def story(cluster: Cluster) -> str:
    """What to print when a run fails."""
    states = [
        f"{a.name}: {a.core.phase.value}, clock {a.core.stats.clock}, {a.core.why_waiting()}, {a.errors}"
        for a in cluster.apps.values()
    ]
    return "\n".join([*cluster.sim.log[-40:], *states])


__all__ = ["App", "Cluster", "Job", "Tick", "story"]
