"""Random schedules of tasks: loss, repetition, reordering, crashes, promotions and trials under way (rung T1)."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import pytest
from simnet import Faults
from tasknet import LABELS, NAME, TaskNet

from shoal.protocol.tasking import Chunk
from shoal.tasks import allot
from shoal.tasks.dispatcher import Settings
from shoal.tasks.waiting import Waiting
from shoal.worker import executor
from shoal.worker.executor import Executor

SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))
SCHEDULES = int(os.environ.get("SHOAL_TASK_SCHEDULES", "500"))
QUALITY = {NAME: {"auc": 0.8}}


def schedule(seed: int, folder: Path) -> Counter[str]:
    """One random schedule. Returns what happened."""
    dice = random.Random(seed)
    faults = Faults(
        drop=dice.choice((0.0, 0.02, 0.1)),
        repeat=dice.choice((0.0, 0.1)),
        delay=dice.choice((0.002, 0.02, 0.2)),
        reset=dice.choice((0.0, 0.0, 0.02)),
    )
    policy = dice.choice(("best", "cheapest", "thompson", "assign"))
    settings = Settings(policy, dice.choice((5, 1000)), linger=dice.choice((0.002, 0.02)), patience=2.0)
    net = TaskNet(seed, folder, faults, settings, dice.choice((0.01, 0.3)), dice.choice((0.0, 0.0, 0.3)))
    try:
        return play(net, dice)
    finally:
        net.close()


def play(net: TaskNet, dice: random.Random) -> Counter[str]:
    sim, library = net.sim, net.library
    for number in range(dice.randint(2, 4)):
        quality = {} if number == 1 and dice.random() < 0.5 else QUALITY
        library.make(NAME, bytes([number]) * dice.randint(8, 200), quality, dice.choice(((), LABELS[1:2], LABELS[1:])))
    library.promote(NAME, 1)
    names = [f"x{number}" for number in range(dice.randint(1, 3))]
    for name in names:
        data = dice.choice((None, None, frozenset(LABELS[1:2]), frozenset()))
        sim.at(dice.uniform(0.0, 1.0), lambda name=name, data=data: net.start_executor(name, data) and None)
    clients = [net.start_client(f"c{number}") for number in range(dice.randint(1, 2))]
    for _ in range(dice.randint(5, 40)):
        client, label = dice.choice(clients), dice.choice((*LABELS[:1], *LABELS))
        deadline = dice.choice((inf, inf, 0.05, 2.0, 8.0))
        sim.at(dice.uniform(0.0, 8.0), lambda c=client, x=label, d=deadline: c.submit(x, d) and None)
    for _ in range(dice.randint(0, 4)):
        client, version = dice.choice(clients), dice.randint(1, len(library.versions(NAME)))
        what, share = dice.choice((("promote", 0.0), ("promote", 0.0), ("canary", 0.3), ("rollback", 0.0)))
        sim.at(dice.uniform(0.5, 8.0), lambda c=client, w=what, v=version, s=share: c.govern(w, v, s) and None)
    for _ in range(dice.randint(0, 4)):
        when, seconds, name = dice.uniform(0.2, 8.0), dice.uniform(0.0, 3.0), dice.choice(names)
        match dice.choice(("executor", "dispatcher", "stop", "cut")):
            case "executor":
                sim.at(when, lambda name=name, s=seconds: net.crash_executor(name, s))
            case "dispatcher":
                sim.at(when, lambda s=seconds: net.crash_dispatcher(s))
            case "stop":
                sim.at(when, lambda name=name, s=2 * seconds: sim.stop(name, s) if name in sim.nodes else None)
            case "cut":
                ends = frozenset((name, net.dispatcher))
                sim.at(when, lambda ends=ends: sim.cut.add(ends))
                sim.at(when + seconds, lambda ends=ends: sim.cut.discard(ends))
    sim.at(12.0, lambda: setattr(sim, "quiet", True))
    sim.at(12.0, sim.cut.clear)

    def feed_back() -> None:
        for client in clients:
            for number in list(client.outcomes):
                if number in client.asked and dice.random() < 0.5:
                    client.feed_back(number, dice.random())

    sim.at(6.0, feed_back)
    finished = net.run(8.5, 200.0)
    assert finished, "some task has no end\n" + "\n".join(sim.log[-30:])
    net.end()
    for version in {version for stack in library.stacks.values() for version in stack}:
        assert library.find(NAME, version).quality, "promoted, and never evaluated"
    return net.counts


def blind(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(allot, "_CONSTRAINTS", allot._CONSTRAINTS[1:])


def forgetful(patch: pytest.MonkeyPatch) -> None:
    real = Waiting.add
    patch.setattr(Waiting, "add", lambda self, item, first=False: None if first else real(self, item))


def hasty(patch: pytest.MonkeyPatch) -> None:
    real = Executor._chunk

    def chunk(self: Executor, message: Any) -> None:
        real(self, message)
        for coming in self._coming.values():
            if coming.data and not coming.handed:
                coming.data = coming.data.ljust(coming.card.size, b"?")

    patch.setitem(executor._ACTS, Chunk, chunk)


@pytest.mark.parametrize("fault", [blind, forgetful, hasty])
def test_faults_are_found(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not look at labels, forgets the work of the dead, or takes a part for the whole, does not pass."""
    fault(monkeypatch)

    def many() -> None:
        for seed in range(200):
            schedule(seed, tmp_path)

    with pytest.raises(AssertionError):
        many()
    gc.collect()


def test_random_schedules(tmp_path: Path) -> None:
    """One answer a task or a clear failure, from a whole version that may see it, whatever happens."""
    print(f"SHOAL_SEED={SEED} SHOAL_TASK_SCHEDULES={SCHEDULES}")
    found: Counter[str] = Counter()
    for seed in range(SEED, SEED + SCHEDULES):
        try:
            found += schedule(seed, tmp_path)
        except BaseException as error:
            error.add_note(f"reproduce with SHOAL_SEED={seed} SHOAL_TASK_SCHEDULES=1")
            raise
    print(dict(found))
    assert SCHEDULES < 100 or min(found[kind] for kind in ("answered", "late", "unmet", "full")) > 10
    assert SCHEDULES < 100 or found["answered"] > 5 * SCHEDULES
