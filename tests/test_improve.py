"""From feedback to the next version: the core, in every order of what can happen (rungs T0 and T1)."""

from __future__ import annotations

import random
from math import nan
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.protocol.errors import ConfigError
from shoal.tasks.improve import (
    EVALUATING,
    FAILED,
    GATHERING,
    MOVES,
    NOT_BETTER,
    OVERTAKEN,
    PROMOTED,
    PROMOTING,
    PUBLISHING,
    RESTING,
    STOPPED,
    TRAINING,
    WATCHING,
    Evaluate,
    Evaluated,
    Failed,
    FedBack,
    Improve,
    Outcome,
    Overtaken,
    Promote,
    Promoted,
    Publish,
    Published,
    Rule,
    Serving,
    Tick,
    Train,
    Trained,
    is_held_out,
)

SMALL = Rule(below=0.5, window=20, least=10, examples=20, margin=0.1, rest=10.0, silence=100.0)


class Bench:
    """A core, a clock, and all that it has asked for."""

    def __init__(self, rules: Rule = SMALL) -> None:
        self.core = Improve(rules)
        self.now, self.place, self.served = 0.0, 0, "v1"
        self.asked: list[Any] = []
        self.say(Serving("v1"))

    def say(self, *events: Any) -> None:
        for event in events:
            self.asked += self.core.handle(event, self.now)
            self.core.check()

    def feed(self, count: int, reward: float, identity: str = "", example: bool = True) -> None:
        for _ in range(count):
            self.place += 1
            self.say(FedBack(self.place, identity or self.core.served, reward, example))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.say(Tick())

    @property
    def last(self) -> Any:
        return self.asked[-1]

    def until_training(self) -> int:
        while self.core.state != TRAINING:
            self.feed(1, 0.2)
        assert isinstance(self.last, Train)
        number: int = self.last.attempt
        return number


def test_an_attempt_from_bad_feedback_to_a_better_version() -> None:
    """Each step is asked for when the one before is done; then it rests, and watches the new version."""
    bench = Bench()
    bench.feed(30, 1.0)
    assert WATCHING == bench.core.state and 1.0 == bench.core.quality
    bench.feed(20, 0.0)
    assert Train(1, "v1", 0, "the mean of the last 20 rewards is 0.450, below 0.5") == bench.asked[0]
    bench.say(Trained(1))
    assert Evaluate(1, "v1", 0) == bench.last
    bench.say(Evaluated(1, 0.4, 0.9))
    assert ("v1", 0.9) == (bench.last.parent, bench.last.quality) and isinstance(bench.last, Publish)
    bench.say(Published(1, 7))
    assert ("v1", 7) == (bench.last.parent, bench.last.version) and isinstance(bench.last, Promote)
    bench.say(Serving("v2"), Promoted(1))
    found = bench.last
    assert isinstance(found, Outcome)
    assert (PROMOTED, 7, 0.4, 0.9) == (found.end, found.version, found.before, found.after)
    assert RESTING == bench.core.state and 10.0 == bench.core.wake_at
    bench.feed(60, 1.0)
    bench.wait(10.0)
    assert (WATCHING, "v2", 1.0) == (bench.core.state, bench.core.served, bench.core.quality)


def test_a_fall_is_learned_from_what_came_after_it() -> None:
    """Drift begins an attempt; examples from before are left out, and it waits for enough of the new ones."""
    bench = Bench(Rule(examples=150, rest=10.0))
    draw = random.Random(3)
    for _ in range(600):
        bench.feed(1, float(draw.random() < 0.9))
    while bench.core.state == WATCHING:
        bench.feed(1, float(draw.random() < 0.2))
    assert GATHERING == bench.core.state and bench.place < 800
    while bench.core.state == GATHERING:
        bench.feed(1, float(draw.random() < 0.2))
    train = bench.last
    assert abs(train.after - 600) < 20 and 150 == bench.place - train.after
    assert "rewards fell from 0.9" in train.reason


def test_a_rise_is_no_reason() -> None:
    bench = Bench(Rule(examples=50))
    draw = random.Random(3)
    for number in range(1500):
        bench.feed(1, float(draw.random() < (0.2 if number < 500 else 0.9)))
    assert WATCHING == bench.core.state and not bench.asked


def test_every_so_many() -> None:
    """Whatever the rewards, of whatever version; only what can be learned from counts."""
    bench = Bench(Rule(drift=None, every=30, examples=10, rest=5.0))
    bench.feed(100, 1.0, example=False)
    bench.feed(29, 1.0, "other")
    assert not bench.asked
    bench.feed(1, 0.5)
    assert [Train(1, "v1", 100, "30 new examples")] == bench.asked
    bench.say(Failed(1, "no"))
    bench.wait(5.0)
    bench.feed(29, 1.0)
    assert WATCHING == bench.core.state
    bench.feed(1, 1.0)
    assert Train(2, "v1", 100, "30 new examples") == bench.last


def test_only_the_newest_are_learned_from() -> None:
    bench = Bench(Rule(drift=None, every=100, examples=10, most=40))
    bench.feed(100, 1.0)
    assert 60 == bench.last.after


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.59), (0.5, 0.5), (0.9, 0.1), (0.5, nan), (nan, 0.9), (nan, nan)])
def test_what_is_not_better_is_not_promoted(before: float, after: float) -> None:
    """It was published, with what was measured; the next rest is as usual, and then twice as long each time."""
    bench = Bench()
    for number in range(1, 8):
        assert number == bench.until_training()
        bench.say(Trained(number), Evaluated(number, before, after), Published(number, 2))
        assert NOT_BETTER == bench.last.end
        rest = 10.0 * min(16, 2 ** (number - 1))
        assert rest == bench.core.wake_at - bench.now
        bench.wait(rest)
        assert WATCHING == bench.core.state
    assert not any(isinstance(each, Promote) for each in bench.asked)


def test_a_margin_of_nothing_still_asks_for_better() -> None:
    bench = Bench(Rule(below=0.5, window=20, least=10, examples=20, margin=0.0))
    number = bench.until_training()
    bench.say(Trained(number), Evaluated(number, 0.5, 0.5), Published(number, 2))
    assert NOT_BETTER == bench.last.end


@pytest.mark.parametrize("state", [TRAINING, EVALUATING, PUBLISHING, PROMOTING])
def test_a_failure_at_any_step_ends_the_attempt(state: str) -> None:
    """With its words; and it watches again."""
    bench = Bench()
    number = bench.until_training()
    for event in (Trained(number), Evaluated(number, 0.1, 0.9), Published(number, 2)):
        if bench.core.state != state:
            bench.say(event)
    bench.say(Failed(number, "ValueError: no"))
    assert (FAILED, f"{state}: ValueError: no") == (bench.last.end, bench.last.text)
    bench.wait(10.0)
    assert WATCHING == bench.core.state


@pytest.mark.parametrize("state", [GATHERING, TRAINING, EVALUATING, PUBLISHING, PROMOTING])
def test_another_version_is_promoted_meanwhile(state: str) -> None:
    """What was compared with a version that is not served any more is not promoted."""
    bench = Bench(Rule(drift=None, below=0.5, window=20, least=10, examples=50, rest=1.0))
    bench.feed(20, 0.0)
    if state != GATHERING:
        bench.feed(30, 0.0)
    events = [Trained(1), Evaluated(1, 0.1, 0.9), Published(1, 2)]
    while bench.core.state != state:
        bench.say(events.pop(0))
    bench.say(Serving("other"))
    assert (bench.core.state == RESTING) == (state == GATHERING), "what is under way is waited for"
    if state != GATHERING:
        bench.say(events.pop(0) if events else Overtaken(1))
    assert OVERTAKEN == bench.last.end
    assert (state == PROMOTING) == any(isinstance(each, Promote) for each in bench.asked)


def test_feedback_that_stops() -> None:
    """Too few examples, and no more come: the attempt ends, after the time that was said and not before."""
    bench = Bench(Rule(drift=None, below=0.5, window=20, least=10, examples=50, silence=100.0, rest=1.0))
    bench.feed(20, 0.0)
    bench.wait(60.0)
    bench.feed(1, 0.0)
    bench.wait(99.0)
    assert GATHERING == bench.core.state and bench.now + 1.0 == bench.core.wake_at
    bench.wait(1.0)
    assert (STOPPED, "feedback has stopped: 21 examples of 50") == (bench.last.end, bench.last.text)


def test_a_fall_while_it_trains_is_the_next_reason() -> None:
    """It is said, kept over the rest, and then learned from what came after it alone."""
    bench = Bench(Rule(drift=0.002, every=400, examples=30, rest=10.0))
    bench.feed(400, 1.0)
    assert TRAINING == bench.core.state
    bench.feed(100, 0.0)
    bench.say(Trained(1), Evaluated(1, 0.5, 0.5), Published(1, 2))
    assert "fallen again meanwhile" in bench.last.text
    bench.wait(10.0)
    assert isinstance(bench.last, Train) and abs(bench.last.after - 400) <= 2
    bench.say(Serving("v2"), Failed(2, "no"))
    bench.wait(100.0)
    assert WATCHING == bench.core.state, "it was another version's"


def test_a_fall_of_a_version_that_is_served_no_more_is_forgotten() -> None:
    bench = Bench(Rule(drift=0.002, every=400, examples=30, rest=10.0))
    bench.feed(400, 1.0)
    bench.feed(100, 0.0)
    bench.say(Serving("v2"), Failed(1, "no"))
    bench.wait(10.0)
    assert WATCHING == bench.core.state


def test_gathering_after_a_long_rest_waits_as_long_as_any() -> None:
    """Silence is counted from its beginning."""
    bench = Bench(Rule(drift=0.002, every=400, examples=350, rest=1000.0, silence=100.0))
    bench.feed(400, 1.0)
    bench.feed(100, 0.0)
    bench.say(Failed(1, "no"))
    bench.wait(1000.0)
    assert (GATHERING, bench.now + 100.0) == (bench.core.state, bench.core.wake_at)


def test_bad_rewards_without_anything_new_are_no_reason() -> None:
    """Nothing would be learned that was not, the last time."""
    bench = Bench()
    bench.until_training()
    bench.say(Failed(1, "no"))
    for _ in range(50):
        bench.wait(10.0)
    assert 1 == bench.core.attempts
    bench.feed(10, 0.0)
    assert 2 == bench.core.attempts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"drift": None}, "nothing ever begins"),
        ({"drift": 1.0}, "drift is 1.0"),
        ({"fall": -1.0}, "fall is"),
        ({"below": 0.0}, "below is"),
        ({"window": 10}, "window is"),
        ({"every": 0}, "every is"),
        ({"examples": 1}, "examples is"),
        ({"most": 10}, "examples is"),
        ({"held_out": 1.0}, "held_out is"),
        ({"margin": nan}, "margin is"),
        ({"rest": -1.0}, "rest is"),
        ({"silence": 0.0}, "silence is"),
    ],
)
def test_rules_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rule(**given)


def test_what_is_held_out() -> None:
    """Of many in a row about the share, spread over them, and the same each time."""
    for share in (0.1, 0.25, 0.5):
        kept = [is_held_out(place, share) for place in range(10_000)]
        assert sum(kept) == pytest.approx(10_000 * share, rel=0.1)
        assert all(sum(kept[start : start + 100]) > 0 for start in range(0, 10_000, 100))
        assert kept == [is_held_out(place, share) for place in range(10_000)]


class Schedules(RuleBasedStateMachine):
    """Feedback, time, replies right, late, repeated and wrong, others who promote: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            Rule(drift=0.05, below=0.5, every=60, window=20, least=10, examples=30, margin=0.1, rest=10.0)
        )
        self.jobs: list[Any] = []
        self.done: list[Any] = []
        self.measured: dict[int, tuple[float, float]] = {}
        self.versions = 1
        self.seen = 0

    def take(self) -> None:
        """What was asked for since: no two jobs at once; promotion only of what was better than what is served."""
        for each in self.bench.asked[self.seen :]:
            if isinstance(each, Outcome):
                assert not self.jobs
                assert (each.end == PROMOTED) == ((each.attempt, "promoted") in self.done)
                self.done.append((each.attempt, "over"))
                continue
            assert not self.jobs, "two at once"
            assert (each.attempt, "over") not in self.done
            assert each.parent == self.bench.core.served
            if isinstance(each, Promote):
                before, after = self.measured[each.attempt]
                assert after >= before + 0.1
            self.jobs.append(each)
        self.seen = len(self.bench.asked)

    @rule(count=st.integers(1, 40), level=st.floats(0, 1), other=st.booleans(), example=st.booleans())
    def feedback(self, count: int, level: float, other: bool, example: bool) -> None:
        self.bench.feed(count, level, "somebody" if other else "", example)
        self.take()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0, 700.0]))
    def time(self, seconds: float) -> None:
        self.bench.wait(seconds)
        self.take()

    @rule()
    def other(self) -> None:
        self.versions += 1
        self.bench.say(Serving(f"other {self.versions}"))
        self.take()

    @precondition(lambda self: self.jobs)
    @rule(ok=st.integers(0, 4), before=st.floats(0, 1), gain=st.floats(-0.3, 0.6))
    def reply(self, ok: int, before: float, gain: float) -> None:
        job = self.jobs.pop()
        number = job.attempt
        if not ok:
            self.bench.say(Failed(number, "no"))
        elif isinstance(job, Train):
            self.bench.say(Trained(number))
        elif isinstance(job, Evaluate):
            self.measured[number] = before, before + gain
            self.bench.say(Evaluated(number, *self.measured[number]))
        elif isinstance(job, Publish):
            self.bench.say(Published(number, number + 1))
        elif job.parent != self.bench.core.served:
            self.bench.say(Overtaken(number))
        else:
            self.done.append((number, "promoted"))
            self.bench.say(Serving(f"mine {number}"), Promoted(number))
        self.take()

    @rule(kind=st.sampled_from([Trained, Promoted, Overtaken]), back=st.integers(0, 3))
    def stray(self, kind: Any, back: int) -> None:
        """Of an attempt that is over, or a repetition of what was said of this one."""
        number = self.bench.core.attempts - back
        over = (number, "over") in self.done or number < 1
        repeated = self.jobs and kind is Trained and not isinstance(self.jobs[0], Train)
        if over or repeated:
            asked = len(self.bench.asked)
            state = self.bench.core.state
            self.bench.say(kind(number))
            assert self.bench.core.state == state or state == RESTING
            assert all(each.attempt != number for each in self.bench.asked[asked:])
            self.take()

    @invariant()
    def one_job_in_each_state_of_work(self) -> None:
        state = self.bench.core.state
        assert bool(self.jobs) == (state in (TRAINING, EVALUATING, PUBLISHING, PROMOTING))
        assert state in MOVES

    def teardown(self) -> None:
        """However it stands: once what is under way has failed and time has passed, it watches; an outcome for each attempt."""
        for job in self.jobs:
            self.bench.say(Failed(job.attempt, "the end"))
        self.jobs = []
        self.take()
        if self.bench.core.state == GATHERING:
            self.bench.wait(700.0)
            self.take()
        if self.bench.core.state == RESTING:
            self.bench.now = self.bench.core.wake_at
            before = self.bench.core.attempts
            self.bench.say(Tick())
            assert self.bench.core.state == WATCHING or self.bench.core.attempts > before, "or begins anew at once"
        over = [number for number, what in self.done if what == "over"]
        assert over == sorted(set(over))
        assert self.bench.core.attempts - len(over) in (0, 1)


Schedules.TestCase.settings = settings(max_examples=150, stateful_step_count=50)
TestSchedules = Schedules.TestCase
