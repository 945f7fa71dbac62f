"""Random schedules in which the mode becomes federated and something else again, checked against the guarantees (rung T1)."""

from __future__ import annotations

import os
import random
from math import inf

from history import check_coverage, check_cuts, check_once, check_staleness
from simapp import Job, story
from simnet import Faults
from simrounds import FedCluster, check_cut_rounds, check_rounds
from test_simulation import blow, cut

from shoal.protocol.join import CLEAR, SECAGG

SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))
SCHEDULES = int(os.environ.get("SHOAL_FEDERATED_SCHEDULES", "40"))
KINDS = ("crash", "crash and restart", "stop", "cut", "join", "server")


def play(seed: int) -> FedCluster:
    """One random schedule."""
    dice = random.Random(seed)
    faults = Faults(
        drop=dice.choice((0.0, 0.01, 0.05)),
        repeat=dice.choice((0.0, 0.05)),
        delay=dice.choice((0.002, 0.02, 0.1)),
        reset=dice.choice((0.0, 0.0, 0.01)),
    )
    workers = dice.randint(2, 4)
    cluster = FedCluster(
        seed,
        protection=dice.choice((CLEAR, SECAGG)),
        workers=workers,
        shards=dice.randint(1, 2),
        mode=dice.choice(("async", "sync", "federated")),
        staleness=dice.choice((0.0, 1.0, inf)),
        lease=3.0,
        faults=faults,
        job=Job(length=dice.choice((40, 200, 400)), batch=4, size=dice.choice((4, 8)), epochs=dice.randint(1, 2)),
        min_workers=dice.choice((1, workers)),
        sharing=dice.random() < 0.3,
    )
    sim = cluster.sim
    for number in range(dice.randint(0, 4)):
        when, name = dice.uniform(0.1, 8.0), f"w{dice.randrange(workers)}"
        kind = dice.choice(KINDS)
        sim.at(when, lambda kind=kind, name=name, number=number: blow(cluster, kind, name, number, dice))
    for _ in range(dice.randint(1, 3)):
        to = dice.choice(("async", "sync", "federated", "federated")), dice.choice((0.0, 1.0, inf))
        sim.at(dice.uniform(0.05, 8.0), lambda to=to: cluster.switch(*to))
    cutting = random.Random(seed + 6)
    for _ in range(cutting.choice((0, 2, 8))):
        sim.at(cutting.uniform(0.5, 14.0), lambda: cut(cluster, cutting, 5.0))
    sim.at(20.0, lambda: setattr(sim, "quiet", True))

    def back() -> None:
        """Data are leased again, so that there is an end; asked until it is so."""
        if cluster.coordinator.modes.now.mode == "federated" or cluster.coordinator.modes.changing:
            cluster.switch("async", 1.0)
            sim.at(sim.now + 2.0, back)

    sim.at(dice.uniform(9.0, 30.0), back)
    return cluster


def judge(cluster: FedCluster) -> None:
    finished = cluster.run()
    assert finished, "the run did not end\n" + story(cluster)
    assert not [app.errors for app in cluster.apps.values() if app.errors], story(cluster)
    final = cluster.final_values()
    if not cluster.forgotten:
        check_staleness(cluster.history)
        check_once(cluster.history, final)
        check_cuts(cluster.history)
        check_cut_rounds(cluster)
    check_rounds(cluster, final)
    check_coverage(cluster.history, cluster.job.length, cluster.job.epochs)


def test_random_schedules_with_rounds() -> None:
    """Every guarantee of the other modes, and of rounds: all or nothing, of the survivors, and nobody waits for ever."""
    print(f"SHOAL_SEED={SEED} SHOAL_FEDERATED_SCHEDULES={SCHEDULES}")
    released = puts = cuts = 0
    for seed in range(SEED, SEED + SCHEDULES):
        try:
            cluster = play(seed)
            judge(cluster)
        except BaseException as error:
            error.add_note(f"reproduce with SHOAL_SEED={seed} SHOAL_FEDERATED_SCHEDULES=1")
            raise
        released += len(cluster.released)
        puts += len(cluster.puts)
        cuts += len(cluster.history.cuts)
    assert SCHEDULES < 40 or (released > SCHEDULES and puts > 2 * released and cuts > SCHEDULES / 2)
