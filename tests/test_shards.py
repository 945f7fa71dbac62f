"""The table of shards: who holds which index, and when it changes hands (rung T0, SPEC §3.1.1, §3.3.4)."""

from __future__ import annotations

from typing import Any

from shoal.protocol.messages import Report, ShardJoin
from shoal.ps.shards import Shards

LEASE = 5.0


def asking(incarnation: int, **words: Any) -> ShardJoin:
    said = {"host": "h", "port": 1000 + incarnation, "index": -1, "shards": 0, "digest": ""} | words
    return ShardJoin(incarnation, said["host"], said["port"], "", said["index"], said["shards"], said["digest"], ())


def index_of(table: Shards, join: ShardJoin, now: float = 0.0) -> int | None:
    held, _ = table.join(join, b"peer", now)
    return held.place.index if held else None


def fix(table: Shards, count: int, digest: str = "layout") -> None:
    table.fixed, table.digest = count, digest


def report(table: Shards, incarnation: int, now: float = 0.0, **words: Any) -> None:
    said = {"digest": "layout", "filled": True, "opened": True} | words
    held = table.known(incarnation)
    assert held is not None
    message = Report(
        incarnation, 1, 2, said["digest"], said["filled"], said["opened"], 3, False, 3, ((8, 4),), (("x", 1.0),)
    )
    table.report(held, message, b"new", now)


def test_new_shards_take_the_lowest_free_index() -> None:
    """In the order of their coming; a repeated join gets the same place and changes nothing."""
    table = Shards(LEASE, 2)
    assert ([0, 1, 2], 3) == ([index_of(table, asking(i)) for i in (1, 2, 3)], len(table))

    assert table.ready
    held, changed = table.join(asking(2), b"other", 1.0)
    assert held is table.known(2) and not changed
    assert (b"other", 1.0) == (held.peer, held.heard_at)
    assert [(0, 1), (1, 2), (2, 3)] == [(place.index, place.incarnation) for place in table.places]


def test_one_too_many_is_a_spare() -> None:
    """Once the layout is fixed a shard without an index waits, until a holder has been silent for a lease."""
    table = Shards(LEASE, 1)
    index_of(table, asking(1))
    fix(table, 1)
    assert (None, False) == table.join(asking(2), b"", 4.9)

    assert 0 == index_of(table, asking(2), 5.0)
    assert table.known(1) is None
    assert (0,) == table.unfilled


def test_a_survivor_gets_its_index_back() -> None:
    """A shard that still holds the layout's weights has the first claim on its old index, if that is free (SPEC §3.1.1)."""
    table = Shards(LEASE, 3)
    fix(table, 3)
    mine = {"index": 2, "shards": 3, "digest": "layout"}
    assert 0 == index_of(table, asking(3, **mine | {"digest": "another"}))
    assert 2 == index_of(table, asking(1, **mine))

    assert 1 == index_of(table, asking(2, **mine))
    assert index_of(table, asking(4, **mine | {"index": 7})) is None
    assert 2 == index_of(table, asking(5, **mine), 9.0)


def test_a_new_process_on_an_old_address_takes_its_place() -> None:
    """Who has bound the address of a shard that misses its reports has outlived it: no lease is waited for."""
    table = Shards(LEASE, 2)
    fix(table, 2)
    index_of(table, asking(1)), index_of(table, asking(2))

    assert index_of(table, asking(3, port=1002), 2.4) is None, "the old one may be alive still"
    assert index_of(table, asking(3, port=1002, host="other"), 2.5) is None
    assert 1 == index_of(table, asking(3, port=1002), 2.5)
    assert 1 == index_of(table, asking(4, port=1002), 9.0), "not the lower one, though that is lost as well"


def test_before_a_layout_survivors_say_how_many_there_were() -> None:
    """A shard that outlived the coordinator names its layout's size: that many are waited for, without a hole (SPEC §3.1.1)."""
    table = Shards(LEASE, 1)
    assert 1 == index_of(table, asking(1, index=1, shards=1, digest="old"))
    assert not table.ready
    assert 0 == index_of(table, asking(2, index=0, shards=3, digest="old"))
    assert (3, False) == (table.wanted, table.ready)

    assert 2 == index_of(table, asking(3))
    assert table.ready


def test_before_a_layout_nothing_is_at_stake() -> None:
    """A new process on an old address takes its place at once; the silent are forgotten, and the others close ranks."""
    table = Shards(LEASE, 2)
    assert [0, 1, 2] == [index_of(table, asking(i)) for i in (1, 2, 3)]
    assert 1 == index_of(table, asking(9, port=1002), 0.1)
    for shard in (9, 3):
        report(table, shard, 2.0)

    assert [] == table.close_ranks(2.4)
    assert [3] == [held.place.incarnation for held in table.close_ranks(2.5)]
    assert not table.ready
    assert 0 == index_of(table, asking(3), 2.6)
    assert table.ready
    fix(table, 2)
    assert [] == table.close_ranks(99.0)


def test_reports_are_taken_in() -> None:
    """A report is where a shard stands; all of the layout's must agree, be filled, be opened."""
    table = Shards(LEASE, 2)
    index_of(table, asking(1)), index_of(table, asking(2))
    fix(table, 2)
    assert (False, False, (0, 1)) == (table.agreed, table.opened, table.unfilled)

    report(table, 1, now=2.0)
    report(table, 2, digest="another", filled=False, opened=False)
    held = table.known(1)
    assert held is not None
    assert (2, {8: 4}, {"x": 1.0}, 3, b"new") == (held.epoch, held.clocks, held.counters, held.floor, held.peer)
    assert (False, False, (1,)) == (table.agreed, table.opened, table.unfilled)
    assert not table.is_lost(held, 6.9)
    assert table.is_lost(held, 7.0)

    report(table, 2)
    assert (True, True, ()) == (table.agreed, table.opened, table.unfilled)
    index_of(table, asking(3), 0.0)
    assert (True, True, ()) == (table.agreed, table.opened, table.unfilled)
