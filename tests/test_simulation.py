"""Random schedules over real cores, checked against the guarantees (rung T1)."""

from __future__ import annotations

import os
import random
from math import inf

import pytest
from history import check_coverage, check_cuts, check_once, check_release, check_staleness
from simapp import ELEMENTS, Cluster, Job, story
from simnet import Faults

from shoal.protocol.codecs import BF16, FP16, INT8, RAW, TOPK, Codec

SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))
SCHEDULES = int(os.environ.get("SHOAL_SCHEDULES", "700"))


KINDS = ("crash", "crash and restart", "stop", "cut", "join", "server")


def play(
    seed: int, kinds: tuple[str, ...] = KINDS, cuts: int = 0, evaluations: int = 0, **overrides: object
) -> Cluster:
    """One random schedule: shape, faults and blows of these kinds all come from the seed."""
    dice = random.Random(seed)
    mode = dice.choice(("async", "async", "sync"))
    faults = Faults(
        drop=dice.choice((0.0, 0.01, 0.05)),
        repeat=dice.choice((0.0, 0.05)),
        delay=dice.choice((0.002, 0.02, 0.2)),
        reset=dice.choice((0.0, 0.0, 0.01)),
    )
    workers = dice.randint(1, 4)
    options: dict[str, object] = {
        "workers": workers,
        "shards": dice.randint(1, 3),
        "mode": mode,
        "staleness": dice.choice((0.0, 1.0, 3.0, inf)),
        "lease": 3.0,
        "faults": faults,
        "job": Job(length=dice.choice((24, 40, 50)), batch=4, size=dice.choice((4, 8, 12)), epochs=dice.randint(1, 3)),
        "min_workers": dice.choice((1, workers)),
        "sharing": dice.random() < 0.5,
        "push_codec": Codec(random.Random(seed + 1).choice((RAW, RAW, BF16, INT8, TOPK)), 1 / ELEMENTS),
        "pull_codec": Codec(random.Random(seed + 2).choice((RAW, RAW, BF16, FP16))),
    } | overrides
    cluster = Cluster(seed, **options)  # type: ignore[arg-type]
    sim = cluster.sim
    sim.strange = {name for name in ("s0", "s1", "s2") if dice.random() < 0.3}
    for number in range(dice.randint(0, 4)):
        when, name = dice.uniform(0.1, 4.0), f"w{dice.randrange(workers)}"
        kind = dice.choice(kinds)
        sim.at(when, lambda kind=kind, name=name, number=number: blow(cluster, kind, name, number, dice))
    switches = random.Random(seed + 3)
    for _ in range(switches.choice((0, 0, 1, 2)) if not overrides else 0):
        to = switches.choice(("async", "sync")), switches.choice((0.0, 1.0, 3.0, inf))
        sim.at(switches.uniform(0.2, 5.0), lambda to=to: cluster.switch(*to))
    cutting = random.Random(seed + 4)
    for _ in range(cuts or (0 if overrides else cutting.choice((0, 1, 2, 4)))):
        cluster.piecemeal = True
        when, patience = cutting.uniform(0.2, 6.0), cutting.choice((0.5, 5.0, 60.0))
        sim.at(when, lambda patience=patience: cut(cluster, cutting, patience))
    appraising = random.Random(seed + 5)
    for _ in range(evaluations or (0 if overrides else appraising.choice((0, 0, 1, 2)))):
        sim.at(appraising.uniform(0.5, 6.0), lambda: [app.appraise() for app in list(cluster.apps.values())])
    sim.at(30.0, lambda: setattr(sim, "quiet", True))
    return cluster


def cut(cluster: Cluster, dice: random.Random, patience: float) -> None:
    """One worker, or two at once, want everything as it is at one boundary."""
    apps = list(cluster.apps.values())
    for app in dice.sample(apps, min(len(apps), dice.choice((1, 1, 2)))):
        app.cut(patience)


def blow(cluster: Cluster, kind: str, name: str, number: int, dice: random.Random) -> None:
    """Something bad, or at least sudden."""
    sim = cluster.sim
    if kind == "join":
        return cluster.start_worker(f"late{number}")
    if kind == "server":
        name = dice.choice(["coordinator", *(name for name in sim.nodes if name[0] == "s")])
        if name in sim.nodes:
            cluster.crash_server(name, dice.choice((0.0, dice.uniform(0.05, 5.0))))
        return None
    app = cluster.apps.get(name)
    if app is None or app.node.stopped:
        return
    if kind == "crash" and (len(cluster.apps) == 1 or cluster.coordinator.opened_at is None):
        kind = "crash and restart"  # somebody must be left to do the work, and enough to begin it
    if kind in ("crash", "crash and restart"):
        cluster.crash_worker(name)
        if kind == "crash and restart":
            cluster.to_come += 1
            sim.at(sim.now + dice.uniform(0.1, 5.0), lambda: cluster.restart_worker(name))
    elif kind == "stop":
        cluster.trouble(name)
        sim.stop(name, dice.uniform(0.5, 8.0))
    elif kind == "cut":
        cluster.trouble(name)
        pairs = [frozenset((name, other)) for other in ("coordinator", "s0", "s1", "s2") if dice.random() < 0.7]
        sim.cut.update(pairs)

        def heal() -> None:
            sim.cut.difference_update(pairs)
            node = sim.nodes.get(name)
            if node is not None:
                for peer in list(node.doors):
                    sim.break_link(node, peer)

        sim.at(sim.now + dice.uniform(0.5, 8.0), heal)


def judge(cluster: Cluster) -> None:
    """Run to the end and check every guarantee."""
    finished = cluster.run()
    job = cluster.job
    assert finished, "the run did not end\n" + story(cluster)
    assert not [app.errors for app in cluster.apps.values() if app.errors], story(cluster)
    if not cluster.forgotten:
        check_staleness(cluster.history)
        check_once(cluster.history, cluster.final_values())
        check_cuts(cluster.history)
    check_coverage(cluster.history, job.length, job.epochs)
    cluster.check_evaluations()


@pytest.mark.parametrize("half", [0, 1])
def test_random_schedules(half: int) -> None:
    """Every guarantee holds under loss, repetition, reordering, delay, partition, and crash, stop and restart of every process."""
    print(f"SHOAL_SEED={SEED} SHOAL_SCHEDULES={SCHEDULES}")
    for seed in range(SEED + half, SEED + SCHEDULES, 2):
        try:
            judge(play(seed))
        except BaseException as error:
            error.add_note(f"reproduce with SHOAL_SEED={seed} SHOAL_SCHEDULES=1")
            raise


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_reproduces_its_run(seed: int) -> None:
    """The same seed gives the same history, value for value."""
    first, second = play(seed), play(seed)

    assert first.run() == second.run()
    assert first.history == second.history
    assert first.sim.log == second.sim.log


@pytest.mark.parametrize("seed", range(20))
def test_the_dead_hold_nobody_up(seed: int) -> None:
    """Guarantee 5, where only processes fail and the network is sound."""
    dice = random.Random(seed)
    cluster = Cluster(
        seed, workers=3, shards=2, staleness=float(dice.randint(0, 2)), lease=3.0, job=Job(800, 4, 8, 1), min_workers=3
    )
    cluster.sim.at(dice.uniform(0.2, 0.8), lambda: cluster.crash_worker("w0"))

    assert cluster.run(), story(cluster)

    check_release(cluster.history, bound=cluster.lease + 1.0)
    assert cluster.coordinator.totals.lost == 1
