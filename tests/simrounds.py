"""Workers that take part in federated rounds when their cluster makes them, in the simulation; and what must hold of the rounds.

Each worker puts an update of 1 in an element of its own into each round: what the shards have of it in the end is its share, or 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
from history import Violation
from simapp import ELEMENTS, App, Cluster

from shoal.protocol.errors import RoundClosed, ServerLost
from shoal.protocol.join import CLEAR
from shoal.protocol.records import Phases
from shoal.protocol.secure.plan import Policy
from shoal.protocol.session import blocks_digest, model_digest
from shoal.ps.recipe import Recipe
from shoal.worker import calls
from shoal.worker.parley import Input, Over

DEADLINES = (4.0, 6.0, 3.0, 8.0, 3.0, 4.0, 4.0)


def recipe(protection: str) -> Recipe:
    """Two are enough, and nobody is corrupt: few workers, many faults."""
    return Recipe(
        protection, minimum=2, threshold=2, corrupt=0.0, dropout=0.45, deadlines=DEADLINES, measured=True, clip=2.0
    )


@dataclass
class Put:
    """What a worker has put into a session."""

    element: int
    session: int
    incarnation: int
    name: str
    applied: bool = False
    """Was it told that the round is complete, with it?"""


class FedApp(App):
    """As its base; in federated mode it trains for rounds instead of leasing data."""

    # --- away from leases and back

    def _leased(self, lease: Any) -> None:
        if isinstance(lease, calls.Federated):
            return self._federate()
        super()._leased(lease)

    def _step(self) -> None:
        if not self.core.federated:
            return super()._step()
        lease = self._lease
        assert lease is not None
        if lease.incarnation == self.core.incarnation and self._at < lease.stop:
            self._give(calls.DoneCalled(lease, self._at - lease.start, True))
        self._federate()

    def _federate(self) -> None:
        self._give(calls.PauseCalled())
        kind = self.cluster.settings.recipe.protection
        policy = Policy(CLEAR, minimum=1) if kind == CLEAR else Policy(minimum=2, threshold=2, corrupt=0.0)
        self._call(calls.EnlistCalled, lambda _: self._next_round(), policy, ())

    def _next_round(self) -> None:
        self._call(calls.NextCalled, self._round, None, failed=self._not_this_one)

    def _not_this_one(self, error: Exception) -> None:
        if not isinstance(error, ServerLost | RoundClosed):
            self.errors.append(error)
        self._next_round()

    def _round(self, found: Any) -> None:
        if isinstance(found, calls.NoRound):
            if found.over:
                self.errors.append(AssertionError("rounds without an end are over"))
            self._give(calls.RetireCalled())
            return self._next_lease()
        self._take(found)

    def _take(self, begun: calls.RoundBegun) -> None:
        """Pull the weights of the round, in no codec and without a region."""
        blocks = {block.shard: () for block in self.core.layout.blocks}

        def pulled(answer: calls.Pulled) -> None:
            layout = self.core.layout
            digests = [blocks_digest(answer.blocks[b.index] for b in shard) for shard in layout.by_shard]
            if model_digest(bytes.fromhex(layout.digest), digests) != begun.plan.model:
                self._give(calls.DeclineCalled(begun.session, "other weights"))
                return self._next_round()
            for block in layout.blocks:
                self._held[block.index] = bytes(answer.blocks[block.index])
            sim = self.cluster.sim
            sim.at(sim.now + sim.random.uniform(0.1, 1.0), lambda: self._put(begun))

        self._call(calls.PullCalled, pulled, blocks, {}, 0, None, 0, failed=self._not_this_one)

    def _put(self, begun: calls.RoundBegun) -> None:
        sim = self.cluster.sim
        if sim.nodes.get(self.name) is not self.node:
            return
        if self.node.stopped:
            return sim.at(sim.now + 0.05, lambda: self._put(begun))
        put = self.cluster.new_put(begun.session, self.core.incarnation, self.name)
        update = np.zeros((begun.plan.elements // ELEMENTS, ELEMENTS), np.float32)
        update[:, put.element] = 1.0

        def over(end: Over) -> None:
            put.applied = end.result is not None
            self._next_round()

        given = Input(update.reshape(-1), 1.0, {}, begun.plan.model)
        self._call(calls.TrainedCalled, over, begun.session, given, failed=self._not_this_one)


class FedCluster(Cluster):
    """A cluster whose mode may become federated."""

    def __init__(self, seed: int, *, protection: str, **options: Any) -> None:
        self.puts: list[Put] = []
        self.released: dict[int, tuple[int, ...]] = {}
        """Survivors by session, of those whose release was decided on."""
        self.federated = 0
        self._protection = protection
        super().__init__(seed, make_app=FedApp, **options)

    def start_coordinator(self) -> None:
        self.settings = replace(self.settings, recipe=recipe(self._protection))
        below = self.sim.random.randrange
        self.coordinator = self.make_coordinator(self.sim.random.getrandbits(63), self.settings, 0.0, below)
        self.add_coordinator()

    def new_put(self, session: int, incarnation: int, name: str) -> Put:
        put = Put(next(self._elements), session, incarnation, name)
        assert put.element < ELEMENTS, "too many updates for one run"
        self.puts.append(put)
        self.history.put.add(put.element)
        return put

    def watch(self) -> None:
        super().watch()
        session = self.coordinator.federation.rounds.session
        if session is not None and session.result is not None:
            self.released[session.number] = session.survivors

    def _phase(self, known: Phases) -> None:
        self.federated += known[-1].mode == "federated" and known[-1].clock not in self.history.phases
        super()._phase(known)


def check_rounds(cluster: FedCluster, final: dict[int, list[float]]) -> None:
    """A round's average is in all shards or in none, is that of its survivors, and is there for whoever was told that it is.

    A shard that was filled again has of the rounds before what its filler had pulled.
    """
    by_session: dict[int, list[Put]] = defaultdict(list)
    for put in cluster.puts:
        by_session[put.session].append(put)
    for session, puts in by_session.items():
        survivors = cluster.released.get(session, ())
        share = 1.0 / len(survivors) if survivors else 0.0
        there = set()
        for shard, values in final.items():
            again = bool(cluster.history.refilled.get(shard))
            found = {put.element: values[put.element] for put in puts}
            wanted = {put.element: share if put.incarnation in survivors else 0.0 for put in puts}
            whole = all(abs(found[element] - wanted[element]) < 2e-3 for element in found)
            none = all(abs(value) < 1e-6 for value in found.values())
            if not (whole or none):
                raise Violation(f"shard {shard}, session {session}: {found}, and {wanted} or nothing is right")
            if share and not again:
                there.add(whole)
            told = any(put.applied for put in puts)
            if told and not whole and not again:
                raise Violation(f"shard {shard} has nothing of session {session}, of which workers were told")
        if len(there) > 1:
            raise Violation(f"session {session} is in some shards and not in others")


def check_cut_rounds(cluster: FedCluster) -> None:
    """A cut has a round at every shard or at none; a shard that was filled again has what its filler had."""
    for cut in cluster.history.cuts:
        first = {shard: min((at for at, _ in known), default=inf) for shard, known in cluster.history.refilled.items()}
        sound = {shard: values for shard, values in cut.values.items() if cut.done_at < first.get(shard, inf)}
        for session in cluster.released:
            elements = [put.element for put in cluster.puts if put.session == session]
            there = {shard: any(values[element] for element in elements) for shard, values in sound.items()}
            if len(set(there.values())) > 1:
                raise Violation(f"a cut at {cut.done_at:.3f} has session {session} at some shards: {there}")
