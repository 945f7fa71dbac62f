"""What is believed of a version's quality, and how long it takes (rung T0)."""

from __future__ import annotations

import random
from collections import deque
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.tasks.belief import Belief
from shoal.tasks.latency import Latencies


def test_feedback_overrules_the_card() -> None:
    """At first its word decides, later what has come back; what left the window is forgotten."""
    belief = Belief(0.9, window=100)
    assert belief.mean == pytest.approx(0.9)
    for _ in range(100):
        belief.add(0.0)
    assert belief.mean < 0.05
    for _ in range(100):
        belief.add(1.0)
    assert 100 == belief.count
    assert belief.mean > 0.95, "nothing is left of the bad time"


@given(st.lists(st.floats(0, 1), max_size=60), st.integers(1, 20))
def test_the_window_holds_the_last(rewards: list[float], window: int) -> None:
    """However many come, and nothing adds up that has left."""
    belief, last = Belief(0.5, window), deque[float](maxlen=window)
    for reward in rewards:
        belief.add(reward)
        last.append(reward)
    assert len(last) == belief.count
    assert belief.mean == pytest.approx((2 + sum(last)) / (4 + len(last)), abs=1e-5)


def test_draws_are_as_uncertain_as_the_belief() -> None:
    """Around the mean; the more has come back, the closer."""
    beta = random.Random(1).betavariate
    spreads = []
    for count in (5, 500):
        belief = Belief()
        for number in range(count):
            belief.add(float(number % 2))
        drawn = [belief.draw(beta) for _ in range(400)]
        assert fmean(drawn) == pytest.approx(belief.mean, abs=0.05)
        spreads.append(max(drawn) - min(drawn))
    assert spreads[1] < spreads[0] / 3


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan"), float("inf")])
def test_what_is_no_reward(reward: float) -> None:
    with pytest.raises(ConfigError, match="a reward of"):
        Belief().add(reward)
    with pytest.raises(ConfigError, match="a window of"):
        Belief(window=0)


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 20), st.floats(0.01, 1))
def test_quantiles_are_of_the_last(seconds: list[float], window: int, share: float) -> None:
    """As sorting what the window holds would say; nothing measured is the guess; no times are left out."""
    found, last = Latencies(7.0, window), deque[float](maxlen=window)
    assert 7.0 == found.quantile(share)
    for each in seconds:
        found.add(each)
        found.add(float("nan"))
        found.add(-1.0)
        last.append(each)
    assert len(last) == len(found)
    if last:
        value = found.quantile(share)
        assert sum(each <= value for each in last) >= share * len(last) - 1e-9
        assert value in last
