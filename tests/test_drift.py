"""What has changed in a stream of rewards, and when (rung T0)."""

from __future__ import annotations

import builtins
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.tasks.drift import Change, Drift, best_cut


def stream(seed: int, *parts: tuple[int, float]) -> list[float]:
    """So many rewards of 0 or 1 with such a mean, part after part."""
    draw = random.Random(seed)
    return [float(draw.random() < mean) for count, mean in parts for _ in range(count)]


def changes(rewards: list[float], **options: float) -> list[Change]:
    drift = Drift(**options)
    found = [change for reward in rewards if (change := drift.add(reward))]
    assert len(rewards) == drift.seen
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_fall_is_noticed_with_its_moment(seed: int) -> None:
    """Once, within two hundred rewards, and the moment and the means are those of the stream."""
    first, *more = changes(stream(seed, (800, 0.95), (300, 0.5)))

    assert 800 < first.seen <= 1000
    assert abs(first.at - 800) <= 15
    assert first.before == pytest.approx(0.95, abs=0.03)
    assert first.after == pytest.approx(0.5, abs=0.25) and first.fall > 0.2
    assert not more


def test_noise_is_no_drift() -> None:
    """Twenty streams of two thousand rewards that do not change: at most one is called changed; a surer one never is."""
    streams = [stream(seed, (2000, 0.8)) for seed in range(20)]
    assert sum(bool(changes(each)) for each in streams) <= 1
    assert not any(changes(each, sure=1e-6) for each in streams)


@pytest.mark.parametrize("seed", range(4))
def test_each_change_is_one_from_what_was_before(seed: int) -> None:
    """Down and up again: two, the second from the low mean, and it is a rise."""
    found = changes(stream(seed, (600, 0.9), (600, 0.4), (600, 0.9)))

    assert 2 == len(found)
    down, up = found
    assert down.fall > 0.3 > -0.3 > up.fall
    assert abs(up.at - 1200) <= 15 and up.before == pytest.approx(0.4, abs=0.06)
    assert "noticed at" in str(up)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=12))
def test_the_cut_leaves_the_least_squares(rewards: list[float]) -> None:
    """Tried against all others."""

    def squares(part: list[float]) -> float:
        return sum((each - sum(part) / len(part)) ** 2 for each in part)

    cut = best_cut(rewards)
    found = squares(rewards[:cut]) + squares(rewards[cut:])
    assert 0 < cut < len(rewards)
    assert found <= min(squares(rewards[:at]) + squares(rewards[at:]) for at in range(1, len(rewards))) + 1e-9


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
def test_what_is_no_reward(reward: float) -> None:
    with pytest.raises(ConfigError, match="a reward of"):
        Drift().add(reward)
    with pytest.raises(ConfigError, match="a delta of"):
        Drift(sure=0)


def test_without_river(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""
    real = builtins.__import__

    def absent(name: str, *args: Any) -> Any:
        if name.startswith("river"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[drift\]'"):
        Drift()
