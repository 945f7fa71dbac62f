"""What a worker counts, and how it travels: numbers by name, zeros left out, since a moment (rung T0)."""

from __future__ import annotations

from dataclasses import fields

from shoal.worker.stats import _COUNTED, MOST_STALENESS, Stats


def busy() -> Stats:
    """Stats with a value in every field."""
    stats = Stats(clock=9, min_clock=7)
    for number, name in enumerate(_COUNTED, 1):
        setattr(stats, name, number)
    stats.saw(2)
    stats.seconds["pull"] += 1.5
    return stats


def test_every_counter_travels_under_its_name() -> None:
    """A field that is added to the class and not to the list of what travels shows here. Nothing is said of zeros."""
    apart = {"clock", "min_clock", "staleness", "seconds"}  # the clock has a field of its own in `Renew`
    counted = {name: float(value) for value, name in enumerate(_COUNTED, 1)}

    assert {field.name for field in fields(Stats)} - apart == set(_COUNTED)
    assert counted | {"seconds.pull": 1.5, "staleness.2": 1.0} == dict(busy().numbers())
    assert () == Stats().numbers()


def test_a_new_life_counts_from_where_the_old_one_was_heard() -> None:
    """With `since` only what came after it is told, so that an eviction counts nothing twice; the copy is not changed."""
    stats = busy()
    before = stats.copy()
    assert stats == before
    stats.steps += 5
    stats.saw(2)
    stats.saw(3)
    stats.seconds["pull"] += 0.25

    assert {"steps": 5.0, "staleness.2": 1.0, "staleness.3": 1.0, "seconds.pull": 0.25} == {
        name: value for name, value in stats.numbers(before) if value
    }


def test_the_histogram_has_ends() -> None:
    """What is beyond the last bin is counted in it; a worker behind the least clock that it heard of saw 0."""
    stats = Stats()
    for seen in (-3, 0, MOST_STALENESS - 1, MOST_STALENESS, MOST_STALENESS + 1, 10**9):
        stats.saw(seen)

    assert {0: 2, MOST_STALENESS - 1: 1, MOST_STALENESS: 3} == stats.staleness
