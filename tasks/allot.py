"""Which version on which executor does a task: a pure function of the task, the cards, and how the executors are.

Rules
- Hard constraints first, in the order of `_CONSTRAINTS`; the first that does not hold is the reason why a candidate is none.
  Privacy is the first of them.
- A task whose data has a label is for versions and executors that are cleared for it; one without a label is for all.
- Then the policy chooses among what is left. A plan says why, and where nothing is left every candidate says what failed.
- Nothing is drawn here but through `beta`, and nothing is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import inf

from ..protocol.errors import ConfigError
from .belief import Belief, Beta
from .card import Card, is_label
from .latency import Latencies

TAIL = 0.95
"""A bound on latency is held by so many of the tasks."""
BEST, CHEAPEST, THOMPSON = "best", "cheapest", "thompson"


@dataclass(frozen=True)
class Needs:
    """What a task asks for.

    Attributes:
        latency: seconds until it is done, waiting included. quality: the least expected reward, 0 to 1.
        privacy: the label of its data, or empty. budget: the most that it may cost. deadline: seconds after which nobody wants it.

    Raises:
        ConfigError: a number cannot be.
    """

    latency: float = inf
    quality: float = 0.0
    privacy: str = ""
    budget: float = inf
    deadline: float = inf

    def __post_init__(self) -> None:
        for name in ("latency", "quality", "budget", "deadline"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"needs whose {name} is {getattr(self, name)}")
        if self.quality > 1:
            raise ConfigError(f"needs whose quality is {self.quality}", hint="an expected reward, from 0 to 1")
        if self.privacy and not is_label(self.privacy):
            raise ConfigError("needs whose privacy is no label")


@dataclass(frozen=True)
class Task:
    """One to be allotted. `kind`: of which cards say a quality. `items`: inputs in it. `waited`: seconds since it came."""

    kind: str
    needs: Needs = field(default_factory=Needs)
    items: int = 1
    waited: float = 0.0


@dataclass(frozen=True)
class Executor:
    """A worker that serves.

    Attributes:
        name: the worker's. data: labels of the data that it may see; None: of all that its versions may see.
        loaded: identities of the versions in its memory. free: bytes for more. queue: seconds of work that wait there.
        answers: identities of the versions that it answers with now; None: of all that are given.
        price: what a second of it costs, in any unit. seconds: by identity, what an input has taken there.
    """

    name: str
    data: frozenset[str] | None = frozenset()
    loaded: frozenset[str] = frozenset()
    free: float = inf
    queue: float = 0.0
    price: float = 1.0
    seconds: Mapping[str, Latencies] = field(default_factory=dict)
    answers: frozenset[str] | None = None


@dataclass(frozen=True)
class Candidate:
    """A version on an executor, with what a task would get there.

    Attributes:
        quality: the expected reward. seconds: until it is done, in 95 of 100 cases. cost: of the executor's time.
    """

    card: Card
    executor: Executor
    quality: float
    seconds: float
    cost: float

    def __str__(self) -> str:
        return f"{self.card} on {self.executor.name}"


@dataclass(frozen=True)
class Plan:
    """Where a task goes, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Unmet:
    """Nothing qualifies: of each candidate, as `version on executor`, the constraint that failed."""

    why: Mapping[str, str]

    def __str__(self) -> str:
        if not self.why:
            return "no model qualifies: nobody serves any"
        return "no model qualifies: " + "; ".join(f"{name}: {failed}" for name, failed in self.why.items())


Beliefs = Mapping[tuple[str, str], Belief]
"""By the identity of a version and a kind of task."""


def allot(
    task: Task,
    cards: Sequence[Card],
    executors: Sequence[Executor],
    beliefs: Beliefs,
    policy: str,
    beta: Beta | None = None,
) -> Plan | Unmet:
    """One task.

    Args:
        cards: versions that are served. beliefs: where there is none, the card's word counts.
        policy: BEST: the highest expected quality. CHEAPEST: the least cost of those that are good enough. THOMPSON: the highest
            quality of those drawn from what is believed, so that what is not known well is tried (Thompson 1933).
        beta: what draws; for THOMPSON alone.

    Raises:
        ConfigError: there is no such policy, or nothing to draw with.
    """
    if policy not in _POLICIES:
        raise ConfigError(f"there is no policy {policy!r}", hint=f"one of {', '.join(_POLICIES)}")
    able, why = qualify(task, cards, executors, beliefs)
    if not able:
        return Unmet(why)
    return _POLICIES[policy](task, able, beliefs, beta)


def choose(task: Task, able: list[Candidate], beliefs: Beliefs, policy: str, beta: Beta | None = None) -> Plan:
    """One of those that qualify, of which there are some; as `allot`."""
    return _POLICIES[policy](task, able, beliefs, beta)


def assign(
    tasks: Sequence[Task], cards: Sequence[Card], executors: Sequence[Executor], beliefs: Beliefs, slots: int = 1
) -> list[Plan | Unmet | None]:
    """Several different tasks at once, so that what they lack in quality, and take of the longest time, is least.

    Args:
        slots: tasks that an executor may get of these.

    Returns:
        A plan for each; None for a task that has to wait, as all slots are taken.

    Raises:
        ConfigError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError(
            "tasks are assigned together by scipy, which is not installed", hint="pip install 'shoal[tasks]'"
        ) from None
    import numpy as np

    found: list[Plan | Unmet | None] = [None] * len(tasks)
    best: dict[tuple[int, int], Candidate] = {}
    places = {id(executor): place for place, executor in enumerate(executors)}
    for number, task in enumerate(tasks):
        able, why = qualify(task, cards, executors, beliefs)
        if not able:
            found[number] = Unmet(why)
        for candidate in able:
            key = number, places[id(candidate.executor)]
            if key not in best or _worth(candidate) < _worth(best[key]):
                best[key] = candidate
    if not best:
        return found
    longest = max(candidate.seconds for candidate in best.values()) or 1.0
    forbidden = 4.0 * (len(tasks) + 1)
    costs = np.full((len(tasks), len(executors) * slots), forbidden)
    for (number, place), candidate in best.items():
        for slot in range(slots):  # who is further behind in a queue waits for those before
            waits = candidate.seconds * (1 + slot)
            costs[number, place * slots + slot] = (1.0 - candidate.quality) + waits / (longest * slots)
    for number, column in zip(*linear_sum_assignment(costs), strict=True):
        chosen = best.get((number, column // slots))
        if chosen is not None and costs[number, column] < forbidden:
            found[number] = Plan(chosen, f"{chosen}: of {len(tasks)} tasks assigned together")
    return found


# --- what qualifies


def qualify(
    task: Task, cards: Sequence[Card], executors: Sequence[Executor], beliefs: Beliefs
) -> tuple[list[Candidate], dict[str, str]]:
    """Who could do the task; and of the others, as `version on executor`, the constraint that failed."""
    able, why = [], {}
    for card, executor in product(cards, executors):
        if executor.answers is not None and card.identity not in executor.answers:
            continue
        candidate = _candidate(task, card, executor, beliefs)
        failed = next((text for holds, text in _CONSTRAINTS if not holds(task, candidate)), "")
        if failed:
            why[str(candidate)] = failed
        else:
            able.append(candidate)
    return able, why


def _candidate(task: Task, card: Card, executor: Executor, beliefs: Beliefs) -> Candidate:
    belief = beliefs.get((card.identity, task.kind)) or Belief(card.quality_of(task.kind))
    took = executor.seconds.get(card.identity) or Latencies(card.cost.latency)
    return Candidate(
        card,
        executor,
        belief.mean,
        executor.queue + task.items * took.quantile(TAIL),
        executor.price * task.items * took.quantile(0.5),
    )


def _cleared(task: Task, candidate: Candidate) -> bool:
    label = task.needs.privacy
    if not label:
        return True
    seen = candidate.executor.data
    return label in candidate.card.data and (seen is None or label in seen)


def _fits(_: Task, candidate: Candidate) -> bool:
    card, executor = candidate.card, candidate.executor
    return card.identity in executor.loaded or card.cost.memory <= executor.free


_CONSTRAINTS: tuple[tuple[Callable[[Task, Candidate], bool], str], ...] = (
    (_cleared, "privacy: not cleared for the task's data"),
    (lambda task, candidate: candidate.card.quality_of(task.kind) is not None, "kind: never evaluated on such tasks"),
    (_fits, "memory: it does not fit beside what is loaded"),
    (lambda task, candidate: candidate.seconds <= task.needs.latency, "latency: it would take longer"),
    (
        lambda task, candidate: task.waited + candidate.seconds <= task.needs.deadline,
        "deadline: it would come too late",
    ),
    (lambda task, candidate: candidate.quality >= task.needs.quality, "quality: not good enough"),
    (lambda task, candidate: candidate.cost <= task.needs.budget, "budget: it costs more"),
)


# --- what is chosen of it


def _worth(candidate: Candidate) -> tuple[float, float, float, str]:
    """For `min`: the best first, then the cheapest, then the soonest; then by name, so that all decide the same."""
    return -candidate.quality, candidate.cost, candidate.seconds, str(candidate)


def _best(_: Task, able: list[Candidate], beliefs: Beliefs, beta: Beta | None) -> Plan:
    chosen = min(able, key=_worth)
    return Plan(chosen, f"{chosen}: the best of {len(able)}, expected {chosen.quality:.3f}")


def _cheapest(task: Task, able: list[Candidate], beliefs: Beliefs, beta: Beta | None) -> Plan:
    chosen = min(able, key=lambda each: (each.cost, *_worth(each)))
    least = f"expected {chosen.quality:.3f}, {task.needs.quality:g} asked for"
    return Plan(chosen, f"{chosen}: the cheapest of {len(able)} that are good enough, {least}")


def _thompson(task: Task, able: list[Candidate], beliefs: Beliefs, beta: Beta | None) -> Plan:
    """Each version is drawn once, however many executors have it; of these then the cheapest."""
    if beta is None:
        raise ConfigError("the policy thompson draws, and nothing to draw with was given")
    drawn: dict[str, float] = {}
    for identity, card in {each.card.identity: each.card for each in able}.items():
        belief = beliefs.get((identity, task.kind)) or Belief(card.quality_of(task.kind))
        drawn[identity] = belief.draw(beta)
    top = max(drawn, key=lambda identity: (drawn[identity], identity))
    chosen = min(
        (each for each in able if each.card.identity == top), key=lambda each: (each.cost, each.seconds, str(each))
    )
    return Plan(chosen, f"{chosen}: drawn {drawn[top]:.3f}, expected {chosen.quality:.3f}, of {len(drawn)} versions")


_POLICIES: dict[str, Callable[[Task, list[Candidate], Beliefs, Beta | None], Plan]] = {
    BEST: _best,
    CHEAPEST: _cheapest,
    THOMPSON: _thompson,
}
