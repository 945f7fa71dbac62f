"""The coordinator's half of one session, message by message (rung T0, SPEC §14.2, §14.4)."""

from __future__ import annotations

from typing import Any

import pytest
from roundnet import RoundNet

from shoal.protocol.join import CLEAR
from shoal.protocol.messages import Refused
from shoal.protocol.rounds import (
    Advertise,
    Arrived,
    Begin,
    Deal,
    Finish,
    Finished,
    Invite,
    Noted,
    Relay,
    Released,
    Roster,
    Ruling,
    Withdraw,
)
from shoal.protocol.secure.keys import Pair
from shoal.protocol.session import SEALED_BYTES, Advert, read_roster
from shoal.ps.recipe import Recipe
from shoal.ps.round import LINGER, Session, Stage

SHARDS = (800, 801)
NUMBER = 31


class Room:
    """A session of five, whose workers and shards say what the test says."""

    def __init__(self, **settings: Any) -> None:
        recipe = Recipe(**{"threshold": 3, "minimum": 3, "corrupt": 0.0, "dropout": 0.4, "room": 2, **settings})
        self.plan = recipe.plan(1, 0, 5, (4, 4), bytes(32), bytes(32))
        self.names = {number: f"w{number}" for number in range(1, 6)}
        self.now = 0.0
        self.session = Session(NUMBER, self.plan, self.names, SHARDS, 0.0, recipe.clients, recipe.room)
        self.masked = self.plan.threshold > 0

    def take(self) -> list[Any]:
        said, self.session.out[:] = list(self.session.out), []
        return [each.message for each in said]

    def say(self, kind: type[Any], who: int, *fields: Any) -> list[Any]:
        self.session.handle(kind(who, NUMBER, *fields), self.now)
        return self.take()

    def note_all(self, messages: list[Any]) -> list[Any]:
        found = []
        for each in messages:
            if not isinstance(each, Noted | Refused):
                found += self.say(Noted, each.incarnation, each.TYPE, getattr(each, "number", 0))
        return found

    def advert(self, who: int, **other: Any) -> Advert:
        pairs = [Pair.fresh().public for _ in range(2)] if self.masked else [b"", b""]
        plain: dict[str, Any] = {"context": self.plan.context, "name": self.names[who], **other}
        return Advert(
            plain["context"], plain["name"], plain.get("sealing", pairs[0]), plain.get("masking", pairs[1]), b""
        )

    def advertise(self, *who: int) -> list[Any]:
        return [each for one in who for each in self.say(Advertise, one, (self.advert(one).packed,))]

    def deal(self, *who: int, near: int = 4) -> list[Any]:
        data = bytes(32 + SEALED_BYTES * near) if self.masked else b""
        return [each for one in who for each in self.say(Deal, one, (data,))]

    def tick(self, now: float) -> list[Any]:
        self.now = now
        self.session.tick(now)
        return self.take()


def kinds(messages: list[Any]) -> list[type[Any]]:
    return [type(each) for each in messages]


def test_the_first_advert_of_a_client_counts() -> None:
    """A second one is noted and changes nothing, in its stage and later."""
    room = Room()
    assert [Invite] * 5 == kinds(room.take())
    first = room.advert(1)
    assert [] == kinds(room.say(Advertise, 1, (first.packed,)))  # a roster may note it
    assert [Noted] == kinds(room.say(Advertise, 1, (room.advert(1).packed,)))
    rosters = [each for each in room.advertise(2, 3, 4, 5) if isinstance(each, Roster)]
    members, _ = read_roster(rosters[1].buffers, True)
    assert first.leaf == members.leaves[0] and ("w1", "w2", "w3", "w4", "w5") == members.names
    assert [Noted] == kinds(room.say(Advertise, 1, (room.advert(1).packed,)))
    assert 1 == members.leaves.count(first.leaf) and Stage.DEAL == room.session.stage


@pytest.mark.parametrize("other", [{"name": "w2"}, {"context": bytes(32)}, {"sealing": bytes([5]) * 32}])
def test_an_advert_of_somebody_else_is_refused(other: dict[str, Any]) -> None:
    """Or for another plan, or with a key that another has advertised; the sender takes no more part."""
    room = Room()
    room.take()
    room.say(Advertise, 3, (room.advert(3, sealing=bytes([5]) * 32).packed,))
    answer = room.say(Advertise, 1, (room.advert(1, **other).packed,))
    assert "malformed" == next(each.code for each in answer if isinstance(each, Refused))
    assert 1 == room.session.counters["rejected.malformed"]
    (again,) = room.say(Advertise, 1, (room.advert(1).packed,))
    assert isinstance(again, Refused) and "round_closed" == again.code
    room.advertise(2, 4, 5)
    assert Stage.DEAL == room.session.stage


def test_a_stage_waits_for_all_or_for_its_deadline() -> None:
    """Who has withdrawn is not waited for; who is late is told so."""
    room = Room()
    room.take()
    room.advertise(1, 2, 3)
    room.say(Withdraw, 4, "ProtectionError")
    assert Stage.ADVERTISE == room.session.stage
    said = room.tick(room.plan.deadlines[0])
    assert Stage.DEAL == room.session.stage
    (refused,) = [each for each in said if isinstance(each, Refused)]
    assert (NUMBER, "round_closed") == (refused.request, refused.code)
    assert 3 == kinds(said).count(Roster)


def test_too_few_end_it() -> None:
    """Everybody who is here hears why, and the shards."""
    room = Room()
    room.take()
    room.advertise(1, 2)
    said = room.tick(room.plan.deadlines[0])
    assert Stage.ABANDONED == room.session.stage and "2 of 3" in room.session.why
    assert {800, 801, 1, 2, 3, 4, 5} == {each.incarnation for each in said}
    room.note_all(said)
    assert room.session.over(room.now)


def test_somebody_who_dealt_and_died_is_in_nobodys_input() -> None:
    """What it sealed for the others is not relayed, so that nobody masks with it."""
    room = Room()
    room.take()
    room.advertise(1, 2, 3, 4, 5)
    room.deal(2)
    room.session.gone(2, 0.0)
    said = room.note_all(room.deal(1, 3, 4, 5))
    relays = [each for each in said if isinstance(each, Relay)]
    assert 2 == len(relays) and all(1 not in each.ranks and 3 == len(each.ranks) for each in relays)
    assert all(len(each.buffers[0]) == 3 * SEALED_BYTES for each in relays)


def test_a_turn_is_told_when_all_shards_know_of_it() -> None:
    """And as many have one as there is room for; the next has its turn when one has arrived everywhere."""
    room = Room()
    room.take()
    room.advertise(1, 2, 3, 4, 5)
    said = room.deal(1, 2, 3, 4, 5)
    begins, rulings = ([each for each in said if isinstance(each, kind)] for kind in (Begin, Ruling))
    assert [800, 801] == [each.incarnation for each in begins] and (1, 2, 3, 4, 5) == begins[0].members
    assert [0, 1] == [each.index for each in begins]
    assert (0, 1) == rulings[0].turns and Relay not in kinds(said)
    assert Relay not in kinds(room.note_all([*begins, rulings[0]]))
    told = room.note_all([rulings[1]])
    assert [1, 2] == [each.incarnation for each in told if isinstance(each, Relay)]
    assert Ruling not in kinds(room.say(Arrived, 800, 1, (0,)))
    (one, two) = [each for each in room.say(Arrived, 801, 1, (0,)) if isinstance(each, Ruling)]
    assert ((1, 2), (0,), ()) == (one.turns, one.added, one.dropped) and one.number == two.number > rulings[0].number
    assert [3] == [each.incarnation for each in room.note_all([one, two]) if isinstance(each, Relay)]
    late = [each for each in room.tick(room.now + room.plan.deadlines[2]) if isinstance(each, Ruling)]
    assert {1, 2} <= set(late[-1].dropped)


def finishing(protection: str = CLEAR) -> Room:
    room = Room(protection=protection)
    room.take()
    room.advertise(1, 2, 3, 4, 5)
    said = room.deal(1, 2, 3, 4, 5)
    while room.session.stage == Stage.MASKED:
        told = room.note_all(said)
        ruling = next((each for each in reversed(said) if isinstance(each, Ruling)), None)
        ranks = tuple(sorted({*(ruling.turns if ruling else ()), *(ruling.added if ruling else ())}))
        said = [*told, *(each for shard in SHARDS for each in room.say(Arrived, shard, len(ranks), ranks))]
    return room


def test_in_the_clear_there_is_nothing_to_unmask() -> None:
    """After the last slice the shards finish, without keys; and all must say the same."""
    room = finishing()
    assert Stage.FINISH == room.session.stage
    said = room.tick(room.now + 1.0)
    assert all((b"", b"") == each.buffers for each in said if isinstance(each, Finish))
    room.say(Finished, 800, True, "", 5.0, 0, 0, ())
    assert Stage.FINISH == room.session.stage
    said = room.say(Finished, 801, True, "", 5.0, 0, 0, ())
    assert Stage.RELEASED == room.session.stage
    ends = [each for each in said if isinstance(each, Released)]
    assert {800, 801} == {each.incarnation for each in ends}
    told = room.note_all(ends)
    assert {1, 2, 3, 4, 5} == {each.incarnation for each in told if isinstance(each, Released)}, (
        "what they pull is there"
    )


@pytest.mark.parametrize(
    "wrong", [(False, "masks", 0.0, 0, 0, ()), (True, "", 4.0, 0, 0, ()), (True, "", 5.0, 0, 1, ())]
)
def test_one_shard_that_is_not_right_is_enough(wrong: tuple[Any, ...]) -> None:
    """Nobody is told to apply anything."""
    room = finishing()
    said = [*room.say(Finished, 800, True, "", 5.0, 0, 0, ()), *room.say(Finished, 801, *wrong)]
    assert Stage.ABANDONED == room.session.stage and Released not in kinds(said)
    assert Released not in kinds(room.say(Finished, 801, True, "", 5.0, 0, 0, ()))


def test_the_end_is_told_until_all_shards_know_it() -> None:
    """Clients are told then, and for a while only; a shard that is gone needs not know."""
    room = finishing()
    for shard in SHARDS:
        said = room.say(Finished, shard, True, "", 5.0, 0, 0, ())
    room.tick(room.now + 60.0)
    assert not room.session.over(room.now)
    room.say(Noted, 800, Released.TYPE, 0)
    assert not room.session.over(room.now)
    room.session.gone(801, room.now)
    assert Stage.RELEASED == room.session.stage and room.session.settled
    assert said and not room.session.over(room.now) and room.session.over(room.now + LINGER)


def test_a_round_is_as_its_plan_says_for_all() -> None:
    """Every client is sent the same bytes."""
    net = RoundNet(1, 4, (3,), Recipe(rounds=1))
    assert net.go()
    assert 1 == len({frames[1] for _, frames in net.wire if frames[0][2] in (Invite.TYPE, Begin.TYPE)})


@pytest.mark.parametrize(("elements", "turns"), [(1000, 4), (10_000_000, 3), (25_000_000, 1), (100_000_000, 1)])
def test_large_slices_come_one_at_a_time(elements: int, turns: int) -> None:
    """What a shard holds beside its sum has a limit, but for one slice."""
    recipe = Recipe()
    assert turns == recipe.turns(recipe.plan(1, 0, 5, (4, elements), bytes(32), bytes(32)))
