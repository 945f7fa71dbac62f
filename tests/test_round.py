"""A worker's half of a federated round: what it says and when (rung T0, SPEC §14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from roundtable import ELEMENTS, SESSION, SHARD, Table

from shoal.protocol.effects import COORDINATOR, Linked, Received, Send, Tick
from shoal.protocol.errors import RoundClosed
from shoal.protocol.messages import Refused
from shoal.protocol.rounds import (
    Abandoned,
    Advertise,
    Consents,
    Deal,
    Invite,
    Kept,
    Masked,
    Noted,
    Relay,
    Released,
    Roster,
    RoundMessage,
    Survivors,
    Unmask,
    Withdraw,
)
from shoal.worker.parley import Lost, Remember
from shoal.worker.round import Phase


def test_an_honest_server_is_served() -> None:
    """Through all stages: the shares are given once, after the round was remembered, and with the result the session is over."""
    table = Table()
    table.relay()
    for number in range(4):
        table.survive(number, 0, 1, 2, 3)
    for number in range(4):
        effects = table.tell(number, Consents, *table.consents((0, 1, 2, 3)))
        kinds = [type(each.message if isinstance(each, Send) else each) for each in effects]
        assert kinds.index(Remember) < kinds.index(Unmask)
        assert [(0, 1, 2, 3)] == [each.ranks for each in table.heard(number, Unmask)]
        table.tell(number, Released, (0, 1, 2, 3), 4.0, 0, 0, ())
        end = table.over(number)
        assert end.result is not None and (4, 4.0) == (end.result.survivors, end.result.weight)
        assert end.released and end.error is None


# --- the table of legal moves, and what the network does

STAGE_MESSAGES: list[tuple[type[Any], tuple[Any, ...]]] = [
    (Roster, ((b"\x90", b"\x90"),)),
    (Relay, ((), (b"",))),
    (Survivors, ((0, 1, 2, 3),)),
    (Consents, ((), (b"",))),
]


@pytest.mark.parametrize("phase", list(Phase), ids=lambda phase: phase.name)
def test_what_does_not_belong_there_changes_nothing(phase: Phase) -> None:
    """In every phase, every message of another stage: an earlier one is noted again, a later one is not."""
    legal = {Phase.ADVERTISED: Roster, Phase.DEALT: Relay, Phase.SENDING: Survivors, Phase.SIGNED: Consents}
    after = {Roster: Phase.ADVERTISED, Relay: Phase.DEALT, Survivors: Phase.SENDING, Consents: Phase.SIGNED}
    for kind, fields in STAGE_MESSAGES:
        if legal.get(phase) == kind:
            continue
        table = reach(phase)
        client = table.clients[0]
        before = client.phase
        effects = table.tell(0, kind, *fields)
        noted = [Noted(1, SESSION, kind.TYPE, 0)] if before > after[kind] else []
        assert noted == [each.message for each in effects]
        assert before == client.phase
        assert client.counters["rejected.misplaced"] == (not noted)


def reach(phase: Phase) -> Table:
    table = Table()
    steps: list[Callable[[], Any]] = [
        lambda: None,
        table.invite,
        table.seat,
        table.deal,
        table.relay,
        table.relay,
        table.relay,
    ]
    steps[phase]()
    if phase >= Phase.SIGNED:
        for number in range(4):
            table.survive(number, 0, 1, 2, 3)
    if phase == Phase.UNMASKED:
        table.tell(0, Consents, *table.consents((0, 1, 2, 3)))
    assert phase == table.clients[0].phase
    return table


def test_who_has_left_says_so_again() -> None:
    """The word may have been lost: what the coordinator repeats is not noted, it is answered as before."""
    table = Table()
    table.invite()
    effects = table.tell(0, Roster, (b"garbage", b"garbage"))
    assert [Withdraw] == [type(each.message) for each in effects if isinstance(each, Send)]
    for kind, fields in ((Roster, ((b"garbage", b"garbage"),)), (Invite, ((table.plan.packed,),)), (Abandoned, ("",))):
        effects = table.tell(0, kind, *fields)
        assert [Withdraw(1, SESSION, "ProtectionError")] == [each.message for each in effects]


def test_messages_are_said_again_until_they_are_noted() -> None:
    """Each second; a note of another session, kind or number settles nothing."""
    table = Table()
    table.invite()
    for now in (0.5, 1.0, 1.5, 2.0):
        table.give(0, Tick(), now)
    assert 3 == len(table.heard(0, Advertise))
    for wrong in (
        Noted(1, SESSION, Deal.TYPE, 0),
        Noted(1, SESSION, Advertise.TYPE, 1),
        Noted(1, 5, Advertise.TYPE, 0),
    ):
        table.give(0, Received(COORDINATOR, wrong), 2.1)
    table.give(0, Tick(), 3.0)
    assert 4 == len(table.heard(0, Advertise))
    table.give(0, Received(COORDINATOR, Noted(1, SESSION, Advertise.TYPE, 0)), 3.1)
    table.give(0, Tick(), 9.0)
    assert 4 == len(table.heard(0, Advertise))


@pytest.mark.parametrize("phase", list(Phase)[1:], ids=lambda phase: phase.name)
def test_a_round_ends_when_it_must(phase: Phase) -> None:
    """By the coordinator's word, a refusal, an eviction, or silence: with `RoundClosed`, once, and nothing is sent afterwards."""
    ends = [
        lambda table: table.tell(0, Abandoned, "why"),
        lambda table: table.give(0, Received(COORDINATOR, Refused(SESSION, "round_closed", "late"))),
        lambda table: table.give(0, Received(COORDINATOR, Refused(SESSION, "malformed", "bad"))),
        lambda table: table.give(0, Lost("evicted")),
        lambda table: table.give(0, Tick(), 1e6),
        lambda table: table.tell(0, Released, (1, 2, 3), 3.0, 0, 0, ()),
    ]
    for end in ends:
        table = reach(phase)
        before = len(table.heard(0, RoundMessage.__args__))  # type: ignore[attr-defined, arg-type]
        end(table)
        assert isinstance(table.over(0).error, RoundClosed)
        assert table.over(0).released == (phase == Phase.UNMASKED)
        assert table.over(0).spent == (phase >= Phase.SENDING)
        table.give(0, Tick(), 2e6)
        table.train(0)
        sent = [each for each in table.heard(0, RoundMessage.__args__)[before:] if not isinstance(each, Noted)]  # type: ignore[attr-defined, arg-type]
        assert [] == sent and float("inf") == table.clients[0].wake_at


@pytest.mark.parametrize("phase", [Phase.SENDING, Phase.SIGNED, Phase.UNMASKED], ids=lambda phase: phase.name)
def test_a_survivor_that_was_not_needed_is_one_all_the_same(phase: Phase) -> None:
    """The shares of others were enough before it was asked: it is told the result, and has given nothing."""
    table = reach(phase)
    table.tell(0, Released, (0, 1, 2, 3), 4.0, 0, 0, ())
    end = table.over(0)
    assert end.result is not None and end.error is None and end.spent
    assert bool(table.heard(0, Unmask)) == end.released == (phase == Phase.UNMASKED)
    assert [Remember(9, 0)] == [each for each in table.said[0] if isinstance(each, Remember)]


def test_refusals_of_other_sessions_and_lives_change_nothing() -> None:
    """As does what comes from a shard and is the coordinator's to say."""
    table = reach(Phase.SENDING)
    table.give(0, Received(COORDINATOR, Refused(SESSION + 1, "round_closed", "")))
    table.give(0, Received(COORDINATOR, Abandoned(2, SESSION, "")))
    table.give(0, Received(0, Abandoned(1, SESSION, "")))
    assert Phase.SENDING == table.clients[0].phase


def test_slices_are_sent_again_from_where_they_are_kept() -> None:
    """What a shard cannot have is not believed; a new connection begins where the shard was."""
    table = reach(Phase.SENDING)
    (piece,) = table.heard(0, Masked)
    size = len(piece.buffers[0])
    assert ELEMENTS * 4 + 4 * 8 == size
    for wrong in (
        Kept(1, SHARD, SESSION, 3),
        Kept(1, SHARD, SESSION, size + 1),
        Kept(1, SHARD + 1, SESSION, size),
        Kept(1, SHARD, 5, size),
    ):
        table.give(0, Received(0, wrong))
    table.give(0, Received(5, Kept(1, SHARD, SESSION, size)))
    table.give(0, Tick(), 1.0)
    assert [bytes(piece.buffers[0])] * 2 == [bytes(each.buffers[0]) for each in table.heard(0, Masked)]
    table.give(0, Linked(0), 1.1)
    assert 3 == len(table.heard(0, Masked))
    table.give(0, Received(0, Kept(1, SHARD, SESSION, size)), 1.2)
    table.give(0, Linked(0), 1.3)
    table.give(0, Tick(), 5.0)
    assert 3 == len(table.heard(0, Masked))


def test_a_shard_that_refuses_ends_the_round_for_this_client() -> None:
    """The coordinator hears that it is gone."""
    table = reach(Phase.SENDING)
    table.give(0, Received(0, Refused(SESSION, "round_closed", "")))
    assert isinstance(table.over(0).error, RoundClosed)
    assert ["RoundClosed"] == [each.code for each in table.heard(0, Withdraw)]


def test_training_that_ends_early_waits_for_the_roster() -> None:
    """And training for a session that is over counts for nothing."""
    table = Table()
    table.invite()
    table.train(0)
    assert not table.heard(0, Deal)
    table.tell(0, Roster, table.rosters()[0])
    assert 1 == len(table.heard(0, Deal))
    table.session += 1
    table.train(1)
    table.session -= 1
    table.tell(1, Roster, table.rosters()[1])
    assert not table.heard(1, Deal)
