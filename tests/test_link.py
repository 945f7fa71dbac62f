"""One shard, as the worker sees it: whose life a message is of, how long it has been silent, what a read has gathered (T0).

What a link does within the fleet is in test_fleet.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.messages import Place, Start, Values
from shoal.worker.link import Link, Read


def link(shard: int = 9, *, connected: bool = True) -> Link:
    made = Link(Place(3, 0, "::1", 7451, ""), 100.0)
    made.connected = connected
    made.reset(shard)
    return made


def read(held: tuple[int, int] = (0, 0)) -> Read:
    return Read(1, 4, (), held)


def values(version: int, part: int, parts: int) -> Values:
    return Values(1, 9, 5, part, parts, version, 0, 0, 0, (10 * version + part,), (bytes([version]),))


@given(st.permutations([0, 1, 2, 2, 0]))
def test_an_answer_is_whole_when_each_part_has_come(order: list[int]) -> None:
    """In any order, and though some come twice; not before the last one."""
    one = read()
    whole = [one.take(values(1, part, 3)) for part in order]

    assert whole == [{0, 1, 2} == set(order[: n + 1]) for n in range(len(order))]


@pytest.mark.parametrize("parts", [2, 3])
def test_an_answer_is_of_one_moment(parts: int) -> None:
    """A part of another version, or of another number of parts, begins the answer anew: nothing of two moments is mixed."""
    one = read()
    assert not one.take(values(1, 0, 2))
    for part in reversed(range(parts)):
        assert (part == 0) == one.take(values(2, part, parts))


def test_a_pull_names_what_is_held_of_this_life_only() -> None:
    """`since` is the version held, or 0 if that was another incarnation's; `after` is where the stream was when it was asked."""
    one = link()
    one.outbox.add(Start(1, 9, 1, 4))
    one.reads = {5: read(held=(9, 33)), 6: read(held=(8, 33))}
    first, second = one.pull(5, 1, 101.0), one.pull(6, 1, 101.0)
    one.outbox.add(Start(1, 9, 2, 5))

    assert (9, 5, 4, 1, 33) == (first.shard, first.request, first.clock, first.after, first.since)
    assert 0 == second.since
    assert first == one.pull(5, 1, 102.0)  # repeated as it was, whatever was pushed since
    one.shared = {3: ""}
    one.reads[5].region = one.reads[6].region = 3
    assert first == one.pull(5, 1, 102.0)  # and into no region that it did not name first
    one.reset(10)
    assert (10, 0, 0) == ((again := one.pull(5, 1, 103.0)).shard, again.after, again.since)


def test_nothing_is_sent_to_a_shard_that_has_not_greeted() -> None:
    """Operations and pulls need a connection and a greeting; questions need the connection alone, and are not hurried."""
    one = link(shard=0)

    assert [True, False, False] == [link().open, link(connected=False).open, one.open]
    assert [True, False, True] == [one.may_ask(now, 1.0) for now in (100.0, 100.9, 101.0)]
    assert not link(connected=False).may_ask(100.0, 1.0)
    assert "[::1]:7451" == one.address


def test_silence_counts_while_something_is_awaited() -> None:
    """From when something was first awaited, or the shard was last heard; a shard that owes nothing is never silent."""
    one = link()
    assert 0.0 == one.owed(500.0)
    one.reads[5] = read()
    assert [0.0, 3.0] == [one.owed(500.0), one.owed(503.0)]
    one.heard(504.0)
    assert 1.0 == one.owed(505.0)
    one.reads.clear()
    one.heard(506.0)
    one.outbox.add(Start(1, 9, 1, 0))
    assert [0.0, 2.0] == [one.owed(600.0), one.owed(602.0)]
    one.outbox.acknowledge(1)
    assert 0.0 == one.owed(700.0)
    one.reset()
    assert [0.0, 1.0] == [one.owed(700.0), one.owed(701.0)]  # it owes a greeting
    one.forgive(50.0)  # this process was stopped for so long
    assert 1.0 == one.owed(751.0)
    one.given_up()  # whoever waits next is not told at once
    assert 0.0 == one.owed(800.0)


def test_gaps_are_answered_once_in_a_while() -> None:
    """A shard says `gap` to each operation it cannot take yet; the stream is not sent again for each."""
    one = link()
    for clock in range(3):
        one.outbox.add(Start(1, 9, one.outbox.next, clock))
    one.outbox.due()

    assert 3 == one.rewind(100.0, at_most_every=0.25)
    one.outbox.due()
    assert [0, 2] == [one.rewind(100.2, 1, at_most_every=0.25), one.rewind(100.3, 1, at_most_every=0.25)]
