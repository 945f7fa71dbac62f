"""Where waiting tasks go now: the pure choice of `allot`, for groups of equal tasks and executors that have room.

Rules
- Who qualifies and which version is chosen is `allot`'s to say. Of executors that have that version at the same price, the one
  that would be done first gets the task, if it has room; if none has, the task waits.
- A batch is as large as its version does in `linger` seconds there. A task that takes longer is split over those who could do it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import isfinite

from ..protocol.errors import ProtocolError, ShapeError
from .allot import THOMPSON, Candidate, Executor, Needs, Plan, Task, assign, choose, qualify
from .belief import Belief, Beta
from .card import Card
from .crew import Crew, Seat
from .parcels import Parcel, divisible, shares
from .rollout import Rollout
from .waiting import Item, Waiting

ASSIGN = "assign"
MOST_ITEMS = 256
"""Tasks in a batch."""
MOST_BYTES = 4 * 1024 * 1024
"""Bytes in a batch of several tasks."""
FIRST = 16
"""Inputs in a batch of a version whose speed nobody knows."""
SEVERAL = 64
"""Tasks that are assigned at once."""


@dataclass(slots=True)
class Going:
    """A batch that goes to an executor."""

    seat: Seat
    identity: str
    items: list[Item] = field(default_factory=list)
    nbytes: int = 0
    inputs: int = 0

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.nbytes += len(item.payload)
        self.inputs += item.items


@dataclass(slots=True)
class Plans:
    """What was found.

    Attributes:
        unmet: tasks that nobody qualifies for, with each candidate's reason. unsettled: is somebody still loading a version?
    """

    batches: list[Going] = field(default_factory=list)
    unmet: list[tuple[Item, list[str]]] = field(default_factory=list)
    unsettled: bool = False


class Planner:
    """Looks at the rollout and the crew, and changes neither."""

    def __init__(
        self,
        rollout: Rollout,
        crew: Crew,
        beliefs: dict[tuple[str, str], Belief],
        policy: str,
        linger: float,
        beta: Beta | None,
    ) -> None:
        self._rollout, self._crew, self._beliefs = rollout, crew, beliefs
        self._policy, self._linger, self._beta = policy, linger, beta
        self._cards: dict[str, Card] = {}
        self._now = 0.0

    def card(self, identity: str) -> Card | None:
        """A version that was answered with, also when it is not any more."""
        if identity and identity not in self._cards:
            self._cards.update((card.identity, card) for card in self._rollout.cards)
        return self._cards.get(identity)

    def plan(self, waiting: Waiting, now: float) -> Plans:
        """Batches for executors with room, of the oldest tasks first. What goes is taken out of the queue, and what is unmet."""
        plans, self._now = Plans(), now
        if not len(waiting):
            return plans
        seats = {seat.name: seat for seat in self._crew}
        answers = {
            name: self._rollout.answers(seat.offer.models, frozenset(seat.offer.loaded)) for name, seat in seats.items()
        }
        for _name, seat in seats.items():
            failed = frozenset(identity for identity, _ in seat.offer.failed)
            wanted = self._rollout.wanted(seat.offer.models, frozenset(seat.offer.loaded), failed)
            plans.unsettled |= {card.identity for card in wanted} - set(seat.offer.loaded) != set()
        executors = [seat.as_executor(answers[name], now) for name, seat in seats.items()]
        open_: dict[tuple[str, str], Going] = {}
        if self._policy == ASSIGN:
            self._assign(waiting, plans, seats, executors, open_)
        else:
            for group in waiting.groups():
                self._group(waiting, group, plans, seats, executors, open_)
        plans.batches += [going for going in open_.values() if going.items]
        return plans

    # --- a group of equal tasks

    def _group(
        self,
        waiting: Waiting,
        group: deque[Item],
        plans: Plans,
        seats: dict[str, Seat],
        executors: list[Executor],
        open_: dict[tuple[str, str], Going],
    ) -> None:
        able: list[Candidate] = []
        while group:
            item = group[0]
            if not able:
                able, why = qualify(_task(item, self._now), self._cards_for(item), executors, self._beliefs)
                if not able:
                    plans.unmet += [(each, [f"{name}: {reason}" for name, reason in why.items()]) for each in group]
                    return
            trying = self._on_trial(able)
            plan = choose(_task(item, self._now), trying, self._beliefs, self._policy, self._beta)
            same = [
                each
                for each in trying
                if each.card.identity == plan.candidate.card.identity
                and each.executor.price == plan.candidate.executor.price
            ]
            if self._split(waiting, group, plans, seats, same):
                continue
            going = self._with_room(same, item, seats, open_)
            if going is None:
                return
            most = 1 if self._policy == THOMPSON else MOST_ITEMS
            took = 0
            while group and took < most and self._fits(going, group[0]):
                each = waiting.take(group)
                each.reason = plan.reason
                going.add(each)
                took += 1
            self._rollout.counted(plan.candidate.card, took)

    def _cards_for(self, item: Item) -> list[Card]:
        cards = self._rollout.cards
        return [card for card in cards if card.name == item.asked.model] if item.asked.model else cards

    def _on_trial(self, able: list[Candidate]) -> list[Candidate]:
        """Of each model either the version on trial or the others: its share decides, not its quality."""
        found = []
        for each in able:
            model = self._rollout.models[each.card.name]
            tried = model.trial is not None and each.card.identity == model.trial.card.identity
            if model.trial is None or tried == self._rollout.turn(each.card.name):
                found.append(each)
        return found or able

    def _with_room(
        self, same: list[Candidate], item: Item, seats: dict[str, Seat], open_: dict[tuple[str, str], Going]
    ) -> Going | None:
        """The batch that a task of this version goes into: of who would be done first."""
        best: tuple[float, int, Going] | None = None
        for number, each in enumerate(same):
            seat, identity = seats[each.executor.name], each.card.identity
            going = open_.get((seat.name, identity))
            queued = sum(len(other.items) for other in open_.values() if other.seat is seat)
            if going is None:
                begun = sum(other.seat is seat and bool(other.items) for other in open_.values())
                if not seat.room or begun + len(seat.batches) >= 2:
                    continue
                going = Going(seat, identity)
            elif not self._fits(going, item):
                continue
            rank = (each.seconds + queued * each.seconds / max(1, len(seat.batches) + 1), number, going)
            if best is None or rank[:2] < best[:2]:
                best = rank
        if best is None:
            return None
        going = best[2]
        open_.setdefault((going.seat.name, going.identity), going)
        return going

    def _fits(self, going: Going, item: Item) -> bool:
        """Is there room in this batch? A first task always has."""
        if not going.items:
            return True
        card = self.card(going.identity)
        seconds = going.seat.takes(going.identity, card.cost.latency if card else 0.0)
        inputs = self._linger / seconds if seconds > 0 else FIRST
        within = going.inputs + item.items <= inputs and len(going.items) < MOST_ITEMS
        return within and going.nbytes + len(item.payload) <= MOST_BYTES

    # --- large tasks

    def _split(
        self,
        waiting: Waiting,
        group: deque[Item],
        plans: Plans,
        seats: dict[str, Seat],
        same: list[Candidate],
    ) -> bool:
        """A task that takes long goes to several at once. True if it did."""
        item = group[0]
        idle = [each for each in same if not seats[each.executor.name].batches]
        idle = [each for each in idle if not any(going.seat.name == each.executor.name for going in plans.batches)]
        if item.parcel is not None or item.items < 2 or len(idle) < 2:
            return False
        identity = idle[0].card.identity
        paces = [seats[each.executor.name].takes(identity, each.card.cost.latency) for each in idle]
        if not all(pace > 0 and isfinite(pace) for pace in paces) or item.items * min(paces) < 2 * self._linger:
            return False
        if not divisible(item.payload, item.items):
            return False
        sizes = shares(item.items, [1 / pace for pace in paces])
        parts = [(each, size) for each, size in zip(idle, sizes, strict=True) if size]
        parcel = Parcel(item, [size for _, size in parts])
        try:
            payloads = parcel.payloads()
        except (ShapeError, ProtocolError):
            return False
        waiting.take(group)
        item.reason = f"{idle[0].card}: split over {', '.join(f'{c.executor.name} ({n})' for c, n in parts)}"
        for number, ((each, _), payload) in enumerate(zip(parts, payloads, strict=True)):
            part = Item(item.id, item.asked, payload, item.came, item.until, 0, parcel, number)
            plans.batches.append(Going(seats[each.executor.name], identity, [part], len(payload), part.items))
        self._rollout.counted(idle[0].card, 1)
        return True

    # --- different tasks at once

    def _assign(
        self,
        waiting: Waiting,
        plans: Plans,
        seats: dict[str, Seat],
        executors: list[Executor],
        open_: dict[tuple[str, str], Going],
    ) -> None:
        free = [each for each in executors if seats[each.name].room]
        heads: list[tuple[deque[Item], int]] = []
        for group in waiting.groups():
            heads += [(group, number) for number in range(min(len(group), SEVERAL - len(heads)))]
        items = [group[number] for group, number in heads]
        tasks = [_task(item, self._now) for item in items]
        slots = max(1, -(-len(tasks) // max(1, len(free))))
        found = assign(tasks, self._rollout.cards, free, self._beliefs, slots) if free else [None] * len(tasks)
        chosen = []
        for item, task, plan in zip(items, tasks, found, strict=True):
            able, why = qualify(task, self._cards_for(item), executors, self._beliefs)
            if not able:
                plans.unmet.append((item, [f"{name}: {reason}" for name, reason in why.items()]))
            elif isinstance(plan, Plan):
                item.reason = plan.reason
                going = open_.setdefault(
                    (plan.candidate.executor.name, plan.candidate.card.identity),
                    Going(seats[plan.candidate.executor.name], plan.candidate.card.identity),
                )
                going.add(item)
                chosen.append(item)
        waiting.drop(chosen)


def _task(item: Item, now: float) -> Task:
    a = item.asked
    return Task(a.kind, Needs(a.latency, a.quality, a.privacy, a.budget, a.deadline), item.items, now - item.came)
