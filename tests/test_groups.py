"""Standing groups: what many sums together say of one client, and that groups say no more than one (rung T0; So et al. 2023)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from roundnet import RoundNet

from shoal.protocol.join import CLEAR, SECAGG
from shoal.ps.groups import Groups
from shoal.ps.recipe import Recipe

NAMES = [f"w{number:02}" for number in range(12)]


def found_out(cohorts: Iterable[Iterable[str]]) -> int:
    """How many clients' updates follow from the sums of these cohorts, if updates stay as they are: a unit row in their span."""
    rows = np.array([[name in cohort for name in NAMES] for cohort in map(set, cohorts)], float)
    projection = np.linalg.pinv(rows) @ rows
    return int(np.isclose(np.diag(projection), 1.0).sum())


def test_sums_over_drawn_cohorts_give_everybody_away_and_groups_nobody() -> None:
    """The control first: a few dozen random cohorts of 4 out of 12 are solved for all."""
    draw = random.Random(5)
    assert 12 == found_out(draw.sample(NAMES, 4) for _ in range(40))
    groups = Groups(4, draw.randrange)
    drawn = [groups.draw(NAMES) for _ in range(40)]
    assert 0 == found_out(drawn)
    assert 3 == len({frozenset(each) for each in drawn})
    assert {4} == {len(each) for each in drawn}
    assert all(set(drawn[turn] + drawn[turn + 1] + drawn[turn + 2]) == set(NAMES) for turn in range(0, 36, 3)), "turns"


def test_who_comes_back_comes_back_to_its_group() -> None:
    """And whoever is missed for a time is missed by its own group alone."""
    groups = Groups(3, random.Random(6).randrange)
    before = {frozenset(groups.draw(NAMES[:8])) for _ in range(2)}
    assert {4} == {len(each) for each in before}
    away = NAMES[2]
    during = {frozenset(groups.draw([name for name in NAMES[:8] if name != away])) for _ in range(2)}
    assert during == {each - {away} for each in before}
    assert before == {frozenset(groups.draw(NAMES[:8])) for _ in range(2)}


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 5), st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=30), st.integers())
def test_whoever_comes_and_goes(size: int, turns: list[set[str]], seed: int) -> None:
    """A cohort has the wanted size, or is all who are here; nobody is in two groups; all who stay get a turn."""
    groups = Groups(size, random.Random(seed).randrange)
    for here in turns:
        drawn = groups.draw(here)
        assert len(set(drawn)) == len(drawn) and set(drawn) <= here
        assert len(drawn) >= min(size, len(here))
        assert len(drawn) < 2 * size or len(here) < size
        held = [name for group in groups._groups for name in group]
        assert len(held) == len(set(held)) and here <= set(held)
    here = turns[-1]
    assert here == {name for _ in range(len(here)) for name in groups.draw(here)}


def test_masked_rounds_of_a_part_are_of_groups() -> None:
    """Nine workers in rounds of three: three cohorts for ever. In the clear each round draws anew."""
    for protection, most in ((SECAGG, 3), (CLEAR, 12)):
        net = RoundNet(3, 9, (5,), Recipe(protection, rounds=12, clients=3, threshold=None, corrupt=0.0))
        for worker in net.workers.values():
            worker.client.policy = replace(worker.client.policy, corrupt=0.0)
        assert net.go(12)
        assert 12 == net.check()
        cohorts = {frozenset(net.expected(end.session)[1]) for end in net.coordinator.ended}
        assert 3 == most == len(cohorts) or 3 < len(cohorts) <= most
