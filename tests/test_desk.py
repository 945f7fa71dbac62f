"""Requests to the coordinator: repeated each second under one number until answered (rung T0, SPEC §7)."""

from __future__ import annotations

from shoal.protocol.messages import Claim, Message
from shoal.worker.desk import RETRY, Ask, Desk


def ask(name: str, ticket: int = 0, *, lasting: bool = True) -> Ask:
    def make(incarnation: int, request: int) -> Message:
        return Claim(incarnation, request, name, 1)

    return Ask(ticket, make, lasting)


def said(messages: list[Message]) -> list[tuple[str, int]]:
    return [(message.job, message.request) for message in messages if isinstance(message, Claim)]


def test_a_request_is_repeated_until_it_is_answered() -> None:
    """At once, then each second, with the same number; the answer ends it, and a second answer is nobody's."""
    desk = Desk()
    number = desk.add(ask("a", 5))

    assert [("a", number)] == said(desk.due(1, 10.0))
    assert [] == desk.due(1, 10.0 + RETRY * 0.99)
    assert [("a", number)] == said(desk.due(1, 10.0 + RETRY))
    assert desk.get(number) is (answered := desk.answered(number))
    assert answered is not None
    assert (5, 2) == (answered.ticket, answered.sent)
    assert desk.answered(number) is None
    assert (0, []) == (len(desk), desk.due(1, 99.0))
    assert desk.add(ask("b")) > number  # a late answer to the old request must find nobody


def test_a_new_connection_sends_everything_again() -> None:
    """What was on the old one may be lost: nothing waits for its second."""
    desk = Desk()
    first, second = desk.add(ask("a")), desk.add(ask("b"))
    desk.due(1, 10.0)
    desk.hurry()

    assert [("a", first), ("b", second)] == said(desk.due(1, 10.1))


def test_a_new_life_carries_over_what_still_means_something() -> None:
    """Under a new incarnation lasting requests are asked anew, with new numbers, in their order; the others are given back."""
    desk = Desk()
    old = {desk.add(ask("a", 1)), desk.add(ask("gone", 2, lasting=False)), desk.add(ask("b", 3))}
    desk.due(1, 10.0)
    dropped = desk.carry_over()

    again = said(desk.due(2, 10.1))
    assert [2] == [one.ticket for one in dropped]
    assert ["a", "b"] == [name for name, _ in again]
    assert not old & {number for _, number in again}
    assert [1, 3] == desk.tickets()


def test_what_the_others_rest_on_goes_first() -> None:
    """A coordinator that has forgotten a data set hears of it before it is asked for a part of it."""
    desk = Desk()
    desk.add(ask("claim"))
    desk.add_first(ask("declare"))

    assert ["declare", "claim"] == [name for name, _ in said(desk.due(1, 0.0))]


def test_nobody_waits_any_more() -> None:
    """A dropped ticket's request is not sent again, and its answer finds nobody; ticket 0 is nobody's."""
    desk = Desk()
    number = desk.add(ask("a", 5))
    desk.add(ask("own"))
    desk.drop(5)

    assert desk.answered(number) is None
    assert [] == desk.tickets()
    assert ["own"] == [name for name, _ in said(desk.due(1, 0.0))]
