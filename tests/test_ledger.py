"""Differential privacy over rounds: the accountant's figures, the budget, the noise itself (rungs T0, T1 and T3, SPEC §14.11)."""

from __future__ import annotations

import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from roundnet import RoundNet
from test_federated import each

import shoal
from shoal.protocol.errors import ConfigError
from shoal.protocol.join import CLEAR, SECAGG
from shoal.protocol.secure.plan import Plan
from shoal.ps.ledger import ORDERS, Ledger, divergences
from shoal.ps.recipe import Privacy, Recipe
from shoal.worker.parley import Input

PRIVACY = Privacy(2.0, 0.5, 3.0, 1e-5)


def plan(protection: str, cohort: int = 10, elements: int = 1000, **privacy: float) -> Plan:
    recipe = Recipe(protection, privacy=replace(PRIVACY, **privacy), measured=True)
    return recipe.plan(1, 0, cohort, (elements,), bytes(32), bytes(32))


def test_gaussian_noise_is_accounted_as_the_library_does() -> None:
    """Our divergences and its own event give the same epsilon, for one round and for fifty."""
    ledger = Ledger(0.0, 1e-5)
    theirs = rdp.RdpAccountant(orders=list(ORDERS))
    assert 0.0 == ledger.epsilon
    for rounds in (1, 49):
        for _ in range(rounds):
            ledger.count(plan(CLEAR))
        theirs.compose(dp_accounting.GaussianDpEvent(2.0), rounds)
        assert ledger.epsilon == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
    assert 50 == ledger.rounds and ledger.epsilon < ledger.after(plan(CLEAR))


def test_skellam_noise_tells_a_little_more_than_gaussian_noise() -> None:
    """By the formula written again; with more units it comes nearer."""
    found = plan(SECAGG)
    amount = found.noise
    assert amount is not None and found.uniform and not found.metrics
    assert amount.units == math.ceil(3 * math.sqrt(1000)) and amount.honest == found.minimum - 3
    two = min(amount.units + math.sqrt(1000), math.sqrt(amount.units**2 + 250 + amount.units + math.sqrt(1000) / 2))
    one, mu = min(math.sqrt(1000) * two, two**2), (2.0 * amount.units) ** 2
    expected = [
        a * two**2 / (2 * mu) + min(((2 * a - 1) * two**2 + 6 * one) / (4 * mu**2), 3 * one / (2 * mu)) for a in ORDERS
    ]
    assert divergences(found) == pytest.approx(expected)
    ledgers = [Ledger(0.0, 1e-5) for _ in range(3)]
    for ledger, made in zip(
        ledgers, (plan(CLEAR), replace(found, noise=replace(amount, units=10**6)), found), strict=True
    ):
        ledger.count(made)
    gauss, fine, coarse = (ledger.epsilon for ledger in ledgers)
    assert gauss < coarse < 1.1 * gauss and gauss < fine < 1.001 * gauss


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="without noise"):
        divergences(Recipe(CLEAR).plan(1, 0, 5, (3,), bytes(32), bytes(32)))
    with pytest.raises(ConfigError, match="there may be none"):
        Recipe(SECAGG, privacy=PRIVACY, corrupt=0.0, dropout=0.0, minimum=3).privacy.skellam(10, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("protection", [SECAGG, CLEAR])
def test_the_budget_ends_the_rounds(protection: str) -> None:
    """So many as fit it; a coordinator that was restarted counts those that the shards have applied."""
    probe = Ledger(0.0, 1e-5)
    net = RoundNet(3, 6, (50,), Recipe(protection, privacy=PRIVACY, clip=8.0))
    assert net.run(400.0, lambda: net.coordinator.rounds.done)
    made = net.coordinator.rounds.completed
    some = next(iter(net.world.plans.values()))
    for _ in range(made):
        probe.count(some)
    assert made >= 1 and probe.epsilon <= 3.0 < probe.after(some)
    assert net.coordinator.rounds.ledger is not None and probe.epsilon == net.coordinator.rounds.ledger.epsilon
    assert any("3 is the budget" in text for text in net.coordinator.log)
    net.crash("coordinator")
    net.at(net.now + 1.0, lambda: net.start_coordinator(2) and None)
    assert net.run(net.now + 60.0, lambda: net.coordinator.rounds.run == 2 and net.coordinator.rounds.done)
    assert not net.coordinator.ended, "not one more"


def test_central_noise_is_as_much_as_is_said() -> None:
    """In the clear: updates cut to the norm, then noise of the stated deviation in the average, drawn anew each round."""
    size = 40_000
    recipe = Recipe(CLEAR, rounds=2, privacy=Privacy(2.0, 0.5, 0.0, 1e-5), clip=8.0)
    net = RoundNet(3, 4, (size,), recipe)
    long = np.zeros(size, np.float32)
    long[0] = 4.0  # eight times the norm
    for worker in net.workers.values():
        worker.make = lambda plan, worker=worker: Input(long, 1.0, {}, worker.model())  # type: ignore[misc]
    assert net.go(2)
    first, second = (update for _, _, update in net.shards[0].applied)
    for update in (first, second):
        rest = update[1:]
        assert rest.std() == pytest.approx(2.0 * 0.5 / 4, rel=0.02) and abs(rest.mean()) < 5 * 0.25 / math.sqrt(size)
        assert update[0] == pytest.approx(0.5, abs=1.5)
    assert abs(np.corrcoef(first[1:], second[1:])[0, 1]) < 0.03


def test_a_cluster_says_what_it_has_told() -> None:
    """With real processes, under masks: rounds end by themselves, and status has epsilon."""

    def script(number: int, name: str) -> int:
        arrays = {"w": np.zeros(2000, np.float32)}
        made = 0
        with shoal.connect(cluster.join, name=name) as worker:
            for round_ in worker.rounds(arrays, metrics=["loss"]):
                made += round_.submit(metrics={"loss": 1.0}).applied
        return made

    with shoal.LocalCluster(mode="federated", min_workers=4, noise=4.0, norm=0.5, epsilon=4.0) as cluster:
        found = each(4, script)
        rounds = cluster.status()["rounds"]
    assert [rounds["completed"]] * 4 == found and rounds["completed"] > 1
    assert 0 < rounds["epsilon"] <= 4.0 == rounds["epsilon_budget"]
