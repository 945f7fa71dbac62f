"""The staleness rule at a shard: every pull is answered when the rule allows it, in that very event (rung T0, SPEC §6)."""

from __future__ import annotations

from math import inf
from typing import Any

from cores import RUN, SHARD, SMALL, Bench, ShardBench, answered, only, peer_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shoal.protocol import messages as m
from shoal.protocol.effects import COORDINATOR
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD
from shoal.ps.shard import MAX_PARKED, Shard

MIB = 1024 * 1024
SIZES = [size * MIB // 4 for size in (3, 1, 5, 2, 1)]


class StalenessMachine(RuleBasedStateMachine):
    """Workers come, push, pull, pause and vanish; beside the shard a model that tries everything again after each event.

    Each push holds a gradient of -1 under SGD with lr 1, so the weight counts what was applied: in `async` every push, in `sync`
    every closed step that had a push.
    """

    @initialize(
        mode=st.sampled_from(("async", "sync")),
        bound=st.sampled_from((0.0, 1.0, 2.0, inf)),
        quorum=st.integers(0, 3),
        started=st.integers(0, 3),
    )
    def begin(self, mode: str, bound: float, quorum: int, started: int) -> None:
        self.mode, self.bound, self.quorum, self.opened = mode, bound, quorum, quorum == 0
        self.members = [1, 2, 3]
        self.bench = ShardBench(self.members, mode=mode, staleness=bound, quorum=quorum)
        self.own = dict.fromkeys(self.members, 0)
        """The clocks as the workers know them; `clocks` are those counted in at the shard."""
        self.clocks: dict[int, int] = {}
        self.min = self.highest = self.applied_pushes = 0
        self.counted: set[int] = set()
        self.running: set[int] = set()
        self.streams: dict[int, list[tuple[str, int]]] = {worker: [] for worker in self.members}
        self.applied = dict.fromkeys(self.members, 0) | {1: 1}  # the filling
        self.parked: dict[int, tuple[int, int, int]] = {}
        self.pushed_steps: set[int] = set()
        for worker in 2 * self.members[:started]:
            self._come(worker)

    # --- the model

    def _applied(self, worker: int) -> bool:
        """Try the head of a stream."""
        kind, clock = self.streams[worker][0]
        if kind == "push" and self.mode == "sync" and clock > self.min:
            return False
        self.streams[worker].pop(0)
        self.applied[worker] += 1
        if kind == "pause":
            del self.clocks[worker]
        elif kind == "enter":
            self.clocks[worker] = self.min
            self.counted.add(worker)
            self.opened |= len(self.counted) >= self.quorum
        else:
            if kind == "push":
                self.applied_pushes += 1
                self.pushed_steps.add(clock)
                clock += 1
            self.clocks[worker] = clock
            self.highest = max(self.highest, clock)
        return True

    def _judge(self, said: list[Any]) -> None:
        """Bring the model to rest, and compare."""
        moved = True
        while moved:
            if self.opened:
                self.min = max(self.min, min(self.clocks.values(), default=self.highest))
            moved = any(self._applied(worker) for worker in self.members if self.streams[worker])
        due = {request for request, pull in self.parked.items() if self._allowed(*pull)}
        assert due == set(answered(said))
        for request in due:
            del self.parked[request]
        report = self.bench.report()
        assert (self.opened, self.min) == (report.opened, report.floor)
        assert self.clocks == dict(report.clocks)
        if self.opened:
            steps = len({step for step in self.pushed_steps if step < self.min})
            assert (steps if self.mode == "sync" else self.applied_pushes) == self.bench.weights[0]

    def _allowed(self, worker: int, clock: int, after: int) -> bool:
        bound = 0.0 if self.mode == "sync" else self.bound
        counts = worker in self.clocks or self.mode == "sync"
        return self.opened and self.applied[worker] >= after and (not counts or self.min >= clock - bound)

    # --- what workers do

    def _pick(self, data: st.DataObject, workers: set[int]) -> int:
        return data.draw(st.sampled_from(sorted(workers)))

    @precondition(lambda self: set(self.members) - self.running)
    @rule(data=st.data())
    def enter_or_start(self, data: st.DataObject) -> None:
        self._come(self._pick(data, set(self.members) - self.running))

    def _come(self, worker: int) -> None:
        if self.streams[worker]:  # its pause waits behind a push
            return
        if worker in self.clocks:
            self.running.add(worker)
            self.streams[worker].append(("start", self.own[worker]))
            return self._judge(self.bench.do(m.Start, worker, self.own[worker]))
        said = self.bench.do(m.Enter, worker)
        self.streams[worker].append(("enter", 0))
        self._judge(said)
        self.own[worker] = max(self.own[worker], only(m.Ack, said).min_clock)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        worker = self._pick(data, self.running)
        self.streams[worker].append(("push", self.own[worker]))
        self.own[worker] += 1
        self._judge(self.bench.push(worker, self.own[worker] - 1, -1.0, -1.0))

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        worker = self._pick(data, set(self.members))
        self.parked[self.bench.requests + 1] = (worker, self.own[worker], self.bench.sequence[worker])
        self._judge(self.bench.pull(worker, self.own[worker], after=self.bench.sequence[worker]))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        worker = self._pick(data, self.running)
        self.running.remove(worker)
        self.streams[worker].append(("pause", 0))
        self._judge(self.bench.do(m.Pause, worker))

    @rule(gone=st.integers(1, 12), comes=st.booleans())
    def the_view_changes(self, gone: int, comes: bool) -> None:
        """One worker may be gone, one may have come."""
        for worker in {gone} & set(self.members):
            self.members.remove(worker)
            self.clocks.pop(worker, None)
            self.running.discard(worker)
            self.counted.discard(worker)
            self.parked = {request: pull for request, pull in self.parked.items() if pull[0] != worker}
        if comes:
            worker = max(self.own) + 1
            self.members.append(worker)
            self.own[worker], self.applied[worker], self.streams[worker] = 0, 0, []
        self.opened |= len(self.counted) >= self.quorum
        self._judge(self.bench.view(self.members, quorum=self.quorum))


StalenessMachine.TestCase.settings = settings(deadline=None, max_examples=120, stateful_step_count=30)
test_pulls_are_answered_when_the_rule_allows = StalenessMachine.TestCase


def test_a_pull_gets_what_has_changed() -> None:
    """Blocks changed since the version that the worker holds, of those it asks for (§6.4.1)."""
    bench = ShardBench(spec=ModelSpec((Tensor("w", "float32", (3072,)),), (SGD(lr=1.0),)))
    first = only(m.Values, bench.pull(1))
    assert ((0, 1, 2), 3, 0, 1) == (first.blocks, first.version, first.part, first.parts)
    bench.do(m.Push, 1, 0, False, 1.0, (), 0, 0, (1,), (), False, 0, (bytes(4096),))

    since = [only(m.Values, bench.pull(1, since=3, blocks=blocks)) for blocks in ((), (0, 2), (1, 2))]
    assert [(1,), (), (1,)] == [values.blocks for values in since]
    assert {4} == {values.version for values in since}
    assert [("shape", 5)] == [(no.code, no.request) for no in bench.pull(1, blocks=(0, 7))]


def test_an_answer_comes_in_parts() -> None:
    """No part holds more than 4 MiB, unless it is one block (§2.3, §6.4.2)."""
    tensors = tuple(Tensor(f"t{i}", "float32", (elements,), i) for i, elements in enumerate(SIZES))
    bench = ShardBench(spec=ModelSpec(tensors, (SGD(),) * len(SIZES)), block_bytes=8 * MIB)
    parts = bench.pull(1)

    assert [(0, 1), (2,), (3, 4)] == [part.blocks for part in parts]
    assert [(i, 3, 5) for i in range(3)] == [(part.part, part.parts, part.version) for part in parts]


def test_a_probe_tells_where_things_stand() -> None:
    """`Ack` comes before `Alive`; that names what was received, the parked pulls, and whom they wait for (§6.4.3)."""
    bench = ShardBench(mode="sync")
    bench.start(1, 2)
    bench.push(2, 0, -1.0, 0.0)
    bench.push(2, 1, -1.0, 0.0)
    bench.pull(2, clock=2), bench.pull(2, clock=1)
    ack, alive = bench.hear(peer_of(2), m.Probe(2, SHARD))

    assert (m.Ack, 3, 0) == (type(ack), ack.seq, ack.min_clock)
    assert m.Alive(2, SHARD, 4, 0, "name1", 0, True, (1, 2)) == alive


def test_so_many_pulls_may_wait() -> None:
    """One more is refused as `busy`; one that waits may be repeated."""
    bench = ShardBench()
    bench.start(1, 2)
    bench.push(1, 0)
    for _ in range(MAX_PARKED):
        assert [] == bench.pull(1, clock=1)

    assert ["busy"] == [no.code for no in bench.pull(1, clock=1)]
    bench.requests = 0
    assert [] == bench.pull(1, clock=1)
    assert MAX_PARKED == len(answered(bench.do(m.Pause, 2)))


def test_a_shard_without_blocks_answers_as_soon_as_it_knows() -> None:
    """The pull is answered in the event that makes the condition true, also if that is the model (MUST, §6.2)."""
    bench = Bench(Shard(SHARD, "host", 1))
    layout = lay_out(SMALL, 2)
    bench.hear(COORDINATOR, m.ShardWelcome(SHARD, RUN, 1, 15.0))
    bench.hear(COORDINATOR, m.View(RUN, 1, (m.Phase(0, "async", 0.0),), False, 0, 0, (m.Member(1, "name1", False),)))
    bench.hear(peer_of(1), m.Hello(1, RUN, 1))
    bench.hear(peer_of(1), m.Pull(1, SHARD, 1, 0, 0, 0, 0, 0, ()))

    model = m.Model(RUN, 2, layout.block_bytes, layout.digest, (SMALL.description,))
    assert [1] == answered(bench.hear(COORDINATOR, model))
