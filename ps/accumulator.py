"""A shard's half of federated rounds: it takes slices, adds those that it is told to, removes masks, averages (SPEC §14).

Rules
- `handle` is the only method that changes anything. A peer's mistake is counted and refused, never raised.
- It holds one sum, as large as its parameters, and the slices of those who have their turn, which it adds when it is told to.
- What it gives back was looked at: the lanes count the survivors, and nothing is over its bound.
- Masks are removed a part at a time, with other events in between.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..protocol.effects import COORDINATOR, Peer, Received, Send, Tick
from ..protocol.errors import ConfigError, ProtocolError
from ..protocol.federated import NOISE, NORM, SUM, Aggregate, ServerRule
from ..protocol.join import SECAGG
from ..protocol.messages import Message, Refused
from ..protocol.repeats import Repeats, note
from ..protocol.rounds import (
    APPLIED,
    NOTHING,
    READY,
    ROUND_CLOSED,
    Abandoned,
    Arrived,
    Begin,
    Finish,
    Finished,
    Kept,
    Masked,
    Measure,
    Measured,
    Noted,
    Recall,
    Recalled,
    Released,
    RoundMessage,
    Ruling,
)
from ..protocol.secure.fixed import UNIT, Totals, average, totals
from ..protocol.secure.masks import AUXILIARY, Masks
from ..protocol.secure.noise import Array, generator, restore
from ..protocol.secure.plan import Plan
from ..protocol.secure.scale import WEIGHT
from ..protocol.session import PIECE, Slice, ascending, ends
from .robust import distances, finite, mean, median, trimmed

KEY_BYTES = 32
REMEMBERED = 64
"""Sessions that are over and not forgotten."""
STEP = 1 << 28
"""Bytes of masks that are made at a time."""
WEIGHED = 1 << 16
"""Elements that are weighed at a time."""
LEAST = 1 << 17
"""Elements that are looked at at a time, at least: so that masks of either width begin with a chunk."""


@dataclass(frozen=True, slots=True)
class Apply:
    """Effect: the average update of this shard's elements is to be applied, all of it, before what follows is done.

    Attributes:
        update: float32, in the order of the blocks. rule: how it changes the weights.
    """

    run: int
    round: int
    update: Array = field(repr=False)
    rule: ServerRule = field(default_factory=ServerRule)


RoundEffect: TypeAlias = Send | Apply


@dataclass(slots=True)
class _Incoming:
    """A slice that is not added yet, in the pieces in which it came: nothing is copied. It is whole once `kept` is all of it."""

    pieces: list[Array] = field(default_factory=list)
    kept: int = 0

    def parts(self, start: int, stop: int, dtype: np.dtype[Any]) -> Iterator[tuple[int, Array]]:
        """What lies between these two bytes: the number of the first element, and the elements, piece by piece."""
        at = 0
        for piece in self.pieces:
            low, high = max(start, at), min(stop, at + len(piece))
            if low < high:
                yield (low - start) // dtype.itemsize, piece[low - at : high - at].view(dtype)
            at += len(piece)


class _Sum:
    """What a shard holds of one session.

    Args:
        start: the number of the shard's first element.
    """

    def __init__(
        self, begin: Begin, plan: Plan, rule: ServerRule, aggregate: Aggregate, start: int, slice_: Slice
    ) -> None:
        self.session, self.plan, self.start, self.slice = begin.session, plan, start, slice_
        self.rule, self.aggregate = rule, aggregate
        self.rows: dict[int, Array] = {}
        """By rank, updates that are not summed, where all are needed."""
        self.count = len(begin.members)
        self.ranks = {incarnation: rank for rank, incarnation in enumerate(begin.members)}
        self.masked = plan.protection == SECAGG
        self.dtype = plan.scale(self.count).dtype if self.masked else np.dtype(np.float32)
        self.main = np.zeros(slice_.elements, self.dtype)
        self.lanes = np.zeros(slice_.lanes, np.uint64)
        self.number = 0
        self.turns: set[int] = set()
        self.added: set[int] = set()
        self.dropped: set[int] = set()
        self.incoming: dict[int, _Incoming] = {}
        self.whole: set[int] = set()
        self.finish: Finish | None = None
        self.result: Array | None = None

    @property
    def here(self) -> tuple[int, ...]:
        """Whose slices are whole and not added yet."""
        return tuple(sorted(rank for rank, each in self.incoming.items() if each.kept == self.slice.size))

    def add(self, rank: int) -> None:
        incoming, slice_ = self.incoming.pop(rank), self.slice
        lanes = np.empty_like(self.lanes)
        for at, part in incoming.parts(slice_.auxiliary, slice_.size, lanes.dtype):
            lanes[at : at + len(part)] = part
        into, weight = self.main, np.float32(int(lanes[WEIGHT]) / UNIT)
        if self.aggregate.name != "mean":
            into = self.rows[rank] = np.empty_like(self.main)
        for at, part in incoming.parts(0, slice_.main, self.dtype):
            if self.masked:
                np.add(into[at : at + len(part)], part, out=into[at : at + len(part)])
            elif self.aggregate.name != "mean":
                into[at : at + len(part)] = part
            else:
                _add_weighed(into[at : at + len(part)], part, weight)
        np.add(self.lanes, lanes, out=self.lanes)
        self.added.add(rank)


def _add_weighed(into: Array, part: Array, weight: np.float32) -> None:
    scratch = np.empty(min(WEIGHED, len(part)), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is noticed in the sum
        for start in range(0, len(part), WEIGHED):
            piece, sum_ = part[start : start + WEIGHED], into[start : start + WEIGHED]
            np.multiply(piece, weight, out=scratch[: len(piece)])
            np.add(sum_, scratch[: len(piece)], out=sum_)


class Accumulator:
    """The shard half.

    Args:
        incarnation: of the shard. elements: how many it has.
        digest: of the values of its blocks as they are now, 32 bytes (`session.blocks_digest`).
    """

    def __init__(self, incarnation: int, elements: int, digest: Callable[[], bytes]) -> None:
        self.incarnation = incarnation
        self.counters: Counter[str] = Counter()
        self._elements, self._digest = elements, digest
        self._sum: _Sum | None = None
        self._last = (0, NOTHING)
        """The last session that ended here, or is about to, and how."""
        self.rounds = self.applied = 0
        """How many it has applied, and the number of the last, counted from 1."""
        self._over: deque[int] = deque(maxlen=REMEMBERED)
        """Sessions that are over: what comes late does not begin them again."""
        self._work: Iterator[None] | None = None
        self._repeats = Repeats()
        self._out: list[RoundEffect] = []
        self._now = 0.0

    def __repr__(self) -> str:
        return f"Accumulator({self._elements} elements, session {self._last[0]})"

    @property
    def wake_at(self) -> float:
        """When the next `Tick` is wanted."""
        return self._now if self._work is not None else self._repeats.wake_at

    @property
    def ready(self) -> bool:
        """Does an average wait for leave to be applied?"""
        return self._last[1] == READY

    @property
    def holds(self) -> int:
        """Bytes of sums and slices."""
        if self._sum is None:
            return 0
        return self._sum.main.nbytes + sum(each.kept for each in self._sum.incoming.values())

    def handle(self, event: Received | Tick, now: float) -> list[RoundEffect]:
        self._out, self._now = [], now
        if isinstance(event, Received):
            self._received(event.peer, event.message)
        elif self._work is not None:
            self._continue()
        for _, message in self._repeats.due(now):
            self._out.append(Send(COORDINATOR, message))
        return self._out

    def _received(self, peer: Peer, message: Message) -> None:
        act = _FROM_COORDINATOR.get(type(message)) if peer == COORDINATOR else None
        try:
            if act is not None and message.incarnation == self.incarnation:  # type: ignore[union-attr]
                act(self, message)
            elif isinstance(message, Masked) and peer != COORDINATOR:
                self._masked(peer, message)
            else:
                self.counters["rejected.misplaced"] += 1
        except ProtocolError as error:
            self.counters[f"rejected.{error.reason}"] += 1
            self._out.append(Send(peer, Refused(message.session, "malformed", str(error)[:256])))  # type: ignore[union-attr]

    def _note(self, message: RoundMessage) -> None:
        self._out.append(Send(COORDINATOR, note(message)))

    def _say(self, message: RoundMessage) -> None:
        self._out.append(Send(COORDINATOR, self._repeats.put(0, message, self._now)))

    def _of(self, session: int) -> _Sum | None:
        return self._sum if self._sum is not None and self._sum.session == session else None

    # --- the coordinator's word

    def _noted(self, message: Noted) -> None:
        self._repeats.noted(0, message)

    def _recall(self, message: Recall) -> None:
        self._say(Recalled(self.incarnation, message.session, *self._last, self.rounds, (self._digest(),)))

    def _begin(self, message: Begin) -> None:
        if self._of(message.session) is None and message.session not in self._over:
            plan = Plan.unpack(bytes(message.buffers[0]))
            if message.index >= len(plan.shards) or len(set(message.members)) != len(message.members):
                raise ProtocolError("malformed", "a round without this shard, or with a member twice")
            start, stop = plan.shards[message.index]
            if stop - start != self._elements or not plan.minimum <= len(message.members) <= plan.cohort:
                raise ProtocolError("malformed", f"a round of {stop - start} elements, or of too few or many members")
            if self._last[1] == READY:
                raise ProtocolError("malformed", "a round while another waits for its end")
            self._drop()
            width = plan.bits // 8 if plan.protection == SECAGG else np.dtype(np.float32).itemsize
            try:
                rule, aggregate = ServerRule.read(dict(plan.training)), Aggregate.read(dict(plan.training))
            except ConfigError as error:
                raise ProtocolError("malformed", error.what) from None
            self._sum = _Sum(message, plan, rule, aggregate, start, Slice(self._elements, width, plan.lanes))
            self._last = message.session, NOTHING
        self._note(message)

    def _ruling(self, message: Ruling) -> None:
        held = self._of(message.session)
        if held is None:
            return self._misplaced()
        for ranks in (message.turns, message.added, message.dropped):
            ascending(ranks, "ranks")
        turns, added, dropped = set(message.turns), set(message.added), set(message.dropped)
        if message.number > held.number and held.finish is None:
            apart = len(turns | added | dropped) == len(turns) + len(added) + len(dropped)
            if not apart or not added - held.added <= held.whole or added & held.dropped or not held.added <= added:
                raise ProtocolError("malformed", "a ruling against an earlier one, or that adds what is not here")
            for rank in added - held.added:
                held.add(rank)
            for rank in [rank for rank in held.incoming if rank not in turns]:
                del held.incoming[rank]
            held.turns, held.dropped, held.number = turns, dropped, message.number
            if not held.here:
                self._repeats.answered(0, message)
        self._note(message)

    def _misplaced(self) -> None:
        self.counters["rejected.misplaced"] += 1

    def _measure(self, message: Measure) -> None:
        held = self._of(message.session)
        if held is None or held.finish is not None:
            return self._misplaced()
        found = distances([held.rows[rank] for rank in sorted(held.rows)])
        self._say(Measured(self.incarnation, held.session, (found.astype("<f8").tobytes(),)))

    def _finish(self, message: Finish) -> None:
        held = self._of(message.session)
        if held is None:
            return self._misplaced()
        if held.finish is None:
            keys = [ends(buffer, KEY_BYTES, len(buffer) // KEY_BYTES, "keys") for buffer in message.buffers]
            held.finish = message
            held.incoming.clear()
            self._work = self._finishing(held, *keys)
            self._repeats.owe(0, message, self._now)
        else:
            self._note(message)

    def _released(self, message: Released) -> None:
        held = self._of(message.session)
        if held is not None and held.result is not None:
            self._out.append(Apply(held.plan.run, held.plan.round, held.result, held.rule))
            self._drop()
            self._last = message.session, APPLIED
            self.rounds, self.applied = self.rounds + 1, held.plan.round + 1
        elif held is not None:
            return self._misplaced()  # it is not ready: the coordinator cannot have said this
        self._note(message)

    def _abandoned(self, message: Abandoned) -> None:
        if self._of(message.session) is not None:
            self._drop()
            self._last = message.session, NOTHING
        self._note(message)

    def _drop(self) -> None:
        if self._sum is not None:
            self._over.append(self._sum.session)
        self._sum = self._work = None
        self._repeats.drop(lambda message: not isinstance(message, Recalled))

    # --- the sum

    def _continue(self) -> None:
        assert self._work is not None and self._sum is not None
        held = self._sum
        try:
            next(self._work)
        except StopIteration:
            self._work = None
        except ProtocolError as error:
            self._work = None
            self.counters["rounds.wrong"] += 1
            self._say(Finished(self.incarnation, held.session, False, str(error)[:256], 0.0, 0, 0, ()))

    def _finishing(self, held: _Sum, add: list[bytes], subtract: list[bytes]) -> Iterator[None]:
        """Remove the masks and look at what is left, a part at a time."""
        finish, plan = held.finish, held.plan
        assert finish is not None
        wrong = set(finish.survivors) != held.added or len(held.added) != len(finish.survivors)
        if wrong or not set(finish.chosen) <= held.added or bool(finish.chosen) != held.aggregate.chooses:
            raise ProtocolError("malformed", "the survivors are not those whose slices were added here")
        Masks(add, subtract, AUXILIARY).apply(held.lanes)
        summed = [name.startswith(SUM) for name in plan.metrics]
        counted = totals(held.lanes, len(held.added), plan.cap, plan.elements, summed)
        masks, width = Masks(add, subtract), self._step(len(add) + len(subtract))
        for start in range(0, len(held.main) if held.masked else 0, width):
            masks.apply(held.main[start : start + width], held.start + start)
            yield
        result = self._average(held, counted)
        if plan.noise is None and not np.isfinite(result).all():
            raise ProtocolError("malformed", "an average that is not finite")
        held.result, held.main = result, np.zeros(0, held.dtype)
        self._last = held.session, READY
        metrics = tuple(zip(plan.metrics, counted.metrics, strict=True))
        numbers = counted.weight, counted.capped, counted.clipped, metrics
        self._say(Finished(self.incarnation, held.session, True, "", *numbers))

    @staticmethod
    def _step(keys: int) -> int:
        return max(LEAST, STEP // max(1, 4 * keys) // LEAST * LEAST)

    @staticmethod
    def _average(held: _Sum, counted: Totals) -> Array:
        """In the memory of the sum, where an element is as wide as a float32."""
        plan, main = held.plan, held.main
        if not len(main):
            return np.zeros(0, np.float32)
        result: Array = main.view(np.float32) if main.itemsize == 4 else np.empty(len(main), np.float32)
        if plan.noise is not None:
            restore(main, plan.noise, counted.clients, result)
        elif held.masked:
            average(main, plan.scale(held.count), counted.clients, counted.weight, result)
        elif held.rows:
            _robust(held, result)
        else:
            np.divide(main, np.float32(counted.weight), out=result)
        said = dict(plan.training)
        if float(said.get(NOISE, 0.0)) and not held.masked:
            spread = float(said[NOISE]) * float(said[NORM]) / counted.clients
            result += generator().normal(0.0, spread, len(result)).astype(np.float32)
        return result

    # --- slices

    def _masked(self, peer: Peer, message: Masked) -> None:
        if message.shard != self.incarnation:
            return self._closed(peer, message)
        held = self._of(message.session)
        rank = held.ranks.get(message.incarnation) if held else None
        if held is None or rank is None or rank in held.dropped or held.finish is not None:
            if held is not None and rank in held.added:
                return self._kept(peer, message, held.slice.size)
            return self._closed(peer, message)
        if rank in held.added or rank in held.whole:
            return self._kept(peer, message, held.slice.size)
        if rank not in held.turns:
            return self._kept(peer, message, 0)  # its turn is over, or not known here yet
        incoming = held.incoming.setdefault(rank, _Incoming())
        if message.offset == incoming.kept:
            piece = np.frombuffer(message.buffers[0], np.uint8)
            if len(piece) != min(PIECE, held.slice.size - incoming.kept):
                raise ProtocolError("malformed", f"a piece of {len(piece)} bytes of a slice of {held.slice.size}")
            incoming.pieces.append(piece)
            incoming.kept += len(piece)
            if incoming.kept == held.slice.size:
                held.whole.add(rank)
                self._say(Arrived(self.incarnation, held.session, len(held.whole), held.here))
        self._kept(peer, message, incoming.kept)

    def _kept(self, peer: Peer, message: Masked, upto: int) -> None:
        self._out.append(Send(peer, Kept(message.incarnation, self.incarnation, message.session, upto)))

    def _closed(self, peer: Peer, message: Masked) -> None:
        self._out.append(Send(peer, Refused(message.session, ROUND_CLOSED, "this shard has no such round")))


def _robust(held: _Sum, out: Array) -> None:
    """By a rule that needs all updates.

    Raises:
        ProtocolError: `malformed`: none of them is finite.
    """
    assert held.finish is not None
    chosen = held.finish.chosen or sorted(held.rows)
    rows = finite([held.rows[rank] for rank in chosen])
    if held.aggregate.name == "median":
        median(rows, out)
    elif held.aggregate.name == "trimmed":
        trimmed(rows, held.aggregate.named["share"], out)
    else:
        mean(rows, out)
    held.rows.clear()


_FROM_COORDINATOR: dict[type[Any], Callable[[Accumulator, Any], None]] = {
    Noted: Accumulator._noted,
    Recall: Accumulator._recall,
    Begin: Accumulator._begin,
    Ruling: Accumulator._ruling,
    Measure: Accumulator._measure,
    Finish: Accumulator._finish,
    Released: Accumulator._released,
    Abandoned: Accumulator._abandoned,
}

KINDS = frozenset({Masked, *_FROM_COORDINATOR})
"""What workers and the coordinator say to it."""
