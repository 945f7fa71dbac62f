"""A client's and an executor's core alone (rung T0; schedules are in test_tasksim)."""

from __future__ import annotations

import hashlib
import json
from math import inf
from typing import Any

import pytest
from cores import carried, kinds, only

from shoal.protocol import tasking as t
from shoal.protocol.asking import Answer, Inquire
from shoal.protocol.effects import COORDINATOR, Denied, Fail, Linked, Log, Open, Received, Resolve, Send, Tick, Unlinked
from shoal.protocol.errors import AuthError, QueueFull, ServerLost, TaskFailed, WaitTimeout
from shoal.protocol.records import Place
from shoal.tasks.card import Card, Cost
from shoal.worker.calls import Cancelled
from shoal.worker.executor import (
    Executor,
    Finished,
    Gone,
    Job,
    NextCalled,
    OpenCalled,
    Ready,
    StopCalled,
    Unable,
    Version,
)
from shoal.worker.finder import DISPATCHER
from shoal.worker.submitter import HEAR, AskCalled, HearCalled, SubmitCalled, Submitter, inquiry

ME = 5


class Bench:
    """A core whose coordinator and dispatcher are played."""

    def __init__(self, core: Any, key: str = "", theirs: str = "") -> None:
        self.core, self.now = core, 0.0
        self.give(Tick())
        request = only(Inquire, self.give(Linked(COORDINATOR))[0]).request
        place = json.dumps({"host": "there", "port": 7, "key": theirs}).encode()
        _, effects = self.give(Received(COORDINATOR, carried(Answer(request, 0.0, (place,)))))
        self.opened = [effect for effect in effects if isinstance(effect, Open)]

    def give(self, event: Any, seconds: float = 0.0) -> tuple[list[Any], list[Any]]:
        """What it says, and its other effects."""
        self.now += seconds
        effects = self.core.handle(event, self.now)
        self.core.check()
        said = [carried(effect.message) for effect in effects if isinstance(effect, Send)]
        return said, [effect for effect in effects if not isinstance(effect, Send)]

    def link(self) -> list[Any]:
        return self.give(Linked(DISPATCHER))[0]

    def hear(self, message: Any) -> tuple[list[Any], list[Any]]:
        return self.give(Received(DISPATCHER, carried(message)))


def client(linked: bool = True, key: str = "", theirs: str = "") -> Bench:
    bench = Bench(Submitter(Place(0, 0, "here", 1, key), ME), key, theirs)
    if linked:
        bench.link()
    return bench


def submit(bench: Bench, ticket: int, deadline: float = inf) -> list[Any]:
    asked = t.Asked(0, "kind", "", 1, inf, 0.0, "", inf, deadline)
    return bench.give(SubmitCalled(ticket, asked, b"x"))[0]


def told(number: int, code: str = "") -> t.Told:
    return t.Told(number, code, "why" if code else "", "m", 1, "ab", "x", 0.1)


def test_the_dispatcher_is_found_and_found_again() -> None:
    bench = client(linked=False)
    assert ("there", 7, "") == (bench.opened[0].host, bench.opened[0].port, bench.opened[0].key)
    submit(bench, 1)
    assert 1 == len(only(t.Submit, bench.link()).tasks)
    said, _ = bench.give(Unlinked(DISPATCHER))
    again = only(Inquire, said)
    place = json.dumps({"host": "there", "port": 8, "key": ""}).encode()
    _, effects = bench.give(Received(COORDINATOR, Answer(again.request, 0.0, (place,))))
    assert 8 == effects[0].port
    assert 1 == len(only(t.Submit, bench.link()).tasks), "what was not answered is said again"


def test_a_dispatcher_without_a_key_is_not_talked_to() -> None:
    bench = client(linked=False, key="k" * 43)
    assert not bench.opened and isinstance(bench.core.timed_out(1.0, 1.0), AuthError)
    _, effects = bench.give(SubmitCalled(1, t.Asked(0, "kind", "", 1, inf, 0.0, "", inf, inf), b""))
    assert isinstance(effects[0], Fail) and isinstance(effects[0].error, AuthError)
    bench = client()
    bench.give(Denied(DISPATCHER, "holds another key"))
    assert isinstance(bench.core.timed_out(1.0, 1.0), AuthError)


def test_tasks_go_together_while_two_messages_are_under_way() -> None:
    bench = client()
    assert [1, 1] == [len(only(t.Submit, submit(bench, ticket)).tasks) for ticket in (1, 2)]
    assert not any(submit(bench, ticket) for ticket in range(3, 100))
    said, _ = bench.hear(t.Taken(ME, (1,)))
    assert 97 == len(only(t.Submit, said).tasks)
    assert list(range(3, 100)) == [each.number for each in only(t.Submit, said).tasks]


def test_what_is_not_taken_is_said_again() -> None:
    bench = client()
    submit(bench, 1)
    assert not bench.give(Tick(), 0.5)[0]
    assert 1 == only(t.Submit, bench.give(Tick(), 0.6)[0]).tasks[0].number
    bench.hear(t.Taken(ME, (1,)))
    assert not bench.give(Tick(), 5.0)[0]
    assert "Submit" in kinds(bench.give(Tick(), 30.0)[0]), "an answer may have been lost"


def test_the_first_answer_counts() -> None:
    bench = client()
    submit(bench, 7)
    said, effects = bench.hear(t.Answers(ME, (told(1),), (b"out",)))
    assert (7, b"out") == (effects[0].ticket, bytes(effects[0].value.output)) and not said
    said, effects = bench.hear(t.Answers(ME, (told(1, "failed"),), (b"",)))
    assert not said and not effects
    submit(bench, 8)
    _, effects = bench.hear(t.Answers(ME, (told(2, "failed"),), (b"",)))
    assert isinstance(effects[0].error, TaskFailed) and "why" in str(effects[0].error)
    assert not bench.hear(t.Answers(ME + 1, (told(2),), (b"",)))[0], "another client's"


def test_answers_are_confirmed_together() -> None:
    """After a moment, or when there are many, or when the client is told to; what was said once is not said again."""
    bench = client()
    for ticket in (1, 2, 3):
        submit(bench, ticket)
    for number in (1, 2):
        assert "Heard" not in kinds(bench.hear(t.Answers(ME, (told(number),), (b"",)))[0]) and bench.core.owes
    assert bench.core.wake_at <= HEAR
    assert (1, 2) == only(t.Heard, bench.give(Tick(), HEAR)[0]).numbers and not bench.core.owes
    assert not bench.give(Tick(), 2 * HEAR)[0]
    bench.hear(t.Answers(ME, (told(3),), (b"",)))
    assert (3,) == only(t.Heard, bench.give(HearCalled())[0]).numbers
    many = tuple(told(number) for number in range(4, 4 + 513))
    said, _ = bench.hear(t.Answers(ME, many, (b"",) * len(many)))
    assert [512, 1] == [len(message.numbers) for message in said]


def test_a_full_queue_and_a_deadline() -> None:
    bench = client()
    submit(bench, 1)
    _, effects = bench.hear(t.Busy(ME, (1,), 0.5))
    assert isinstance(effects[0].error, QueueFull) and 0.5 == effects[0].error.retry_after
    submit(bench, 2, deadline=2.0)
    _, effects = bench.give(Tick(), 3.5)
    assert isinstance(effects[0].error, TaskFailed) and "not done within 2 s" in str(effects[0].error)
    assert 1 == len(only(t.Submit, submit(bench, 3)).tasks), "what has failed takes nobody's place"


def test_questions_are_repeated_and_taken_back() -> None:
    bench = client()
    said, _ = bench.give(AskCalled(1, inquiry("tasks")))
    request = only(Inquire, said).request
    assert request == only(Inquire, bench.give(Tick(), 1.1)[0]).request
    _, effects = bench.hear(Answer(request, 0.0, (b"[]",)))
    assert 1 == effects[0].ticket and not bench.hear(Answer(request, 0.0, (b"[]",)))[1]
    bench.give(AskCalled(2, inquiry("tasks")))
    submit(bench, 3)
    for ticket in (2, 3):
        bench.give(Cancelled(ticket))
    assert not bench.give(Tick(), 2.0)[0] and 0 == bench.core.waiting
    assert isinstance(bench.core.timed_out(1.0, bench.now), WaitTimeout)
    bench.give(Unlinked(DISPATCHER))
    assert isinstance(bench.core.timed_out(9.0, bench.now + 9.0), ServerLost)


# --- an executor


WEIGHTS = b"w" * 100


def card(weights: bytes = WEIGHTS, memory: int = 0) -> Card:
    return Card("m", 1, hashlib.sha256(weights).hexdigest(), len(weights), {}, Cost(0.0, memory, 0))


def executor(memory: float = inf) -> Bench:
    bench = Bench(Executor(Place(0, 0, "here", 1, ""), ME, "x", ("m",), None, 1.0, memory))
    only(t.Offer, bench.link())
    return bench


def fetched(bench: Bench, one: Card, weights: bytes = WEIGHTS) -> list[Any]:
    """A version is told, asked for and comes. Its other effects."""
    said, effects = bench.hear(t.Load(ME, (one.identity,), (one.packed,)))
    fetch = only(t.Fetch, said)
    for at in range(0, len(weights), 60):
        said, effects = bench.hear(t.Chunk(ME, fetch.weights, at, len(weights), (weights[at : at + 60],)))
    return effects


def test_a_version_is_loaded_and_answers() -> None:
    bench, one = executor(), card()
    bench.give(NextCalled(1))
    (resolved,) = fetched(bench, one)
    assert Version(one, WEIGHTS) == resolved.value and not bench.core.loaded, "it is not in memory yet"
    assert (one.identity,) == only(t.Offer, bench.give(Ready(one.identity))[0]).loaded
    bench.give(NextCalled(2))
    _, (job,) = bench.hear(t.Work(ME, 9, one.identity, (1, 1), (b"a", b"b")))
    assert Job(9, one.identity, (1, 1), (b"a", b"b")) == job.value
    assert not bench.hear(t.Work(ME, 9, one.identity, (1, 1), (b"a", b"b")))[1], "the same work again"
    said, _ = bench.give(Finished(9, 0.5, ("", "no"), (b"A", b"")))
    done = only(t.Done, said)
    assert (9, 0.5, ("", "no")) == (done.batch, done.seconds, done.errors)
    assert done == only(t.Done, bench.give(Tick(), 1.1)[0]), "until it is settled"
    bench.hear(t.Settled(ME, 9))
    assert "Done" not in kinds(bench.give(Tick(), 1.1)[0])


def test_what_is_at_work_is_not_dropped() -> None:
    bench, one = executor(), card()
    bench.give(NextCalled(1))
    fetched(bench, one)
    bench.give(Ready(one.identity))
    bench.hear(t.Work(ME, 1, one.identity, (1,), (b"a",)))
    bench.hear(t.Load(ME, (), ()))
    assert (one.identity,) == bench.core.loaded
    bench.give(NextCalled(2))
    bench.give(Finished(1, 0.1, ("",), (b"A",)))
    bench.give(NextCalled(3))
    assert not bench.core.loaded
    said, _ = bench.hear(t.Work(ME, 2, one.identity, (1,), (b"a",)))
    assert () == only(t.Done, said).errors, "not done: it is not here any more"


def test_who_has_dropped_a_version_is_told() -> None:
    bench, one = executor(), card()
    bench.give(NextCalled(1))
    fetched(bench, one)
    bench.give(Ready(one.identity))
    bench.give(NextCalled(2))
    _, effects = bench.hear(t.Load(ME, (), ()))
    assert [Gone(one.identity)] == [effect.value for effect in effects if isinstance(effect, Resolve)]


@pytest.mark.parametrize("fault", ["hash", "memory", "longer", "card", "reading"])
def test_a_version_that_cannot_be_served_says_why(fault: str) -> None:
    bench, one = executor(memory=50 if fault == "memory" else inf), card()
    bench.give(NextCalled(1))
    match fault:
        case "hash":
            effects = fetched(bench, one, b"v" * 100)
        case "memory":
            _, effects = bench.hear(t.Load(ME, (one.identity,), (one.packed,)))
        case "longer":
            bench.hear(t.Load(ME, (one.identity,), (one.packed,)))
            _, effects = bench.hear(t.Chunk(ME, one.weights, 0, 200, (b"w" * 200,)))
        case "card":
            _, effects = bench.hear(t.Load(ME, ("0" * 64,), (one.packed,)))
        case _:
            fetched(bench, one)
            _, effects = bench.give(Unable(one.identity, "no safetensors"))
    assert isinstance(effects[0], Log)
    (failed,) = only(t.Offer, bench.give(Tick(), 1.1)[0]).failed
    assert {"hash": "SHA-256", "memory": "100 bytes", "longer": "longer", "card": "card", "reading": "safetensors"}[
        fault
    ] in failed[1]


def test_an_executor_that_stops_is_done() -> None:
    bench = executor()
    bench.give(NextCalled(1))
    bench.give(OpenCalled(2))
    said, effects = bench.give(StopCalled(3))
    assert ["Retire"] == kinds(said)
    assert {1: "Fail", 2: "Fail", 3: "Resolve"} == {effect.ticket: type(effect).__name__ for effect in effects}
    said, effects = bench.give(NextCalled(4))
    assert not said and isinstance(effects[0], Fail) and inf == bench.core.wake_at
