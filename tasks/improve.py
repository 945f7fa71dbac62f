"""Feedback makes the next version: a core that watches what comes back, and says when to train, evaluate, publish and promote.

Rules
- `handle` is the only method that changes anything; no clock, no thread, no model. What it asks for is done by whoever drives it
  (`launch.improve`), who says how it went; what comes of an earlier attempt is ignored.
- One attempt at a time, and each ends in an outcome, whatever fails: then a while of rest, and it watches again.
- A version is promoted only if it was better than the one that is served, by the margin, on the same examples, which neither was
  trained on here; and only while the one that it was compared with is still served.
- Only rewards of the version that is served say how good it is. Whatever was fed back can be learned from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

from ..protocol.errors import ConfigError
from .drift import MOST, SURE, Change, Drift

WATCHING, GATHERING, TRAINING, EVALUATING, PUBLISHING, PROMOTING, RESTING = (
    "watching",
    "gathering",
    "training",
    "evaluating",
    "publishing",
    "promoting",
    "resting",
)
MOVES = {
    WATCHING: {GATHERING},
    GATHERING: {TRAINING, RESTING},
    TRAINING: {EVALUATING, RESTING},
    EVALUATING: {PUBLISHING, RESTING},
    PUBLISHING: {PROMOTING, RESTING},
    PROMOTING: {RESTING},
    RESTING: {WATCHING},
}
"""All that can happen. `gathering`: something is to be done, and there are too few examples for it yet."""

PROMOTED, NOT_BETTER, FAILED, STOPPED, OVERTAKEN = "promoted", "not better", "failed", "stopped", "overtaken"
"""How an attempt ends. `stopped`: feedback did. `overtaken`: somebody promoted another version meanwhile."""
LONGEST_REST = 16
"""Times the usual: after each attempt in a row that brought nothing, it is twice the one before."""
_MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Rule:
    """When to train, and what is better.

    Attributes:
        drift: on a fall that ADWIN finds, with this delta; None: do not look for any. fall: the least that counts.
        below: when the mean of the last `window` rewards is, of at least `least` of them, and as many new examples have come since
            the last attempt. every: so many new examples.
        examples: so many are gathered before training. most: the newest so many are learned from, and of these only what came after
            the fall where there was one. held_out: the share of them that is kept from training, for evaluation.
        margin: by which the new version must be better. rest: seconds between attempts.
        silence: seconds without feedback after which nobody waits for more examples.

    Raises:
        ConfigError: there is no reason ever, or a number that cannot be.
    """

    drift: float | None = SURE
    fall: float = 0.02
    below: float | None = None
    window: int = 200
    least: int = 50
    every: int | None = None
    examples: int = 200
    most: int = 10_000
    held_out: float = 0.25
    margin: float = 0.01
    rest: float = 60.0
    silence: float = 600.0

    def __post_init__(self) -> None:
        if self.drift is None and self.below is None and self.every is None:
            raise ConfigError("a rule by which nothing ever begins", hint="drift=0.002, below=0.8, or every=10_000")
        for name, holds, law in (
            ("drift", self.drift is None or 0 < self.drift < 1, "between 0 and 1"),
            ("fall", 0 <= self.fall <= 1, "from 0 to 1"),
            ("below", self.below is None or 0 < self.below <= 1, "above 0, at most 1"),
            ("window", 1 <= self.least <= self.window, "at least 1, and `least` not above it"),
            ("every", self.every is None or self.every >= 1, "at least 1"),
            ("examples", 2 <= self.examples <= self.most, "at least 2, and `most` not below it"),
            ("held_out", 0 < self.held_out < 1, "between 0 and 1"),
            ("margin", 0 <= self.margin < inf, "at least 0"),
            ("rest", 0 <= self.rest < inf, "at least 0, in seconds"),
            ("silence", self.silence > 0, "above 0, in seconds"),
        ):
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint=law)


def is_held_out(place: int, share: float) -> bool:
    """Is the example at this place kept from training? The same one always is, in every attempt with this share."""
    mixed = place * _MIX % (1 << 64)
    mixed = (mixed ^ mixed >> 32) * _MIX % (1 << 64)
    return mixed >> 32 < share * (1 << 32)


# --- what happens


@dataclass(frozen=True, slots=True)
class Serving:
    """This version is promoted: the identity of its card, or empty if none is."""

    identity: str


@dataclass(frozen=True, slots=True)
class FedBack:
    """A reward, at a place in the order of their coming, for an answer of this version. `example`: can it be learned from?"""

    place: int
    identity: str
    reward: float
    example: bool = True


@dataclass(frozen=True, slots=True)
class Trained:
    attempt: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Qualities of the version that is served and of the new one, on the same examples."""

    attempt: int
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Published:
    attempt: int
    version: int


@dataclass(frozen=True, slots=True)
class Promoted:
    attempt: int


@dataclass(frozen=True, slots=True)
class Failed:
    attempt: int
    why: str


@dataclass(frozen=True, slots=True)
class Overtaken:
    """It was not promoted: another version than the one that it was compared with is."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event: TypeAlias = Serving | FedBack | Trained | Evaluated | Published | Promoted | Failed | Overtaken | Tick


# --- what is to be done


@dataclass(frozen=True, slots=True)
class Train:
    """On what came after this place and is not held out, beginning with the version `parent`."""

    attempt: int
    parent: str
    after: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Both versions, on what came after this place and is held out."""

    attempt: int
    parent: str
    after: int


@dataclass(frozen=True, slots=True)
class Publish:
    attempt: int
    parent: str
    before: float
    quality: float
    reason: str


@dataclass(frozen=True, slots=True)
class Promote:
    """If `parent` is served still."""

    attempt: int
    parent: str
    version: int
    why: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """An attempt is over.

    Attributes:
        attempt: from 1. end: PROMOTED, NOT_BETTER, FAILED, STOPPED or OVERTAKEN. reason: why it began. text: what happened.
        parent: identity of the version that was served. version: the new one's number, if it was published.
        before, after: qualities, if they were measured. began, ended: in seconds.
    """

    attempt: int
    end: str
    reason: str
    text: str
    parent: str
    version: int | None
    before: float | None
    after: float | None
    began: float
    ended: float


Effect: TypeAlias = Train | Evaluate | Publish | Promote | Outcome


@dataclass(slots=True)
class _Attempt:
    number: int
    reason: str
    parent: str
    after: int
    began: float
    there: int
    """Examples to learn from."""
    version: int | None = None
    measured: tuple[float, float] | None = None


class Improve:
    """The loop for one kind of task.

    Args:
        drift: makes a detector for a stream of rewards; by default `Drift` with the rule's delta.

    Raises:
        ConfigError: river is not installed, and the rule looks for drift.
    """

    def __init__(self, rule: Rule, drift: Callable[[], Drift] | None = None) -> None:
        self.rule = rule
        self.state = WATCHING
        self.served = ""
        self.attempts = 0
        self._make = drift or (lambda: Drift(rule.drift or SURE))
        self._drift = self._make() if rule.drift is not None else None
        self._rewards: deque[float] = deque(maxlen=rule.window)
        self._places: deque[int] = deque(maxlen=MOST)
        """Of rewards of the version that is served."""
        self._examples: deque[int] = deque(maxlen=rule.most)
        """Places of what can be learned from."""
        self._new = 0
        """Examples since the last attempt began."""
        self._change: tuple[Change, int] | None = None
        """A fall that nothing was done about yet, and the place before it."""
        self._attempt: _Attempt | None = None
        self._misses = 0
        self._heard = self._until = 0.0
        self._out: list[Effect] = []

    @property
    def wake_at(self) -> float:
        """When a `Tick` would change something."""
        if self.state == RESTING:
            return self._until
        return self._heard + self.rule.silence if self.state == GATHERING else inf

    @property
    def quality(self) -> float | None:
        """The mean of the served version's last rewards; None: there are too few."""
        count = len(self._rewards)
        return sum(self._rewards) / count if count >= self.rule.least else None

    def handle(self, event: Event, now: float) -> list[Effect]:
        self._out = []
        match event:
            case Serving(identity):
                self._serving(identity, now)
            case FedBack():
                self._fed_back(event, now)
            case Tick():
                pass
            case _:
                state, act = _REPLIES[type(event)]
                if self._attempt is not None and event.attempt == self._attempt.number and state in ("", self.state):
                    act(self, event, now)
        self._pursue(now)
        return self._out

    # --- what comes in

    def _serving(self, identity: str, now: float) -> None:
        """Another version is promoted: what was known of the one before says nothing of it."""
        if identity == self.served:
            return
        self.served = identity
        self._rewards.clear()
        self._places.clear()
        self._change = None
        if self._drift is not None:
            self._drift = self._make()
        if self.state == GATHERING:
            self._end(OVERTAKEN, "another version was promoted meanwhile", now)

    def _fed_back(self, event: FedBack, now: float) -> None:
        self._heard = now
        if event.example:
            self._examples.append(event.place)
            self._new += 1
            if self._attempt is not None and event.place > self._attempt.after:
                self._attempt.there += 1
        if event.identity != self.served:
            return
        self._rewards.append(event.reward)
        self._places.append(event.place)
        change = self._drift.add(event.reward) if self._drift is not None else None
        if change is not None:
            fresh = self._drift.seen - change.at if self._drift is not None else 0
            place = self._places[-min(fresh, len(self._places))] - 1
            self._change = (change, place) if change.fall >= self.rule.fall else None

    def _trained(self, event: Trained, now: float) -> None:
        attempt = self._under_way()
        if not self._overtaken(now):
            self._go(EVALUATING)
            self._out.append(Evaluate(attempt.number, attempt.parent, attempt.after))

    def _evaluated(self, event: Evaluated, now: float) -> None:
        attempt = self._under_way()
        attempt.measured = event.before, event.after
        if self._overtaken(now):
            return
        self._go(PUBLISHING)
        self._out.append(Publish(attempt.number, attempt.parent, event.before, event.after, attempt.reason))

    def _published(self, event: Published, now: float) -> None:
        attempt = self._under_way()
        attempt.version = event.version
        assert attempt.measured is not None
        before, after = attempt.measured
        said = f"{after:.4f} against {before:.4f} on what was held out"
        if not after >= before + self.rule.margin or not after > before:  # NaN is not better
            self._end(NOT_BETTER, f"{said}; better by {self.rule.margin:g} was asked for", now)
        elif not self._overtaken(now):
            self._go(PROMOTING)
            why = f"{attempt.reason}; {said}"
            self._out.append(Promote(attempt.number, attempt.parent, event.version, why))

    def _promoted(self, event: Promoted, now: float) -> None:
        attempt = self._under_way()
        assert attempt.measured is not None
        before, after = attempt.measured
        self._end(PROMOTED, f"{after:.4f} against {before:.4f} on what was held out", now)

    def _failed(self, event: Failed, now: float) -> None:
        self._end(FAILED, f"{self.state}: {event.why}", now)

    def _was_overtaken(self, event: Overtaken, now: float) -> None:
        self._end(OVERTAKEN, "another version was promoted meanwhile", now)

    def _overtaken(self, now: float) -> bool:
        if self._under_way().parent == self.served:
            return False
        self._end(OVERTAKEN, "another version was promoted meanwhile", now)
        return True

    # --- deciding

    def _pursue(self, now: float) -> None:
        if self.state == RESTING and now >= self._until:
            self._go(WATCHING)
        if self.state == WATCHING and self.served:
            self._begin(now)
        if self.state == GATHERING:
            attempt = self._under_way()
            if attempt.there >= self.rule.examples:
                self._new = 0
                self._go(TRAINING)
                self._out.append(Train(attempt.number, attempt.parent, attempt.after, attempt.reason))
            elif now >= self._heard + self.rule.silence:
                self._end(STOPPED, f"feedback has stopped: {attempt.there} examples of {self.rule.examples}", now)

    def _begin(self, now: float) -> None:
        """If there is a reason to."""
        rule, quality = self.rule, self.quality
        after = self._examples[0] - 1 if self._examples else 0
        if self._change is not None:
            change, place = self._change
            reason, after = f"rewards fell {change}", max(after, place)
            self._change = None
        elif rule.below is not None and quality is not None and quality < rule.below and self._new >= rule.least:
            reason = f"the mean of the last {len(self._rewards)} rewards is {quality:.3f}, below {rule.below:g}"
        elif rule.every is not None and self._new >= rule.every:
            reason = f"{self._new} new examples"
        else:
            return
        self.attempts += 1
        there = sum(place > after for place in self._examples)
        self._attempt = _Attempt(self.attempts, reason, self.served, after, now, there)
        self._heard = now
        self._go(GATHERING)

    def _end(self, end: str, text: str, now: float) -> None:
        attempt = self._under_way()
        if self._change is not None:
            text += "; the rewards have fallen again meanwhile"
        before, after = attempt.measured or (None, None)
        about = (attempt.parent, attempt.version, before, after, attempt.began, now)
        self._out.append(Outcome(attempt.number, end, attempt.reason, text, *about))
        self._misses = 0 if end in (PROMOTED, OVERTAKEN) else self._misses + 1
        self._until = now + self.rule.rest * min(LONGEST_REST, 2 ** max(0, self._misses - 1))
        self._attempt = None
        self._go(RESTING)

    def _under_way(self) -> _Attempt:
        assert self._attempt is not None
        return self._attempt

    def _go(self, state: str) -> None:
        assert state in MOVES[self.state], f"from {self.state} to {state}"
        self.state = state

    def check(self) -> None:
        """The invariants; tests call it after every event."""
        assert (self._attempt is None) == (self.state in (WATCHING, RESTING))
        assert all(0 <= reward <= 1 for reward in self._rewards)


_REPLIES: dict[type[Any], tuple[str, Callable[[Improve, Any, float], None]]] = {
    Trained: (TRAINING, Improve._trained),
    Evaluated: (EVALUATING, Improve._evaluated),
    Published: (PUBLISHING, Improve._published),
    Promoted: (PROMOTING, Improve._promoted),
    Failed: ("", Improve._failed),
    Overtaken: (PROMOTING, Improve._was_overtaken),
}
"""In which state each counts; a failure does in any."""
