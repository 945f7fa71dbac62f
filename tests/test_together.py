"""Several versions on one task: what each way of joining gains, and where it does not (rung T0)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from shoal.protocol.errors import ShapeError
from shoal.tasks.together import Cascade, Stack, mean, vote, weighted


def scores(*rows: list[float]) -> Any:
    return np.array(rows)


def test_by_hand() -> None:
    """Three versions, two inputs, two classes."""
    one, two, three = scores([0.9, 0.1], [0.4, 0.6]), scores([0.4, 0.6], [0.4, 0.6]), scores([0.4, 0.6], [0.9, 0.1])
    assert np.allclose(mean([one, two, three]), [[1.7 / 3, 1.3 / 3]] * 2)
    assert np.allclose(weighted([one, three], [3, 1]), [[0.775, 0.225], [0.525, 0.475]])
    assert [1, 1] == vote([one, two, three]).tolist(), "two against one, however sure that one is"
    assert [0, 0] == vote([one, three]).tolist(), "of equal votes the higher score decides"
    assert [0, 1] == vote([one, two, three], [5, 1, 1]).tolist()


@given(st.integers(1, 5), st.integers(1, 20), st.integers(2, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_whoever_agrees_is_not_changed(versions: int, inputs: int, classes: int, seed: int) -> None:
    """Equal outputs are the output, whatever the weights; the order of versions does not matter."""
    draw = np.random.default_rng(seed)
    one = draw.dirichlet(np.ones(classes), inputs)
    weights = draw.uniform(0.1, 1.0, versions)
    assert np.allclose(one, weighted([one] * versions, weights))
    assert (one.argmax(1) == vote([one] * versions)).all()
    many = [draw.dirichlet(np.ones(classes), inputs) for _ in range(versions)]
    assert np.allclose(mean(many), mean(many[::-1])) and (vote(many) == vote(many[::-1])).all()


def test_a_stack_finds_who_is_right() -> None:
    """Also where one is wrong by a factor, and one a copy of another."""
    draw = np.random.default_rng(0)
    truth = draw.normal(size=400)
    good, noise = 2.0 * truth + draw.normal(0, 0.1, 400), draw.normal(size=400)
    stack = Stack.fit([good, noise, noise.copy()], truth)
    assert stack.weights[0] == pytest.approx(0.5, abs=0.02) and abs(sum(stack.weights[1:])) < 0.02
    assert np.abs(stack([good, noise, noise]) - truth).mean() < 0.1 < np.abs(mean([good, noise, noise]) - truth).mean()


@pytest.fixture(scope="module")
def digits() -> tuple[Any, ...]:
    """Probabilities of three versions on held-out digits, in two halves, and the truth."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order] / 16.0, y[order]
    versions = [
        LogisticRegression(max_iter=200).fit(x[:60], y[:60]),
        LogisticRegression(max_iter=200).fit(x[60:120, :], y[60:120]),
        MLPClassifier((64,), max_iter=2000, random_state=0).fit(x[:700], y[:700]),
    ]
    halves = slice(700, 1200), slice(1200, None)
    return *([each.predict_proba(x[half]) for each in versions] for half in halves), *(y[half] for half in halves)


def accuracy(found: Any, truth: Any) -> float:
    return float(((found.argmax(1) if found.ndim == 2 else found) == truth).mean())


def test_together_they_are_better_where_they_err_differently(digits: tuple[Any, ...]) -> None:
    """Two weak versions of other data gain by their mean. Beside a strong one mean and vote lose; weights by quality lose less,
    and a stack finds the strong one."""
    first, second, seen, truth = digits
    one, two, strong = (accuracy(each, truth) for each in second)
    assert accuracy(mean(second[:2]), truth) > max(one, two)
    assert accuracy(vote(second), truth) < strong and accuracy(mean(second), truth) < strong, "where it does not help"
    qualities = [accuracy(each, seen) for each in first]
    assert accuracy(weighted(second, np.power(qualities, 8)), truth) >= accuracy(mean(second), truth)
    assert accuracy(Stack.fit(first, seen)(second), truth) >= strong - 0.01


def test_a_cascade_asks_the_dear_one_seldom(digits: tuple[Any, ...]) -> None:
    """The cheap version keeps what it is sure of, as right as was asked for; together they are nearly as good as the dear one."""
    first, second, seen, truth = digits
    cascade = Cascade.calibrate(first[0], seen, 0.97)
    assert cascade.accuracy >= 0.97 and cascade.share > 0.25
    unsure = cascade.unsure(second[0])
    joined = Cascade.join(second[0], unsure, second[2][unsure])
    kept = np.setdiff1d(np.arange(len(truth)), unsure)
    assert accuracy(second[0][kept], truth[kept]) > 0.93
    assert accuracy(joined, truth) >= accuracy(second[2], truth) - 0.015 > accuracy(second[0], truth)
    assert len(unsure) < 0.75 * len(truth)


def test_a_cascade_that_is_never_sure() -> None:
    """It asks about everything; one that is always right about nothing."""
    half = scores([0.6, 0.4], [0.7, 0.3])
    never = Cascade.calibrate(half, np.array([1, 1]), 0.9)
    assert 0.0 == never.share and [0, 1] == never.unsure(scores([1.0, 0.0], [0.5, 0.5])).tolist()
    always = Cascade.calibrate(half, np.array([0, 0]), 1.0)
    assert (0.6, 1.0, 1.0) == (always.threshold, always.share, always.accuracy)
    assert [] == always.unsure(half).tolist()
    tied = Cascade.calibrate(scores([0.6, 0.4], [0.4, 0.6]), np.array([0, 0]), 1.0)
    assert 0.0 == tied.share, "of one confidence all are kept or none"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: mean([]),
        lambda a: mean([a, a[:1]]),
        lambda a: mean([np.float64(1.0)]),  # type: ignore[list-item]
        lambda a: weighted([a, a], [1.0]),
        lambda a: weighted([a, a], [0.0, 0.0]),
        lambda a: weighted([a, a], [1.0, -1.0]),
        lambda a: vote([a[:, 0]]),
        lambda a: vote([a], [1.0, 1.0]),
        lambda a: Stack.fit([a], np.array([0, 2])),
        lambda a: Stack.fit([a], np.array([0])),
        lambda a: Stack.fit([a], np.zeros((3, 2))),
        lambda a: Stack((1.0,))([a, a]),
        lambda a: Cascade.calibrate(a, np.array([0]), 0.9),
        lambda a: Cascade.join(a, np.array([0]), a),
    ],
)
def test_what_does_not_fit(wrong: Any) -> None:
    with pytest.raises(ShapeError):
        wrong(scores([0.6, 0.4], [0.7, 0.3]))
