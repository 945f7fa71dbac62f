"""Repetition, the formats of buffers, and plans of federated rounds (rung T0, SPEC §14)."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError, ProtocolError
from shoal.protocol.join import CLEAR
from shoal.protocol.repeats import WAIT, Repeats, note
from shoal.protocol.rounds import Abandoned, Advertise, Arrived, Invite, Noted, Recall
from shoal.protocol.session import (
    ALIGN,
    Advert,
    Members,
    Slice,
    blocks_digest,
    by_rank,
    model_digest,
    pack_adverts,
    pack_leaves,
    ranges,
    read_advert,
    read_roster,
)
from shoal.ps.recipe import Recipe


def test_what_is_not_noted_is_due() -> None:
    """A newer message takes the place of an older one of its type, whose note settles nothing."""
    repeats = Repeats()
    first, second = Arrived(1, 5, 1, (0,)), Arrived(1, 5, 2, (0, 1))
    repeats.put(7, first, 0.0)
    assert [] == list(repeats.due(0.9)) and [(7, first)] == list(repeats.due(1.0)) and 2.0 == repeats.wake_at
    repeats.put(7, second, 1.5)
    assert repeats.noted(7, note(first)) is None and repeats.noted(8, note(second)) is None
    assert repeats.noted(7, Noted(1, 6, Arrived.TYPE, 2)) is None
    assert repeats.owed(7) and repeats.owes(Arrived) and not repeats.owes(Recall) and not repeats.owed(8)
    assert second is repeats.noted(7, note(second))
    assert inf == repeats.wake_at and not len(repeats)
    repeats.put(1, Recall(1, 5), 0.0)
    repeats.put(2, Abandoned(2, 5, ""), 0.0)
    repeats.forget(1)
    assert not repeats.owed(1) and repeats.owed(2)


def test_an_answer_is_a_note() -> None:
    """It settles what it answers, of its session; and the note that was owed is not sent, unless it has waited."""
    asks, answers = Repeats(), Repeats()
    invite, advertise = Invite(7, 5, (b"",)), Advertise(7, 5, (b"",))
    asks.put(7, invite, 0.0)
    answers.owe(0, invite, 0.0)
    assert WAIT == answers.wake_at and [] == list(answers.due(WAIT / 2))
    assert [(0, note(invite))] == list(answers.due(WAIT)) and [] == list(answers.due(2 * WAIT))
    assert inf == answers.wake_at
    answers.owe(0, invite, 1.0)
    answers.put(0, advertise, 1.0)
    assert [(0, advertise)] == list(answers.due(9.0))
    asks.answered(7, Advertise(7, 6, (b"",)))
    asks.answered(8, advertise)
    assert asks.owed(7)
    asks.answered(7, advertise)
    assert not asks.owed(7) and not len(asks)
    answers.owe(0, invite, 1.0)
    answers.owe(3, invite, 1.0)
    answers.forget(0)
    assert [3] == [to for to, each in answers.due(20.0) if isinstance(each, Noted)]


ADVERT = Advert(bytes(32), "worker", bytes(32), bytes([1]) * 32, bytes(64))


@settings(deadline=None, max_examples=200)
@given(
    st.binary(max_size=300) | st.integers(0, 250).map(lambda at: ADVERT.packed[:at] + b"\x00" + ADVERT.packed[at + 1 :])
)
def test_any_bytes_are_an_advert_and_a_roster_or_refused(data: bytes) -> None:
    """Nothing but `ProtocolError` is raised, and what is read is what would be written."""
    for masked in (True, False):
        try:
            assert data == read_advert(data, masked).packed
        except ProtocolError:
            pass
        for roster in ((data, pack_adverts([])), (pack_leaves(Members(("a",), (bytes(32),))), data)):
            try:
                members, adverts = read_roster(roster, masked)
                assert roster == (pack_leaves(members), pack_adverts(adverts))
            except ProtocolError:
                pass


def test_adverts_and_rosters_are_read_as_they_were_written() -> None:
    """Masked and in the clear; one kind is not taken for the other."""
    bare = Advert(bytes(32), "worker", b"", b"", b"")
    assert ADVERT == read_advert(ADVERT.packed, True) and bare == read_advert(bare.packed, False)
    for advert, masked in ((ADVERT, False), (bare, True)):
        with pytest.raises(ProtocolError):
            read_advert(advert.packed, masked)
    members = Members(("a", "b"), (bytes(32), bytes(32)))
    assert (members, (ADVERT,)) == read_roster((pack_leaves(members), pack_adverts([ADVERT])), True)
    for names in (("b", "a"), ("a", "a")):
        with pytest.raises(ProtocolError):
            read_roster((pack_leaves(Members(names, members.leaves)), pack_adverts([])), True)
    for wrong in (Advert(bytes(32), "\n", *[bytes(32)] * 2, b""), Advert(bytes(31), "a", *[bytes(32)] * 2, b"")):
        with pytest.raises(ProtocolError):
            read_advert(wrong.packed, True)


def test_a_session_is_all_of_its_adverts_and_its_plan() -> None:
    """Another advert, another order or another plan is another session."""
    one, two = bytes([1]) * 32, bytes([2]) * 32
    sids = [
        Members(("a", "b"), leaves).sid(context)
        for leaves in ((one, two), (two, one), (one, one))
        for context in (one, two)
    ]
    assert 6 == len(set(sids))


def test_items_end_to_end_are_as_many_as_their_ranks() -> None:
    """No more, no fewer, and each rank once."""
    assert {1: b"ab", 4: b"cd"} == by_rank((1, 4), b"abcd", 2, "things")
    for ranks, data in (((1, 4), b"abc"), ((1,), b"abcd"), ((4, 1), b"abcd"), ((1, 1), b"abcd")):
        with pytest.raises(ProtocolError):
            by_rank(ranks, data, 2, "things")


def test_ranges_begin_where_masks_do() -> None:
    """A shard's range is as long as it has elements, and begins at a multiple of the alignment; a slice's lanes at one of eight."""
    found = ranges((5, 0, ALIGN, ALIGN + 1, 7))
    assert [5, 0, ALIGN, ALIGN + 1, 7] == [stop - start for start, stop in found]
    assert not any(start % ALIGN for start, _ in found)
    assert (12, 16, 48) == (Slice(6, 2, 4).main, Slice(6, 2, 4).auxiliary, Slice(6, 2, 4).size)


def test_digests_tell_models_apart() -> None:
    """By every block, and by which shard has it."""
    shards = [[b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"ab", b"d"], []]
    digests = [blocks_digest(blocks) for blocks in shards]
    models = [
        model_digest(layout, each)
        for layout in (b"1" * 32, b"2" * 32)
        for each in (digests[:2], digests[1::-1], digests[:1])
    ]
    assert 5 == len(set(digests)) and 6 == len(set(models))


def test_a_recipe_makes_the_plan_that_was_asked_for() -> None:
    """In the clear nothing secret is planned; what cannot be is a `ConfigError`."""
    recipe = Recipe(clients=10, over=0.25, least=4, metrics=("loss",))
    assert [0, 4, 10, 12, 12] == [recipe.cohort(here) for here in (3, 4, 10, 12, 50)]
    plan = recipe.plan(1, 2, 12, (5, 6), bytes(32), bytes(32))
    assert (9, 11, 11, 12, True) == (plan.threshold, plan.degree, plan.elements, plan.cohort, plan.minimum >= 9)
    clear = Recipe(CLEAR, minimum=3).plan(1, 2, 5, (5,), bytes(32), bytes(32))
    assert (0, 0, 3, False) == (clear.threshold, clear.degree, clear.minimum, clear.active)
    for bad in (Recipe(clip=-1.0), Recipe(bits=12), Recipe(threshold=1), Recipe(corrupt=0.9)):
        with pytest.raises(ConfigError):
            bad.plan(1, 0, 5, (5,), bytes(32), bytes(32))
