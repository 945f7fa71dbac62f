"""Averages that liars cannot move far: the rules alone, and over two shards (rungs T0 and T1)."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from roundnet import RoundNet

from shoal.protocol.errors import ConfigError, ProtocolError
from shoal.protocol.federated import AGGREGATES, Aggregate
from shoal.protocol.join import CLEAR, SECAGG
from shoal.protocol.rounds import Measure, Measured
from shoal.ps import robust
from shoal.ps.krum import choose, total
from shoal.ps.recipe import Privacy, Recipe

DRAW = np.random.default_rng(11)
HONEST = [(0.1 + 0.01 * DRAW.normal(size=40_000)).astype(np.float32) for _ in range(8)]
LIARS = [np.full(40_000, 900.0, np.float32), np.full(40_000, -700.0, np.float32)]
ROWS = [*HONEST, *LIARS]
PLAIN = np.mean(HONEST, axis=0)


def test_rules_by_their_formulas() -> None:
    """Element by element, written again; longer than a piece."""
    out = np.empty(40_000, np.float32)
    robust.median(ROWS, out)
    assert np.array_equal(out, np.median(np.array(ROWS), axis=0).astype(np.float32))
    robust.trimmed(ROWS, 0.25, out)
    assert np.allclose(out, np.sort(np.array(ROWS, np.float64), axis=0)[3:7].mean(0), atol=1e-6)
    robust.trimmed(ROWS, 0.0, out)
    assert np.allclose(out, np.mean(np.array(ROWS, np.float64), axis=0), rtol=1e-5)


def test_liars_move_the_mean_and_nothing_else() -> None:
    """The control is the mean, which they move by tens; each rule stays within the honest spread."""
    out = np.empty(40_000, np.float32)
    robust.mean(ROWS, out)
    assert np.abs(out - PLAIN).max() > 10
    squares = robust.distances(ROWS)
    for faulty, keep in ((2, 1), (2, 5), (3, 3)):
        chosen = choose(squares.tolist(), faulty, keep)
        assert keep == len(chosen) and max(chosen) < 8
        robust.mean([ROWS[row] for row in chosen], out)
        assert np.abs(out - PLAIN).max() < 0.06
    for rule in (robust.median, lambda rows, out: robust.trimmed(rows, 0.2, out)):
        rule(ROWS, out)
        assert np.abs(out - PLAIN).max() < 0.03


def test_krum_is_the_least_sum_of_near_squares() -> None:
    """Against every subset, in float64."""
    rows = DRAW.normal(size=(7, 3))
    squares = [[float(np.square(a - b).sum()) for b in rows] for a in rows]
    scores = []
    for row in range(7):
        others = [squares[row][other] for other in range(7) if other != row]
        scores.append(min(sum(group) for group in itertools.combinations(others, 7 - 1 - 2)))
    assert (int(np.argmin(scores)),) == choose(squares, 1, 1)
    assert tuple(sorted(np.argsort(scores)[:3].tolist())) == choose(squares, 1, 3)
    halves = [robust.distances([row[part] for row in rows.astype(np.float32)]) for part in (slice(0, 1), slice(1, 3))]
    added = total([half.astype("<f8").tobytes() for half in halves], 7)
    assert np.allclose(added, squares, rtol=1e-4)


def test_what_is_not_finite_is_left_out() -> None:
    broken = HONEST[0].copy()
    broken[5] = np.nan
    rows = [HONEST[1], broken, HONEST[2]]
    assert 2 == len(robust.finite(rows))
    squares = robust.distances(rows)
    assert np.isinf(squares[1]).sum() >= 2 and np.isfinite(squares[0, 2])
    assert (0, 2) == choose(squares.tolist(), 0, 2)
    with pytest.raises(ProtocolError, match="no update that is finite"):
        robust.finite([broken])


@pytest.mark.parametrize("part", [b"", struct.pack("<4d", 0, -1, 1, 0), struct.pack("<4d", 0, float("nan"), 1, 0)])
def test_distances_that_cannot_be_are_refused(part: bytes) -> None:
    with pytest.raises(ProtocolError):
        total([part], 2)


@pytest.mark.parametrize("name", AGGREGATES)
def test_a_round_by_each_rule(name: str) -> None:
    """Over two shards: all shards choose alike, and what is applied is the rule's of the survivors."""
    net = RoundNet(4, 7, (6, 5), Recipe(CLEAR, rounds=2, training=Aggregate(name).settings))
    assert net.go(2)
    assert 2 == sum(end.released is not None for end in net.coordinator.ended)
    for end in net.coordinator.ended:
        inputs = [net.world.inputs[end.session, f"w{n}"] for n in range(1, 8)]
        updates = np.clip([each.update for each in inputs], -1, 1)
        squares = [[float(np.square(a - b).sum()) for b in updates] for a in updates]
        expected = {
            "mean": lambda u=updates: u.mean(0),
            "median": lambda u=updates: np.median(u, axis=0),
            "trimmed": lambda u=updates: np.sort(u, axis=0)[1:-1].mean(0),
            "krum": lambda u=updates, s=squares: u[list(choose(s, 1, 1))].mean(0),
            "multikrum": lambda u=updates, s=squares: u[list(choose(s, 1, 3))].mean(0),
        }[name]()
        found = np.concatenate([next(u for _, n, u in net.shards[i].applied if n == end.round) for i in (0, 1)])
        assert np.abs(found - expected).max() < 1e-6
    asked = {frames[0][2] for _, frames in net.wire if frames[0][1] == 1} & {Measure.TYPE, Measured.TYPE}
    assert bool(asked) == ("krum" in name)


@pytest.mark.parametrize(
    ("protection", "text", "cohort", "told"),
    [
        (SECAGG, "median", 5, "there are only sums"),
        (CLEAR, "krum:faulty=2", 6, "needs 7 to 1024"),
        (CLEAR, "multikrum", 2000, "needs 6 to 1024"),
        (CLEAR, "multikrum:faulty=2,keep=9", 12, "needs 13 to 1024"),
    ],
)
def test_rules_that_cannot_be(protection: str, text: str, cohort: int, told: str) -> None:
    recipe = Recipe(protection, training=Aggregate.parse(text).settings)
    with pytest.raises(ConfigError, match=told):
        recipe.plan(1, 0, cohort, (5,), bytes(32), bytes(32))


def test_liars_stay_outnumbered_when_others_are_lost() -> None:
    """No sum of fewer updates than the rule needs is begun; and a median is not made private by noise that fits a mean."""
    made = Recipe(CLEAR, training=Aggregate("multikrum").settings).plan(1, 0, 9, (5,), bytes(32), bytes(32))
    assert 6 == made.minimum
    private = Recipe(CLEAR, training=Aggregate("median").settings, privacy=Privacy(1.0, 1.0, 0.0, 1e-5))
    with pytest.raises(ConfigError, match="hides one client in a mean"):
        private.plan(1, 0, 9, (5,), bytes(32), bytes(32))


def test_so_large_a_share_is_left_out_at_least() -> None:
    """A tenth of seven may be one liar; and of two rows one half each is not all."""
    out = np.empty(40_000, np.float32)
    robust.trimmed([*HONEST[:6], LIARS[0]], 0.1, out)
    assert np.abs(out).max() < 1
    robust.trimmed(HONEST[:2], 0.49, out)
    assert np.allclose(out, (HONEST[0] + HONEST[1]) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("average", "no aggregate 'average'"),
        ("median:share=0.1", "median has no share.*no numbers"),
        ("trimmed:share=0.5", "share is 0.5"),
        ("krum:faulty=1.5", "faulty is 1.5"),
        ("multikrum:keep=0", "keep is 0"),
        ("trimmed:share", "no list of numbers"),
    ],
)
def test_mistyped_rules(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Aggregate.parse(text)


def test_a_shard_that_measures_wrongly_spoils_nothing() -> None:
    """The round is abandoned, and nothing is applied anywhere."""
    net = RoundNet(4, 5, (6, 5), Recipe(CLEAR, rounds=1, training=Aggregate("krum").settings))
    handle = net.shards[1].accumulator.handle

    def lying(event: Any, now: float) -> list[Any]:
        effects = handle(event, now)
        return [
            replace(effect, message=replace(effect.message, buffers=(b"\xff" * 200,)))
            if isinstance(getattr(effect, "message", None), Measured)
            else effect
            for effect in effects
        ]

    net.shards[1].accumulator.handle = lying  # type: ignore[method-assign]
    net.go()
    assert "measured wrongly" in net.coordinator.ended[0].why
    assert not net.shards[0].applied and not net.shards[1].applied
