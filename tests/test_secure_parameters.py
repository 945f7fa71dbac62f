"""How many neighbours, shares and survivors: the tables, the inequalities, the refusals (rung T0, SPEC §14)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from shoal.protocol.errors import ConfigError
from shoal.protocol.secure import parameters
from shoal.protocol.secure.parameters import COMPLETE, CORRUPT, DROPOUT, Parameters, most, resolve, violated

CLIENTS = (3, 4, 5, 6, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256, 500, 1000)
THRESHOLDS = (3, 3, 4, 5, 6, 7, 11, 14, 22, 34, 43, 67, 86, 134, 171, 334, 667)
SURVIVED = (0, 1, 1, 1, 2, 3, 5, 6, 10, 16, 21, 33, 42, 66, 85, 166, 333)
COLLUDERS = (2, 1, 2, 3, 3, 3, 5, 7, 11, 17, 21, 33, 43, 67, 85, 167, 333)


@pytest.mark.parametrize(
    ("count", "threshold", "dropouts", "corrupt"), [*zip(CLIENTS, THRESHOLDS, SURVIVED, COLLUDERS, strict=True)]
)
def test_the_complete_graph(count: int, threshold: int, dropouts: int, corrupt: int) -> None:
    """The table's default: over two thirds, what it survives, and whom it bears; lying servers are borne by it as it is."""
    found = resolve(count, active=True)

    assert Parameters(count - 1, threshold, max(threshold, 3)) == found
    assert dropouts == count - found.threshold
    assert corrupt == 2 * found.threshold - count - 1
    if count <= COMPLETE:
        assert found == resolve(count, active=False)


def test_the_default_bears_what_it_says() -> None:
    """For every number of clients the default shares give the default threshold, within every inequality, and are feasible."""
    for count in range(3, 400):
        found = resolve(count, active=True)
        c, d = most(CORRUPT, count), most(DROPOUT, count)
        assert 2 * count // 3 + 1 == found.threshold <= count - d
        assert 2 * found.threshold > count + c
        assert max(found.threshold, c + 2, 3) == found.minimum <= count - d


@pytest.mark.parametrize(
    ("corrupt", "dropout", "found"),
    [
        (0.05, 0.05, {200: (20, 11), 300: (24, 14), 500: (28, 16), 1000: (30, 17)}),
        (0.1, 0.1, {200: (34, 19), 300: (36, 21), 500: (42, 24), 1000: (48, 27)}),
        (0.2, 0.1, {200: (46, 30), 300: (52, 34), 500: (60, 39), 1000: (68, 44)}),
        (0.33, 0.1, {200: (66, 47), 500: (90, 64), 1000: (102, 72)}),
    ],
)
def test_the_regular_graph(corrupt: float, dropout: float, found: dict[int, tuple[int, int]]) -> None:
    """The table's neighbours and thresholds; and as many must survive as they were found for."""
    for count, (degree, threshold) in found.items():
        expected = Parameters(degree, threshold, count - most(dropout, count))
        assert expected == resolve(count, active=False, corrupt=corrupt, dropout=dropout)


@pytest.mark.parametrize(("population", "marked", "drawn"), [(9, 4, 3), (12, 0, 5), (10, 10, 4), (15, 7, 12)])
def test_a_tail_is_what_counting_gives(population: int, marked: int, drawn: int) -> None:
    """Exactly, by whole numbers."""
    for least in range(drawn + 2):
        ways = sum(
            math.comb(marked, hit) * math.comb(population - marked, drawn - hit) for hit in range(least, drawn + 1)
        )
        exact = Fraction(ways, math.comb(population, drawn))
        assert float(exact) == pytest.approx(parameters._tail(population, marked, drawn, least), rel=1e-9, abs=1e-15)


def test_a_cut_is_at_least_as_likely_as_it_is() -> None:
    """Over all ways in which so many are gone from a small ring the bound is no less than the truth."""
    for count, degree, gone in itertools.product((8, 10), (2, 4), (4, 5)):
        cut = sum(_falls_apart(count, degree, set(away)) for away in itertools.combinations(range(count), gone))
        assert 0 < cut / math.comb(count, gone) <= parameters._cut(count, degree, gone)
    assert 0 == parameters._cut(20, 6, 5)


def _falls_apart(count: int, degree: int, gone: set[int]) -> bool:
    left = [place for place in range(count) if place not in gone]
    reached, edge = {left[0]}, [left[0]]
    while edge:
        place = edge.pop()
        near = {(place + step) % count for step in range(-degree // 2, degree // 2 + 1)} - gone - reached
        reached |= near
        edge += near
    return len(reached) < len(left)


def test_where_a_regular_graph_cannot_be_it_is_complete() -> None:
    """Just over the limit, with much to bear."""
    assert Parameters(129, 90, 91) == resolve(130, active=False, corrupt=0.69, dropout=0.3)


def test_what_is_asked_for() -> None:
    """A threshold and a minimum within the inequalities are taken as they are; a sum of two only when it is asked for."""
    assert Parameters(2, 2, 3) == resolve(3, active=False, corrupt=0, dropout=0, threshold=2)
    assert Parameters(2, 2, 2) == resolve(3, active=False, corrupt=0.3, dropout=0.34, threshold=2, minimum=2)
    assert Parameters(9, 7, 8) == resolve(10, active=True, corrupt=0.3, dropout=0.2, minimum=8)
    assert Parameters(9, 4, 5) == resolve(10, active=False, corrupt=0.3, dropout=0.3, threshold=4, minimum=5)
    assert 28 == resolve(1000, active=False, corrupt=0.1, dropout=0.1, threshold=28).threshold
    assert Parameters(1, 2, 2) == resolve(2, active=True, minimum=2)


@pytest.mark.parametrize(
    ("count", "settings", "law"),
    [
        (10, {"active": True, "corrupt": 0.4, "dropout": 0.3}, r"c \+ 2d < N, with c = 4, d = 3, N = 10"),
        (10, {"active": False, "corrupt": 0.6, "dropout": 0.4}, r"c \+ d < N, with c = 6, d = 4, N = 10"),
        (10, {"active": True, "threshold": 6}, r"2t > N \+ c: 2·6 > 10 \+ 3"),
        (10, {"active": False, "threshold": 3}, "t > c: 3 > 3"),
        (10, {"active": True, "threshold": 8}, "2 <= t <= N - d: 2 <= 8 <= 7"),
        (10, {"active": False, "corrupt": 0, "threshold": 1}, "2 <= t <= N - d: 2 <= 1 <= 7"),
        (10, {"active": True, "minimum": 6}, "minimum >= 7: 6 >= 7"),
        (10, {"active": False, "corrupt": 0.5, "dropout": 0.1, "threshold": 6, "minimum": 6}, "minimum >= 7: 6 >= 7"),
        (10, {"active": True, "minimum": 8}, "minimum <= N - d: 8 <= 10 - 3"),
        (3, {"active": False, "dropout": 0.34, "corrupt": 0}, "minimum <= N - d: 3 <= 3 - 1"),
        (2, {"active": False}, "minimum <= N - d: 3 <= 2 - 0"),
        (1000, {"active": False, "corrupt": 0.1, "dropout": 0.1, "minimum": 800}, "minimum >= 900: 800 >= 900"),
    ],
)
def test_what_cannot_be_says_which_inequality(count: int, settings: dict[str, object], law: str) -> None:
    with pytest.raises(ConfigError, match=law):
        resolve(count, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"corrupt": 1.0}, {"corrupt": -0.1}, {"dropout": 1.0}, {"dropout": math.nan}])
def test_shares_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="a secure round of 10 clients"):
        resolve(10, active=True, **settings)
    with pytest.raises(ConfigError, match="a secure round of 1 clients"):
        resolve(1, active=True)


def test_privacy_that_is_violated() -> None:
    """As a client computes it again: complete, lying servers on a regular graph, too few neighbours, too low a threshold."""
    assert "" == violated(10, 9, 7, 3, 3, True)
    assert "2t > N + c" in violated(10, 9, 6, 3, 3, True)
    assert "2t > N + c" in violated(10, 9, 6, 2, 3, True)
    assert "t > c" in violated(10, 9, 3, 3, 3, False)
    assert "" == violated(1000, 48, 27, 100, 100, False)
    assert "k = N - 1" in violated(1000, 48, 27, 100, 100, True)
    assert "fall apart" in violated(1000, 14, 13, 100, 300, False)
    assert "t of 48 neighbours" in violated(1000, 48, 26, 100, 100, False)


def test_no_two_answers_from_both_sides() -> None:
    """What 2t > N + c is for: however lying servers divide honest clients, they do not get t shares of both secrets of one."""
    for count in range(3, 25):
        for c in range(count):
            t = (count + c) // 2 + 1
            both = [min(told + c, count - told) for told in range(count - c + 1)]
            assert t - 1 == max(both)
