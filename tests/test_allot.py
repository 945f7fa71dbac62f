"""Which version does a task, where, and why: constraints, policies, and what choosing is worth (rung T0)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.tasks.allot import BEST, CHEAPEST, THOMPSON, Candidate, Executor, Needs, Plan, Task, Unmet, allot, assign
from shoal.tasks.belief import Belief
from shoal.tasks.card import Card, Cost
from shoal.tasks.latency import Latencies

POLICIES = (BEST, CHEAPEST, THOMPSON)


def card(name: str, quality: float = 0.8, seconds: float = 0.01, **more: Any) -> Card:
    kinds = more.pop("kinds", ("risk",))
    return Card(
        name, 1, "00" * 32, 10, {kind: {"accuracy": quality} for kind in kinds},
        Cost(seconds, more.pop("memory", 100)), **more,
    )  # fmt: skip


SMALL, LARGE = card("small", 0.7, 0.001), card("large", 0.95, 0.02)
BETA = random.Random(0).betavariate


def chosen(plan: Plan | Unmet | None) -> Candidate:
    assert isinstance(plan, Plan), plan
    return plan.candidate


def test_the_best_and_the_cheapest() -> None:
    """The reason names the version, the executor and how many there were to choose from."""
    pair, where = (SMALL, LARGE), [Executor("e1"), Executor("e2", price=2.0)]
    best = allot(Task("risk"), pair, where, {}, BEST)
    assert ("large 1 on e1", 0.02) == (str(chosen(best)), chosen(best).seconds)
    assert isinstance(best, Plan) and "the best of 4" in best.reason
    assert "small 1 on e1" == str(chosen(allot(Task("risk"), pair, where, {}, CHEAPEST)))
    needs = Needs(quality=0.75)
    assert "large 1 on e1" == str(chosen(allot(Task("risk", needs), pair, where, {}, CHEAPEST))), (
        "the small one is not good enough"
    )


@pytest.mark.parametrize(
    ("task", "where", "failed"),
    [
        (Task("risk", Needs(privacy="site:a")), Executor("e"), "privacy"),
        (Task("other"), Executor("e"), "kind"),
        (Task("risk"), Executor("e", free=99), "memory"),
        (Task("risk", Needs(latency=0.05)), Executor("e", queue=0.045), "latency"),
        (Task("risk", Needs(latency=0.05), items=6), Executor("e"), "latency"),
        (Task("risk", Needs(deadline=1.0), waited=0.995), Executor("e"), "deadline"),
        (Task("risk", Needs(quality=0.9)), Executor("e"), "quality"),
        (Task("risk", Needs(budget=0.01)), Executor("e", price=2.0), "budget"),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_does_not_qualify_says_why(task: Task, where: Executor, failed: str, policy: str) -> None:
    """The first constraint that does not hold, for each candidate by name."""
    found = allot(task, [card("model")], [where], {}, policy, BETA)
    assert isinstance(found, Unmet)
    assert ["model 1 on e"] == list(found.why)
    assert found.why["model 1 on e"].startswith(failed + ":")
    assert f"no model qualifies: model 1 on e: {failed}" in str(found)


def test_nobody_serves() -> None:
    assert "no model qualifies: nobody serves any" == str(allot(Task("risk"), [], [Executor("e")], {}, BEST))


def test_what_is_measured_counts_more_than_the_card() -> None:
    """Time by quantiles of that version there; quality by what has come back."""
    slow, good = Latencies(0.01), Belief(0.7)
    for seconds in [0.1] * 90 + [5.0] * 10:
        slow.add(seconds)
    for _ in range(50):
        good.add(1.0)
    where = Executor("e", seconds={SMALL.identity: slow})
    found = allot(Task("risk"), [SMALL, LARGE], [where], {(SMALL.identity, "risk"): good}, BEST)
    assert ("small 1 on e", 5.0, 0.1) == (str(chosen(found)), chosen(found).seconds, chosen(found).cost)
    kept = allot(Task("risk", Needs(latency=1.0)), [SMALL, LARGE], [where], {(SMALL.identity, "risk"): good}, BEST)
    assert "large 1 on e" == str(chosen(kept))


LABELS = ("", "site:a", "site:b")
CARDS = st.lists(
    st.builds(
        lambda number, quality, seconds, data: replace(card(f"m{number}", quality, seconds), data=tuple(sorted(data))),
        st.integers(0, 3), st.floats(0, 1), st.floats(0, 1), st.sets(st.sampled_from(LABELS[1:])),
    ), max_size=4,
)  # fmt: skip
EXECUTORS = st.lists(
    st.builds(Executor, st.sampled_from(["e1", "e2"]), data=st.frozensets(st.sampled_from(LABELS[1:]))), max_size=3
)


@given(CARDS, EXECUTORS, st.sampled_from(LABELS), st.sampled_from(POLICIES))
def test_data_is_shown_to_nobody_who_is_not_cleared(
    cards: list[Card], executors: list[Executor], label: str, policy: str
) -> None:
    """Whatever the policy, alone and together with others; and where somebody is cleared, somebody does it."""
    task = Task("risk", Needs(privacy=label))
    cleared = [(c, e) for c in cards for e in executors if not label or (label in c.data and label in e.data)]
    for found in (allot(task, cards, executors, {}, policy, BETA), *assign([task, task], cards, executors, {})):
        if isinstance(found, Plan):
            assert any(found.candidate.card is c and found.candidate.executor is e for c, e in cleared)
        elif isinstance(found, Unmet):
            assert not cleared


def test_tasks_are_assigned_together() -> None:
    """A greedy choice would give the first task the executor that alone can do the second."""
    both, one = card("both", kinds=("risk", "text")), card("one", 0.79)
    able = Executor("able", loaded=frozenset({both.identity, one.identity}), free=0)
    other = Executor("other", loaded=frozenset({one.identity}), free=0)
    plans = assign([Task("risk"), Task("text")], [both, one], [able, other], {})
    assert ["one 1 on other", "both 1 on able"] == [str(chosen(plan)) for plan in plans]


def test_who_finds_no_slot_waits() -> None:
    """With one each; with two, the queue is shared out; what nobody can do says so."""
    where = [Executor("e1"), Executor("e2")]
    tasks = [Task("risk")] * 3 + [Task("other")]
    plans = assign(tasks, [SMALL], where, {})
    assert 2 == sum(isinstance(plan, Plan) for plan in plans)
    assert [None] == [plan for plan in plans[:3] if not isinstance(plan, Plan)]
    assert isinstance(plans[3], Unmet)
    names = [chosen(plan).executor.name for plan in assign([Task("risk")] * 4, [SMALL], where, {}, slots=2)]
    assert {"e1": 2, "e2": 2} == {name: names.count(name) for name in names}
    assert [] == assign([], [SMALL], where, {}) and isinstance(assign([Task("risk")], [], where, {})[0], Unmet)


# --- what choosing is worth: three models, two kinds of tasks, rewards that come back

TRUTH = {"small": (0.85, 0.30), "middle": (0.70, 0.75), "large": (0.88, 0.95)}
"""How often each is right, of kinds `easy` and `hard`. Their cards say less than the truth, and of the middle one more."""
SECONDS = {"small": 0.001, "middle": 0.004, "large": 0.02}
MODELS = [card(name, 0.8, SECONDS[name], kinds=("easy", "hard")) for name in TRUTH]


def right(name: str, kind: str) -> float:
    return TRUTH[name][kind == "hard"]


def test_thompson_finds_the_best_of_each_kind() -> None:
    """After 2,000 tasks its regret against the oracle is at most a tenth of random choice's."""
    for seed in range(5):
        dice = random.Random(seed)
        beliefs = {(each.identity, kind): Belief(0.8) for each in MODELS for kind in ("easy", "hard")}
        regret = random_regret = 0.0
        for _ in range(2000):
            kind = dice.choice(("easy", "hard"))
            most = max(right(name, kind) for name in TRUTH)
            candidate = chosen(allot(Task(kind), MODELS, [Executor("e")], beliefs, THOMPSON, dice.betavariate))
            name = candidate.card.name
            beliefs[candidate.card.identity, kind].add(float(dice.random() < right(name, kind)))
            regret += most - right(name, kind)
            random_regret += most - right(dice.choice(list(TRUTH)), kind)
        assert regret <= 0.1 * random_regret, (seed, regret, random_regret)


def test_good_enough_is_cheaper_than_the_best() -> None:
    """At the quality that is asked for, at least 30 % below always taking the best; no task gets less than it asked for."""
    dice = random.Random(3)
    beliefs = {(each.identity, kind): Belief(right(each.name, kind)) for each in MODELS for kind in ("easy", "hard")}
    for (identity, kind), belief in beliefs.items():
        name = next(each.name for each in MODELS if each.identity == identity)
        for _ in range(300):
            belief.add(float(dice.random() < right(name, kind)))
    spent = {BEST: 0.0, CHEAPEST: 0.0}
    for _ in range(500):
        kind, asked = dice.choice(("easy", "hard")), dice.choice((0.6, 0.8))
        for policy in spent:
            candidate = chosen(allot(Task(kind, Needs(quality=asked)), MODELS, [Executor("e")], beliefs, policy))
            spent[policy] += candidate.cost
            assert right(candidate.card.name, kind) > asked - 0.06
    assert spent[CHEAPEST] <= 0.7 * spent[BEST]


@pytest.mark.parametrize(
    ("needs", "named"),
    [
        ({"latency": -1.0}, "latency"),
        ({"quality": float("nan")}, "quality"),
        ({"quality": 1.5}, "quality"),
        ({"privacy": "a\nb"}, "privacy"),
    ],
)
def test_needs_that_cannot_be(needs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"needs whose {named}"):
        Needs(**needs)


def test_a_policy_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="no policy 'fastest'"):
        allot(Task("risk"), [SMALL], [Executor("e")], {}, "fastest")
    with pytest.raises(ConfigError, match="nothing to draw with"):
        allot(Task("risk"), [SMALL], [Executor("e")], {}, THOMPSON)


def test_assignment_needs_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match="scipy"):
        assign([Task("risk")], [SMALL], [Executor("e")], {})
