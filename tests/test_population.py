"""Population-based training: who copies whom, and that it finds what random search does not (rung T0)."""

from __future__ import annotations

import random
from math import nan
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError
from shoal.tasks.population import FACTOR, Move, Said, Space, move

SPACE = Space({"lr": (1e-4, 1.0)})


def test_the_worst_goes_on_from_the_best() -> None:
    said = [Said(f"m{number}", float(number), {"lr": 0.1}) for number in range(4)]
    found = move("m0", said, SPACE, random.Random(1).random)
    assert "m3" == found.source and found.settings["lr"] in (pytest.approx(0.1 * FACTOR), pytest.approx(0.1 / FACTOR))
    for name in ("m1", "m2", "m3"):
        assert Move(name, {"lr": 0.1}) == move(name, said, SPACE, random.Random(1).random)
    lost = [*said[1:], Said("m0", nan, {"lr": 1.0})]
    assert "m3" == move("m0", lost, SPACE, random.Random(1).random).source, "who has diverged is the worst"
    assert Move("m0", {"lr": 0.1}) == move("m0", said[:1], SPACE, random.random), "alone, nothing is copied"
    with pytest.raises(ConfigError, match="has not said"):
        move("m9", said, SPACE, random.random)
    with pytest.raises(ConfigError, match="above 0"):
        Space({"lr": (0.0, 1.0)})


@given(st.integers(0, 2**32), st.integers(2, 12))
def test_settings_stay_in_the_space(seed: int, members: int) -> None:
    draw = random.Random(seed).random
    said = [Said(str(number), draw(), SPACE.draw(draw)) for number in range(members)]
    for each in said:
        found = move(each.member, said, SPACE, draw)
        assert 1e-4 <= found.settings["lr"] <= 1.0


def test_it_finds_more_than_random_search() -> None:
    """A quantity that grows best at one setting, which nobody knows; as many steps for both, means of 20 populations."""

    def grown(size: float, lr: float) -> float:
        return size + max(0.0, 1.0 - abs(lr - 0.003) / 0.003)

    gains = []
    for seed in range(20):
        draw = random.Random(seed).random
        settings = {f"m{number}": SPACE.draw(draw) for number in range(4)}
        first, sizes = dict(settings), dict.fromkeys(settings, 0.0)
        lonely = dict.fromkeys(settings, 0.0)
        for _ in range(30):
            sizes = {name: grown(sizes[name], settings[name]["lr"]) for name in sizes}
            lonely = {name: grown(lonely[name], first[name]["lr"]) for name in lonely}
            said = [Said(name, sizes[name], settings[name]) for name in sizes]
            for name in list(sizes):
                step = move(name, said, SPACE, draw)
                sizes[name], settings[name] = sizes[step.source], dict(step.settings)
        gains.append(max(sizes.values()) - max(lonely.values()))
    assert fmean(gains) > 3.0
