"""Round after round: the coordinator's half (SPEC §14). It asks what the shards hold, draws a cohort, runs a session.

Rules
- `handle` is the only method that changes anything. Nothing of a session is kept when it is over, nothing is written to disk.
- Before a round begins, every shard has said how the last one ended there, and all have ended it alike.
- A round's number is used up when somebody was asked to unmask; until then it may be tried again, with fresh keys.
- What comes of a session that is over, or from somebody who takes no part, is refused with `round_closed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeAlias

from ..protocol.effects import Log, Received, Tick
from ..protocol.errors import ConfigError
from ..protocol.messages import Message, Refused
from ..protocol.repeats import Repeats, note
from ..protocol.rounds import (
    APPLIED,
    READY,
    ROUND_CLOSED,
    Abandoned,
    Advertise,
    Arrived,
    Consent,
    Deal,
    Finished,
    Measured,
    Noted,
    Recall,
    Recalled,
    Released,
    Unmask,
    Withdraw,
)
from ..protocol.secure.plan import Plan
from ..protocol.session import model_digest
from .groups import Groups
from .ledger import Ledger
from .recipe import Recipe
from .round import Say, Session, Stage

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between a round that was abandoned and the next try; twice as many after each, up to this."""
MAX_SESSION = 1 << 62

PATIENCE = 2.0
"""Seconds until it is said that no round can begin: workers that end do so one by one."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Event: who can be invited, names by incarnation; whoever is not named is gone.

    Attributes:
        metrics: names of what they can say, by incarnation.
    """

    names: Mapping[int, str]
    metrics: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Placed:
    """Event: all shards are filled.

    Attributes:
        incarnations: by index. sizes: elements of each. layout: the layout's digest, 32 bytes.
    """

    incarnations: tuple[int, ...]
    sizes: tuple[int, ...]
    layout: bytes


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Event: a shard is missing, or has no weights."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Event: no round begins until `Go`. One in which nothing was given away yet is abandoned."""

    why: str


@dataclass(frozen=True, slots=True)
class Go:
    """Event: rounds may begin again."""


@dataclass(frozen=True, slots=True)
class Concluded:
    """Effect, for logs and reports: a session has ended, and every shard knows it.

    Attributes:
        released: what was applied, or None if it was abandoned: then `why`.
        declined: it was abandoned because clients left before they took part.
    """

    round: int
    session: int
    released: Released | None
    why: str
    declined: bool = False


RoundsEvent: TypeAlias = Received | Tick | Workers | Placed | Unplaced | Hold | Go
RoundsEffect: TypeAlias = Say | Log | Concluded


class Rounds:
    """The coordinator half.

    Args:
        run: of the coordinator. recipe: what the operator wants.
        below: a uniform number from 0 up to its argument, without it.
        peers: public keys of clients by name, if they are known here.

    Attributes:
        round: the number of the next one. completed: how many are. session: the one that is under way.
        problem: why none can begin with those who are here, or an empty text.
    """

    def __init__(
        self, run: int, recipe: Recipe, below: Callable[[int], int], peers: Mapping[str, bytes] | None = None
    ) -> None:
        self.run, self.recipe = run, recipe
        self.round = self.completed = 0
        self.session: Session | None = None
        self.ledger = Ledger(recipe.privacy.epsilon, recipe.privacy.delta) if recipe.privacy else None
        self.exhausted = False
        """Would one more round tell more than may be told?"""
        self.counters: Counter[str] = Counter()
        self._below, self._peers = below, peers
        self._groups = Groups(recipe.group, below) if recipe.group else None
        self._warn_at = inf
        self._number = below(MAX_SESSION)
        self._names: dict[int, str] = {}
        self._placed: Placed | None = None
        self._repeats = Repeats()
        self._recalling = False
        self._recalled: dict[int, Recalled] = {}
        self._not_before, self._pause = -inf, PAUSE
        self.problem = self._held = ""
        self._mean: float | None = None
        self._metrics: Mapping[int, tuple[str, ...]] = {}
        self._concluded = False
        self._out: list[RoundsEffect] = []
        self._now = 0.0

    def __repr__(self) -> str:
        return f"Rounds(round {self.round}, {self.session})"

    @property
    def done(self) -> bool:
        """Have there been as many rounds as were wanted, or as may be?"""
        return self.exhausted or (self.recipe.rounds is not None and self.completed >= self.recipe.rounds)

    @property
    def wake_at(self) -> float:
        """When the next `Tick` is wanted."""
        idle = self._settled and not self._recalling and not self.problem
        return min(
            self._repeats.wake_at,
            self.session.wake_at if self.session else inf,
            self._not_before if idle and self._possible else inf,
            self._warn_at,
        )

    def handle(self, event: RoundsEvent, now: float) -> list[RoundsEffect]:
        self._out, self._now = [], now
        match event:
            case Received(_, message):
                self._received(message)
            case Workers(names, metrics):
                self._metrics = metrics
                self._workers(names)
            case Placed():
                self._place(event)
            case Unplaced():
                self._place(None)
            case Hold(why):
                self._held = why
                if self.session is not None and self.session.stage < Stage.MASKED:
                    self.session.abandon(why, now)
            case Go():
                self._held = ""
            case Tick():
                if now >= self._warn_at:
                    self._warn_at = inf
                    self._out.append(Log("warning", f"a federated round cannot begin: {self.problem}"))
        self._go_on()
        for to, message in self._repeats.due(now):
            self._out.append(Say(to, message))
        return self._out

    # --- what comes in

    def _workers(self, names: Mapping[int, str]) -> None:
        lost = self._names.keys() - names.keys()
        if self._names != names:
            self.problem, self._warn_at = "", inf
        self._names = dict(names)
        for incarnation in lost:
            if self.session is not None:
                self.session.gone(incarnation, self._now)

    def _place(self, placed: Placed | None) -> None:
        if placed == self._placed:
            return
        before, self._placed = self._placed, placed
        here = placed.incarnations if placed else ()
        self._stop_recalling()
        for incarnation in before.incarnations if before else ():
            if incarnation not in here:
                self._repeats.forget(incarnation)
                if self.session is not None:
                    self.session.gone(incarnation, self._now)
        if self.session is not None:
            self.session.abandon("the shards have changed", self._now)

    def _received(self, message: Message) -> None:
        session: int = getattr(message, "session", -1)
        if type(message) not in KINDS:
            self.counters["rejected.misplaced"] += 1
        elif isinstance(message, Recalled):
            self._take_recalled(message)
        elif isinstance(message, Noted) and (self.session is None or session != self.session.number):
            self._repeats.noted(message.incarnation, message)
        elif self.session is not None and session == self.session.number:
            self.session.handle(message, self._now)
        elif isinstance(message, Arrived | Measured | Finished):
            self._out.append(Say(message.incarnation, note(message)))  # of no use to anybody
        elif not isinstance(message, Withdraw):
            text = "there is no such round, or it is over"
            self._out.append(Say(message.incarnation, Refused(session, ROUND_CLOSED, text)))  # type: ignore[union-attr]

    # --- what to do next

    @property
    def _possible(self) -> bool:
        cohort = self.recipe.cohort(len(self._names))
        return self._placed is not None and not self.done and not self._held and cohort > 0

    @property
    def idle(self) -> bool:
        """Is nothing under way, and nothing owed to anybody?"""
        return self.session is None and not self._recalling and not len(self._repeats)

    @property
    def _settled(self) -> bool:
        """Has the last session ended at all shards? Then they may be asked for the next, while clients still hear of this one."""
        return self.session is None or self._concluded

    def _go_on(self) -> None:
        if self.session is not None:
            self._under_way(self.session)
        if self._recalling and self._placed is not None:
            if self.session is None and len(self._recalled) == len(self._placed.incarnations):
                self._settle(self._placed)
            return
        if not self._settled or len(self._repeats) or self.problem:
            return
        if self._possible and self._now >= self._not_before:
            self._recall()

    def _under_way(self, session: Session) -> None:
        session.tick(self._now)
        self._out.extend(session.out)
        session.out.clear()
        if session.settled and not self._concluded:
            self._concluded = True
            self._out.append(
                Concluded(session.plan.round, session.number, session.result, session.why, session.declined)
            )
            if session.result is not None:
                self.completed += 1
                self._mean = session.result.weight * session.plan.reference / len(session.result.survivors)
            if session.result is not None or session.asked:
                self.round = session.plan.round + 1
                if self.ledger is not None:
                    self.ledger.count(session.plan)
            self._not_before = self._now if session.result else self._now + self._pause
            self._pause = PAUSE if session.result else min(2 * self._pause, LONGEST_PAUSE)
        if session.over(self._now):
            self.counters.update(session.counters)
            self.session = None

    # --- how the last session ended

    def _recall(self) -> None:
        assert self._placed is not None
        self._number += 1
        self._recalling = True
        self._recalled.clear()
        for shard in self._placed.incarnations:
            self._out.append(Say(shard, self._repeats.put(shard, Recall(shard, self._number), self._now)))

    def _stop_recalling(self) -> None:
        self._recalling = False
        self._recalled.clear()
        self._repeats.drop(lambda message: isinstance(message, Recall))

    def _take_recalled(self, message: Recalled) -> None:
        self._repeats.answered(message.incarnation, message)
        self._out.append(Say(message.incarnation, note(message)))
        if not self._recalling or self._placed is None or message.session != self._number:
            return
        if message.incarnation in self._placed.incarnations and len(message.buffers[0]) == 32:
            self._recalled[message.incarnation] = message

    def _settle(self, placed: Placed) -> None:
        """All shards have answered: end the last session alike everywhere, or begin."""
        found = [self._recalled[shard] for shard in placed.incarnations]
        self._stop_recalling()
        applied = {each.last for each in found if each.state == APPLIED}
        self.completed = max(self.completed, *(each.rounds for each in found))  # before a restart of this coordinator
        undecided = [each for each in found if each.state == READY]
        if not undecided:
            return self._begin(placed, model_digest(placed.layout, [bytes(each.buffers[0]) for each in found]))
        for each in undecided:  # and recall again, when they have noted it
            end = (
                Released(each.incarnation, each.last, (), 0.0, 0, 0, ())
                if each.last in applied
                else Abandoned(each.incarnation, each.last, "the coordinator was restarted")
            )
            self._out.append(Say(each.incarnation, self._repeats.put(each.incarnation, end, self._now)))

    def _begin(self, placed: Placed, model: bytes) -> None:
        if not self._possible:  # they have left while the shards were asked
            return
        cohort = self._draw(self.recipe.cohort(len(self._names)))
        try:
            known = (self.run, self.round, len(cohort), placed.sizes, placed.layout, model)
            plan = self.recipe.plan(*known, self._said_by(cohort), self._mean)
            if self.ledger is not None and not self._afforded(self.ledger, plan):
                return
        except ConfigError as error:
            self.problem, self._warn_at = str(error), self._now + PATIENCE
            return
        self._concluded = False
        wanted = len(cohort) if self._groups else self.recipe.clients
        self.session = Session(
            self._number, plan, cohort, placed.incarnations, self._now, wanted, self.recipe.turns(plan), self._peers
        )
        self._under_way(self.session)

    def _afforded(self, ledger: Ledger, plan: Plan) -> bool:
        ledger.catch_up(self.completed, plan)
        if not ledger.allows(plan):
            self.exhausted = True
            text = f"one more round would make epsilon {ledger.after(plan):.3g}, and {ledger.budget:g} is the budget"
            self._out.append(Log("warning", f"there are no more rounds: {text}"))
        return not self.exhausted

    def _said_by(self, cohort: Iterable[int]) -> tuple[str, ...]:
        """The metrics that all of these can say."""
        names = [set(self._metrics.get(incarnation, ())) for incarnation in cohort]
        return tuple(set.intersection(*names))

    def _draw(self, count: int) -> dict[int, str]:
        """So many of those who are here, each as likely as any other; or a standing group."""
        if self._groups and count < len(self._names):
            incarnations = {name: incarnation for incarnation, name in self._names.items()}
            return {incarnations[name]: name for name in self._groups.draw(incarnations)}
        here = sorted(self._names)
        for place in range(count):
            drawn = place + self._below(len(here) - place)
            here[place], here[drawn] = here[drawn], here[place]
        return {incarnation: self._names[incarnation] for incarnation in here[:count]}


KINDS: frozenset[type[Any]] = frozenset(
    {Recalled, Advertise, Deal, Consent, Unmask, Withdraw, Arrived, Measured, Finished, Noted}
)
"""What workers and shards say to it."""
