"""A shard's half of a federated round (rung T0, SPEC §14.4, §14.6): what it takes, adds, refuses and gives back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.protocol.effects import COORDINATOR, Received, Send, Tick
from shoal.protocol.join import CLEAR
from shoal.protocol.messages import Hello, Refused
from shoal.protocol.rounds import (
    APPLIED,
    NOTHING,
    READY,
    Abandoned,
    Arrived,
    Begin,
    Finish,
    Finished,
    Kept,
    Masked,
    Noted,
    Recall,
    Recalled,
    Released,
    Ruling,
)
from shoal.protocol.secure.fixed import UNIFORM, Quantiser, auxiliary
from shoal.protocol.secure.masks import AUXILIARY, Masks
from shoal.protocol.session import PIECE, Slice
from shoal.ps.accumulator import Accumulator, Apply
from shoal.ps.recipe import Recipe

ME = 700
SESSION = 11
MEMBERS = (1, 2, 3)
ELEMENTS = 10


class Bench:
    """A shard in a session of three, and slices for it."""

    def __init__(self, elements: int = ELEMENTS, **settings: Any) -> None:
        recipe = replace(Recipe(threshold=2, minimum=2, dropout=0.3, corrupt=0.0), **settings)
        self.plan = recipe.plan(5, 0, 3, (elements,), bytes(32), bytes(32))
        self.shard = Accumulator(ME, elements, lambda: b"d" * 32)
        self.masked = self.plan.threshold > 0
        self.keys = [bytes([number]) * 32 for number in range(3)]
        draw = np.random.default_rng(1)
        self.updates = [draw.uniform(-1, 1, elements).astype(np.float32) for _ in range(3)]

    def coordinator(self, kind: type[Any], *fields: Any, session: int = SESSION, now: float = 0.0) -> list[Any]:
        return self.shard.handle(Received(COORDINATOR, kind(ME, session, *fields)), now)

    def begin(self, **other: Any) -> list[Any]:
        plan = replace(self.plan, **other)
        return self.coordinator(Begin, 0, MEMBERS, (plan.packed,))

    def slice(self, rank: int, lanes: Any = None) -> bytes:
        scale = self.plan.scale(3)
        count = len(self.updates[rank])
        main = np.empty(count, scale.dtype)
        if self.masked:
            Quantiser(scale, UNIFORM).write(self.updates[rank], main)
        lanes = auxiliary(UNIFORM, 0, [], 3) if lanes is None else lanes
        if self.masked:
            Masks([self.keys[rank]]).apply(main)
            Masks([self.keys[rank]], domain=AUXILIARY).apply(lanes)
        data = (main if self.masked else self.updates[rank]).tobytes()
        return data + bytes(-len(data) % 8) + lanes.tobytes()

    def send(self, rank: int, data: bytes | None = None, offset: int = 0, session: int = SESSION, **other: int) -> Any:
        data = self.slice(rank) if data is None else data
        message = Masked(other.get("inc", MEMBERS[rank]), other.get("shard", ME), session, offset, (data,))
        effects = self.shard.handle(Received(b"peer", message), 0.0)
        (answer,) = [each.message for each in effects if each.peer == b"peer"]
        return answer

    def rule(
        self, number: int, turns: tuple[int, ...], added: tuple[int, ...] = (), dropped: tuple[int, ...] = ()
    ) -> Any:
        return self.coordinator(Ruling, number, turns, added, dropped)

    def ready(self, ranks: tuple[int, ...] = (0, 1, 2)) -> None:
        self.begin()
        self.rule(1, ranks)
        for rank in ranks:
            self.send(rank)
        self.rule(2, (), ranks)

    def finish(self, survivors: tuple[int, ...] = (0, 1, 2), keys: tuple[int, ...] | None = None) -> list[Any]:
        wanted = (survivors if keys is None else keys) if self.masked else ()
        effects = self.coordinator(Finish, survivors, (), (b"", b"".join(self.keys[rank] for rank in wanted)))
        while self.shard.wake_at <= 0.0:
            effects += self.shard.handle(Tick(), 0.0)
        return [each.message for each in effects if isinstance(each, Send) and isinstance(each.message, Finished)]


@pytest.mark.parametrize("settings", [{}, {"bits": 16}, {"protection": CLEAR}], ids=str)
def test_what_was_added_is_averaged(settings: dict[str, Any]) -> None:
    """Of two of three, without the third's mask; it is given back when the coordinator releases it, once."""
    bench = Bench(**settings)
    bench.ready((0, 2))
    (finished,) = bench.finish((0, 2))

    assert finished.right and (2.0, 0, 0) == (finished.weight, finished.capped, finished.clipped)
    effects = bench.coordinator(Released, (0, 2), 2.0, 0, 0, ())
    assert [Apply, Send] == [type(each) for each in effects]
    assert np.abs(effects[0].update - (bench.updates[0] + bench.updates[2]) / 2).max() < (
        1e-3 if bench.plan.bits == 16 else 1e-7
    )
    assert np.float32 == effects[0].update.dtype
    assert [Noted] == [type(each.message) for each in bench.coordinator(Released, (0, 2), 2.0, 0, 0, ())]
    assert [Noted] == [type(each.message) for each in bench.coordinator(Abandoned, "late")]
    assert 0 == bench.shard.holds


def test_a_sum_of_many_parts_is_unmasked_part_by_part() -> None:
    """Between two parts other events are heard, and the memory is that of one sum."""
    bench = Bench(400_000)
    bench.ready()
    assert 4 * 400_000 == bench.shard.holds
    keys = b"".join(bench.keys)
    bench.coordinator(Finish, (0, 1, 2), (), (b"", keys))
    ticks = 0
    while bench.shard.wake_at <= 0.0:
        ticks += 1
        recalled = bench.coordinator(Recall, session=90 + ticks)[0].message
        assert isinstance(recalled, Recalled) and 90 + ticks == recalled.session
        bench.shard.handle(Tick(), 0.0)
    effects = bench.coordinator(Released, (0, 1, 2), 3.0, 0, 0, ())
    assert ticks >= 2
    assert np.abs(effects[0].update - np.mean(bench.updates, axis=0)).max() < 1e-6


def test_a_slice_is_added_when_the_coordinator_says_so() -> None:
    """It is held until then, reported until that is noted, and what is sent again changes nothing."""
    bench = Bench()
    bench.begin()
    bench.rule(1, (0, 1))
    size = Slice(ELEMENTS, 4, 4).size
    assert Kept(1, ME, SESSION, size) == bench.send(0)
    held = bench.shard.holds
    assert held == ELEMENTS * 4 + size
    assert Kept(1, ME, SESSION, size) == bench.send(0)
    (again,) = [each.message for each in bench.shard.handle(Tick(), 1.0)]
    assert Arrived(ME, SESSION, 1, (0,)) == again
    bench.coordinator(Noted, Arrived.TYPE, 1)
    assert not bench.shard.handle(Tick(), 5.0)
    bench.rule(2, (1,), (0,))
    assert ELEMENTS * 4 == bench.shard.holds
    assert Kept(1, ME, SESSION, size) == bench.send(0)
    bench.rule(2, (1,), (0,))
    bench.send(1)
    bench.rule(3, (), (0, 1))
    assert bench.finish((0, 1))[0].right


def test_who_has_no_turn_is_not_held() -> None:
    """It is told that nothing of it is here, and asks again; who is dropped is refused, and its slice is freed."""
    bench = Bench()
    bench.begin()
    bench.rule(1, (0,))
    assert Kept(2, ME, SESSION, 0) == bench.send(1)
    assert ELEMENTS * 4 == bench.shard.holds
    bench.send(0)
    bench.rule(2, (1,), (), (0,))
    assert ELEMENTS * 4 == bench.shard.holds
    answer = bench.send(0)
    assert isinstance(answer, Refused) and (SESSION, "round_closed") == (answer.request, answer.code)


@pytest.mark.parametrize(
    ("other", "session"), [({}, SESSION + 1), ({"inc": 9}, SESSION), ({"shard": 3}, SESSION), ({}, 0)], ids=str
)
def test_foreign_slices_are_refused(other: dict[str, int], session: int) -> None:
    """Of another session, from somebody who is no member, for another life of the shard; and all when the session is over."""
    bench = Bench()
    bench.begin()
    bench.rule(1, (0, 1, 2))
    answer = bench.send(0, session=session, **other)
    assert isinstance(answer, Refused) and (session, "round_closed") == (answer.request, answer.code)
    bench.coordinator(Abandoned, "")
    assert isinstance(bench.send(0), Refused)
    assert 0 == bench.shard.holds


def test_pieces_come_in_order() -> None:
    """One that is not the next says up to where the slice is here; the whole is what was sent."""
    bench = Bench(3_000_000)
    data = bench.slice(0)
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    bench.begin()
    bench.rule(1, (0,))
    assert 3 == len(pieces)
    assert 0 == bench.send(0, pieces[1], PIECE).upto
    assert PIECE == bench.send(0, pieces[0], 0).upto
    assert PIECE == bench.send(0, pieces[2], 2 * PIECE).upto
    assert PIECE == bench.send(0, pieces[0], 0).upto
    assert 2 * PIECE == bench.send(0, pieces[1], PIECE).upto
    assert len(data) == bench.send(0, pieces[2], 2 * PIECE).upto


@pytest.mark.parametrize("length", [0, 1, 71, 73, 1000])
def test_a_piece_of_the_wrong_length_is_refused(length: int) -> None:
    """It is counted, and nothing of it is kept."""
    bench = Bench()
    bench.begin()
    bench.rule(1, (0,))
    answer = bench.send(0, bytes(length))
    assert isinstance(answer, Refused) and "malformed" == answer.code
    assert 1 == bench.shard.counters["rejected.malformed"]
    assert len(bench.slice(0)) == bench.send(0).upto


@pytest.mark.parametrize(
    ("survivors", "keys", "why"),
    [
        ((0, 1), None, "survivors"),
        ((0, 1, 2, 3), (0, 1, 2), "survivors"),
        ((0, 1, 2), (0, 1), "counted"),
        ((0, 1, 2), (), "counted"),
        ((0, 1, 2), (0, 1, 1), "counted"),
    ],
)
def test_a_sum_that_is_not_right_is_not_given(survivors: tuple[int, ...], keys: Any, why: str) -> None:
    """Other survivors than were added, a mask that is missing or wrong: the shard says no, and there is nothing to release."""
    bench = Bench()
    bench.ready()
    (finished,) = bench.finish(survivors, keys)
    assert not finished.right and why in finished.why
    assert not [each for each in bench.coordinator(Released, (), 0.0, 0, 0, ()) if isinstance(each, Apply)]
    assert (0, NOTHING) != bench.shard._last
    (recalled, *_) = [
        each.message for each in bench.coordinator(Recall, session=12) if isinstance(each.message, Recalled)
    ]
    assert NOTHING == recalled.state


def test_an_element_over_its_bound_is_noticed() -> None:
    """A client whose lanes are right and whose elements are not masked as they should be."""
    bench = Bench(100)
    bench.updates[0][0] = bench.updates[1][0] = 1.0
    bench.begin()
    bench.rule(1, (0, 1))
    bench.send(0)
    data = np.frombuffer(bench.slice(1), np.uint32).copy()
    data[0] += np.uint32(1 << 30)
    bench.send(1, data.tobytes())
    bench.rule(2, (), (0, 1))
    (finished,) = bench.finish((0, 1))
    assert not finished.right and "bound" in finished.why


def test_what_is_not_finite_in_the_clear_is_noticed() -> None:
    """Masked it cannot be."""
    for bad in (np.nan, np.inf, 3e38):
        bench = Bench(protection=CLEAR)
        bench.updates[1][3] = bad
        bench.updates[0][3] = bad
        bench.ready()
        (finished,) = bench.finish()
        assert not finished.right and "finite" in finished.why


@pytest.mark.parametrize(
    "ruling",
    [
        (5, (1, 0), (), ()),
        (5, (0,), (0,), ()),
        (5, (), (1,), ()),
        (5, (), (0, 2), ()),
        (5, (), (), ()),
        (5, (), (0, 9), ()),
    ],
)
def test_a_ruling_that_cannot_be_is_refused(ruling: Any) -> None:
    """Not ascending, two things at once, adding what is not here, taking back what was added."""
    bench = Bench()
    bench.begin()
    bench.rule(1, (0, 1, 2))
    bench.send(0)
    bench.rule(2, (1, 2), (0,))
    effects = bench.rule(*ruling)
    assert [Refused] == [type(each.message) for each in effects]
    assert 1 == bench.shard.counters["rejected.malformed"]
    assert [Noted] == [type(each.message) for each in bench.rule(1, (2,))]  # an old one changes nothing


@pytest.mark.parametrize("bad", ["elements", "index", "members", "many", "plan"])
def test_a_round_that_cannot_be_is_refused(bad: str) -> None:
    """Of another size, for another shard, with a member twice, with too many, or no plan at all."""
    bench = Bench(elements=9 if bad == "elements" else ELEMENTS)
    bench.shard._elements = ELEMENTS
    index = 1 if bad == "index" else 0
    members = {"members": (1, 1, 2), "many": (1, 2, 3, 4)}.get(bad, MEMBERS)
    plan = b"x" if bad == "plan" else bench.plan.packed
    effects = bench.coordinator(Begin, index, members, (plan,))
    assert [Refused] == [type(each.message) for each in effects]
    assert 0 == bench.shard.holds


def test_a_session_that_is_over_does_not_begin_again() -> None:
    """A late repetition is noted, and the session that is under way stays."""
    bench = Bench()
    bench.begin()
    bench.coordinator(Begin, 0, MEMBERS, (bench.plan.packed,), session=SESSION + 1)
    assert [Noted] == [type(each.message) for each in bench.begin()]
    bench.coordinator(Ruling, 1, (0,), (), (), session=SESSION + 1)
    assert isinstance(bench.send(0), Refused)
    assert len(bench.slice(0)) == bench.send(0, session=SESSION + 1).upto


def test_a_shard_says_how_its_last_session_ended() -> None:
    """Nothing, ready, applied; and while it is ready no other begins."""
    bench = Bench()

    def state() -> tuple[int, int]:
        found = [each.message for each in bench.coordinator(Recall, session=99)]
        assert [Recalled] == [type(each) for each in found]
        assert b"d" * 32 == found[0].buffers[0]
        return found[0].last, found[0].state

    assert (0, NOTHING) == state()
    bench.ready()
    assert (SESSION, NOTHING) == state()
    bench.finish()
    assert (SESSION, READY) == state()
    begin = bench.coordinator(Begin, 0, MEMBERS, (bench.plan.packed,), session=SESSION + 1)
    assert isinstance(begin[0].message, Refused)
    bench.coordinator(Released, (), 0.0, 0, 0, ())
    assert (SESSION, APPLIED) == state()
    bench.coordinator(Begin, 0, MEMBERS, (bench.plan.packed,), session=SESSION + 2)
    bench.coordinator(Abandoned, "", session=SESSION + 2)
    assert (SESSION + 2, NOTHING) == state()


def test_what_is_the_coordinators_is_not_taken_from_a_worker() -> None:
    """Nor what is for another shard, nor what is no message of a round."""
    bench = Bench()
    message = Begin(ME, SESSION, 0, MEMBERS, (bench.plan.packed,))
    for peer, wrong in (
        (b"w", message),
        (COORDINATOR, replace(message, incarnation=1)),
        (COORDINATOR, Hello(ME, 1, 1)),
    ):
        assert not bench.shard.handle(Received(peer, wrong), 0.0)
    assert not bench.shard.handle(Received(COORDINATOR, Masked(1, ME, SESSION, 0, (b"",))), 0.0)
    assert 4 == bench.shard.counters["rejected.misplaced"] and 0 == bench.shard.holds
