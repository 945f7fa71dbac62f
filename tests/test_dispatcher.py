"""The dispatcher's core alone: what it promises, repeats and refuses (rung T0; schedules are in test_tasksim)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
from cores import carried, kinds, only
from tasknet import NAME, MemoryLibrary

from shoal.protocol import tasking as t
from shoal.protocol.asking import Answer, Inquire
from shoal.protocol.effects import COORDINATOR, Received, Send, Tick, Unreadable
from shoal.protocol.messages import Refused
from shoal.tasks.book import SqliteBook
from shoal.tasks.dispatcher import KEEP, Dispatcher, Settings

CLIENT, X = 11, 77
OUT = b"\x01\x01"


class Bench:
    """A dispatcher with one version promoted, in virtual time."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.path, self.settings = folder / "tasks.sqlite", Settings(**settings)
        self.library = MemoryLibrary()
        self.card = self.library.make(NAME, b"weights", {NAME: {"auc": 0.5}}, ("site:a",))
        self.library.promote(NAME, 1)
        self.now, self.life = 0.0, 0
        self.begin()

    def begin(self) -> None:
        self.book = SqliteBook(self.path)
        self.life += 1000
        self.core = Dispatcher(self.life, self.book, self.library, self.settings, ("host", 1, ""))

    def restart(self) -> None:
        self.book._writing = False
        self.book.end()
        self.begin()

    def hear(self, message: Any, peer: Any = b"k") -> list[Any]:
        """What it says at once."""
        return self._give(Received(peer, carried(message)))

    def turn(self, seconds: float = 0.0) -> list[Any]:
        """What it decides."""
        self.now += seconds
        return self._give(Tick())

    def _give(self, event: Any) -> list[Any]:
        effects = self.core.handle(event, self.now)
        self.core.check()
        return [
            carried(effect.message) for effect in effects if isinstance(effect, Send) and effect.peer != COORDINATOR
        ]

    def submit(self, *numbers: int, label: str = "", deadline: float = inf, payload: bytes = b"\x01\x02") -> list[Any]:
        asked = tuple(t.Asked(n, NAME, "", 1, inf, 0.0, label, inf, deadline) for n in numbers)
        return [*self.hear(t.Submit(CLIENT, asked, (payload,) * len(numbers))), *self.turn()]

    def offer(self, *batches: int, name: str = "x", incarnation: int = X, loaded: bool = True) -> list[Any]:
        held = (self.card.identity,) if loaded else ()
        offer = t.Offer(incarnation, name, (NAME,), True, (), 1.0, inf, held, (), batches)
        return [*self.hear(offer, b"x"), *self.turn()]

    def done(self, batch: int, count: int = 1, error: str = "", incarnation: int = X) -> list[Any]:
        said = t.Done(incarnation, batch, 0.001, (error,) * count, ((b"",) if error else (OUT,)) * count)
        return [*self.hear(said, b"x"), *self.turn()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.book.end()


def test_a_task_goes_there_and_back(bench: Bench) -> None:
    assert (1, 2) == only(t.Taken, bench.submit(1, 2)).numbers
    said = bench.offer()
    work = only(t.Work, said)
    assert (bench.card.identity, (1, 1)) == (work.identity, work.items) and "Load" in kinds(said)
    said = bench.done(work.batch, 2)
    answers = only(t.Answers, said)
    assert work.batch == only(t.Settled, said).batch
    assert [(1, "", NAME, 1, "x"), (2, "", NAME, 1, "x")] == [
        (a.number, a.code, a.model, a.version, a.executor) for a in answers.answers
    ]
    assert (OUT, OUT) == tuple(map(bytes, answers.buffers))
    bench.hear(t.Heard(CLIENT, (1, 2, 2, 9)))
    assert not bench.turn(1.0) and not bench.core._unheard


def test_an_answer_that_nobody_fetches_is_forgotten(bench: Bench) -> None:
    """After an hour; who comes for it later is told so, and the task is not done again."""
    bench.submit(1)
    bench.done(only(t.Work, bench.offer()).batch, 1)
    bench.turn(KEEP - 10.0)
    assert 1 == len(bench.core._unheard)
    bench.turn(20.0)
    assert not bench.core._unheard and 1 == bench.core.counters["forgotten"]
    answer = only(t.Answers, bench.submit(1)).answers[0]
    assert ("failed", True) == (answer.code, "not any more" in answer.text) and not bench.core._items


def test_what_is_taken_outlives_the_dispatcher(bench: Bench) -> None:
    """Also what is answered and not heard. What was not said to be taken need not."""
    bench.submit(1, 2)
    work = only(t.Work, bench.offer())
    bench.hear(
        t.Submit(CLIENT, (t.Asked(3, NAME, "", 1, inf, 0.0, "", inf, inf),), (b"",))
    )  # no turn: nothing was promised
    bench.restart()
    assert (2, 0) == (len(bench.core.waiting), len(bench.core._unheard))
    again = only(t.Work, bench.offer())
    assert again.batch != work.batch and 2 == len(again.items)
    assert "Answers" not in kinds(bench.done(work.batch, 2)), "of a life before"
    bench.done(again.batch, 2)
    bench.restart()
    assert (0, 2) == (len(bench.core.waiting), len(bench.core._unheard))
    assert 2 == len(only(t.Answers, bench.submit(1, 2)).answers), "who asks again is answered again"


def test_what_is_repeated_counts_once(bench: Bench) -> None:
    assert only(t.Taken, bench.submit(1)) == only(t.Taken, bench.submit(1))
    work = only(t.Work, bench.offer())
    assert "Work" not in kinds(bench.submit(1))
    bench.done(work.batch)
    assert ["Settled"] == kinds(bench.done(work.batch))
    assert only(t.Answers, bench.submit(1)).answers[0].number == 1
    assert {"answered": 1} == dict(bench.core.counters)


def test_answers_are_said_until_they_are_heard(bench: Bench) -> None:
    bench.submit(1)
    bench.done(only(t.Work, bench.offer()).batch)
    times = 0
    for _ in range(200):
        times += kinds(bench.turn(1.0)).count("Answers")
        bench.offer()
    assert 4 <= times <= 8, "ever more seldom, and not for ever"


def test_work_that_was_lost_is_said_again_and_of_the_dead_given_on(bench: Bench) -> None:
    bench.submit(1)
    work = only(t.Work, bench.offer())
    bench.now += 2.0
    assert work == only(t.Work, bench.offer()), "an offer that does not name it"
    assert "Work" not in kinds(bench.offer(work.batch))
    bench.offer(name="y", incarnation=78)
    bench.now += 4.0
    assert "Work" not in kinds(bench.offer(name="y", incarnation=78))
    said = bench.turn(1.5)  # x has been silent for its lease
    assert 78 == only(t.Work, said).executor
    assert "Answers" not in kinds(bench.done(work.batch)), "too late"


def test_an_executor_that_was_started_again_replaces_itself(bench: Bench) -> None:
    bench.submit(1)
    work = only(t.Work, bench.offer())
    again = only(t.Work, bench.offer(incarnation=78))
    assert (78, 1) == (again.executor, len(bench.core.crew)) and again.batch != work.batch
    bench.hear(t.Retire(78), b"x")
    assert not len(bench.core.crew) and 1 == len(bench.core.waiting)


def test_a_batch_that_was_not_done_waits_again(bench: Bench) -> None:
    """The executor has dropped the version."""
    bench.submit(1)
    work = only(t.Work, bench.offer())
    said = [*bench.hear(t.Done(X, work.batch, 0.0, (), ()), b"x"), *bench.turn()]
    assert only(t.Work, said).batch != work.batch and "Answers" not in kinds(said)


def test_failures_name_who_and_why(bench: Bench) -> None:
    bench.submit(1)
    answer = only(t.Answers, bench.done(only(t.Work, bench.offer()).batch, error="ValueError: no")).answers[0]
    assert ("failed", "on x: ValueError: no") == (answer.code, answer.text)
    answer = only(t.Answers, bench.submit(2, label="site:b")).answers[0]
    assert ("unmet", f"no model qualifies: {NAME} 1 on x: privacy: not cleared for the task's data") == (
        answer.code,
        answer.text,
    )
    bench.hear(t.Retire(X), b"x")
    bench.hear(t.Heard(CLIENT, (1, 2)))
    bench.submit(3, deadline=2.0)
    assert "Answers" not in kinds(bench.turn(1.9))
    assert "deadline" == only(t.Answers, bench.turn(0.2)).answers[0].code


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    bench = Bench(tmp_path, most_tasks=2, most_bytes=10)
    busy = only(t.Busy, bench.submit(1, 2, 3))
    assert (3,) == busy.numbers and 0 < busy.after < inf
    bench.restart()
    bench.book.end()
    other = Bench(tmp_path / "other", most_bytes=10)
    assert (2, 3) == only(t.Busy, other.submit(1, 2, 3, payload=b"\x01" * 8)).numbers
    other.book.end()


def test_feedback_counts_once(bench: Bench) -> None:
    bench.submit(1, 2)
    bench.done(only(t.Work, bench.offer()).batch, 2)

    def said(*values: tuple[int, float]) -> int:
        of = tuple(t.Valued(CLIENT, number, reward) for number, reward in values)
        return only(t.Counted, bench.hear(t.Feedback(CLIENT, 1, of, (b"",) * len(of)))).unknown

    assert (0, 3) == (said((1, 1.0)), said((9, 1.0), (2, -1.0), (2, 1.5)))
    belief = bench.core.beliefs[bench.card.identity, NAME]
    assert 1 == belief.count
    before = belief.mean
    said((1, 0.0))
    assert 1 == bench.core.beliefs[bench.card.identity, NAME].count, "what was said last counts, alone"
    assert bench.core.beliefs[bench.card.identity, NAME].mean < before
    bench.restart()
    assert 1 == bench.core.beliefs[bench.card.identity, NAME].count


def test_promotions_are_done_once_and_told(bench: Bench) -> None:
    other = bench.library.make(NAME, b"others", {NAME: {"auc": 0.6}}, ())
    raw = bench.library.make(NAME, b"raw", {}, ())
    bench.offer()
    govern = t.Govern(CLIENT, 1, "promote", NAME, other.version, 0.0, "")
    said = bench.hear(govern)
    assert 2 == only(t.Governed, said).version and other.identity in only(t.Load, said).identities
    assert bench.card.identity in only(t.Load, said).identities, "until the new one is there the old one answers"
    assert 2 == only(t.Governed, bench.hear(govern)).version and [1, 2] == bench.library.stacks[NAME]
    bench.restart()
    assert 2 == only(t.Governed, bench.hear(govern)).version and [1, 2] == bench.library.stacks[NAME]
    for number, (what, version) in enumerate((("promote", raw.version), ("promote", 9), ("canary", 2), ("sell", 1)), 2):
        refused = only(Refused, bench.hear(t.Govern(CLIENT, number, what, NAME, version, 0.5, "")))
        assert (number, "config") == (refused.request, refused.code) and refused.text


def test_a_peers_mistakes_are_counted(bench: Bench) -> None:
    bench.hear(t.Submit(CLIENT, (t.Asked(1, "", "", 1, inf, 0.0, "", inf, inf),), (b"",)))
    bench.hear(t.Submit(CLIENT, (t.Asked(2, NAME, "", 1, -1.0, 0.0, "", inf, inf),), (b"",)))
    bench.hear(t.Submit(CLIENT, (t.Asked(3, NAME, "", 1, inf, 2.0, "", inf, inf),), (b"",)))
    bench.hear(t.Offer(X, "\n", (NAME,), True, (), 1.0, inf, (), (), ()))
    bench.hear(t.Taken(CLIENT, (1,)))
    bench.core.handle(Unreadable(b"k", "garbage"), 0.0)
    assert {"rejected.malformed": 4, "rejected.misplaced": 1, "rejected.garbage": 1} == dict(bench.core.counters)
    assert "weights" == only(Refused, bench.hear(t.Fetch(X, "0" * 64, 0))).code
    bench.submit(5)
    work = only(t.Work, bench.offer())
    said = [*bench.hear(t.Done(X, work.batch, 0.0, ("", ""), (OUT, OUT)), b"x"), *bench.turn()]
    assert "failed" == only(t.Answers, said).answers[0].code, "an answer to other tasks than were given"


def test_it_says_how_it_is(bench: Bench) -> None:
    bench.submit(1)
    bench.offer()

    def told(what: str) -> Any:
        return json.loads(bytes(only(Answer, bench.hear(Inquire(1, what))).buffers[0]))

    assert (0, 1, ["x"]) == (
        told("status")["waiting"],
        told("status")["at_work"],
        [each["name"] for each in told("status")["executors"]],
    )
    assert ["open"] == [each["state"] for each in told("tasks")]
    assert told(f"task:{CLIENT:016x}-1")["kind"] == NAME
    assert told("models")[0]["promoted"] == 1 and told(f"model:{NAME}")["versions"][0]["version"] == 1
    for what in ("task:zz-1", "task:1", "model:nobody", "weather"):
        assert ["error"] == list(told(what))
