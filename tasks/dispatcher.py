"""The dispatcher's core: tasks come in, go to executors, and are answered; versions of models come in and go out (SPEC §16).

Rules
- `handle` is the only method that changes anything; it never waits, never reads a clock. A peer's mistake is counted and refused.
- What comes in is taken in; what is decided, is decided in the `Tick` that follows, for all of it. What must be durable is in the
  book, committed, before the message that promises it is given to the loop.
- A task is answered once. What is late, repeated or of an earlier life changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from ..protocol.asking import Answer, Inquire
from ..protocol.effects import COORDINATOR, Effect, Linked, Log, Peer, Received, Send, Tick, Unreadable
from ..protocol.errors import ConfigError, ProtocolError, ShapeError
from ..protocol.messages import Message, Refused
from ..protocol.schema import Buffer
from ..protocol.tasking import (
    MOST,
    Answers,
    Asked,
    Busy,
    Counted,
    Done,
    Feedback,
    Fetch,
    Govern,
    Heard,
    Host,
    Load,
    Offer,
    Publish,
    Recollect,
    Recollected,
    Retire,
    Settled,
    Submit,
    Taken,
    Told,
    Upload,
    Work,
)
from .allot import BEST, Needs
from .belief import Belief, Beta
from .book import Book, Closed, Id, Open
from .card import is_label
from .crew import Batch, Crew, Seat
from .desk import answer
from .lending import Lending
from .library import Library
from .rollout import Rollout
from .routes import Planner
from .waiting import Deadlines, Item, Waiting

RETRY = 1.0
MOST_TRIES = 5
MOST_CLIENTS = 65_536
MOST_TIMES = 8
"""That an answer is said unasked."""
KEEP = 3600.0
"""Seconds that an answer waits for its client to confirm it: a client may have ended."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the queue.

    Attributes:
        policy: as `allot`'s, or `assign`. most_tasks, most_bytes: that may wait. linger: seconds of work in a batch.
        window: rewards that count in what is believed of a version.
        patience: seconds that a task waits for somebody to come who could do it; after a restart they begin anew.
    """

    policy: str = BEST
    most_tasks: int = 100_000
    most_bytes: int = 1 << 30
    linger: float = 0.005
    window: int = 500
    patience: float = 10.0


@dataclass(slots=True)
class _Unheard:
    """An answer that its client has not confirmed."""

    told: Told
    output: Buffer
    since: float = -inf
    said_at: float = -inf
    times: int = 0


class Dispatcher:
    """The dispatcher.

    Args:
        life: of this process, a random 64-bit number. here: host, port and key that others reach it by.
        wall: seconds since 1970 at `now = 0`. beta: draws, for the policy `thompson`.
    """

    def __init__(
        self,
        life: int,
        book: Book,
        library: Library,
        settings: Settings = Settings(),
        here: tuple[str, int, str] = ("127.0.0.1", 0, ""),
        wall: float = 0.0,
        beta: Beta | None = None,
    ) -> None:
        self.life, self.settings, self.wall = life, settings, wall
        self.counters: Counter[str] = Counter()
        self.book, self.library = book, library
        self.waiting, self.crew = Waiting(), Crew()
        self.beliefs: dict[tuple[str, str], Belief] = {}
        notes = book.notes()
        self.rollout = Rollout(library, notes, book.put)
        self._shelf = Lending(book, library, self.rollout, notes)
        self.planner = Planner(self.rollout, self.crew, self.beliefs, settings.policy, settings.linger, beta)
        self.now = 0.0
        self._here = here
        self._items: dict[Id, Item] = {}
        """All that are not answered, but for parts."""
        self._unheard: dict[Id, _Unheard] = {}
        self._routes: dict[int, Peer] = {}
        self._highest: dict[int, int] = {}
        """By client, the highest number of a task that has come: what is above it is new."""
        self._deadlines = Deadlines()
        self._batch = life
        self._added: list[Open] = []
        self._taken: dict[int, list[int]] = {}
        self._closed: list[Closed] = []
        self._told: dict[int, list[int]] = {}
        self._dirty = True
        self._retry_at = 0.0
        self._patient_until = 0.0
        self._began = inf
        self._out: list[Effect] = []
        self._restore()

    def _restore(self) -> None:
        """What an earlier life has left."""
        for task in self.book.open():
            self._enqueue(task.id, task.asked, task.payload, task.came - self.wall)
        for closed in self.book.unheard():
            self._unheard[closed.id] = _Unheard(closed.told, closed.output)
        for identity, kind, reward in self.book.rewards():
            self._believe(identity, kind, reward)
        self.book.commit()

    @property
    def wake_at(self) -> float:
        due = self.now if self._dirty else inf
        return min(due, self._retry_at, self._deadlines.next, self.crew.wake_at, self._patient_until)

    def handle(self, event: Received | Unreadable | Tick | Linked, now: float) -> list[Effect]:
        self._out, self.now = [], now
        self._began = min(self._began, now)
        match event:
            case Received(peer, message):
                act = _ACTS.get(type(message))
                if act is not None and peer != COORDINATOR:
                    act(self, peer, message)
                elif peer != COORDINATOR:
                    self.counters["rejected.misplaced"] += 1
            case Unreadable(peer, reason):
                self.counters[f"rejected.{reason}"] += 1
                if reason == "version":
                    self._send(peer, Refused(0, "version", "this dispatcher speaks version 1 of the protocol"))
            case Linked():
                self._retry_at = now
            case Tick():
                self._tick()
        return self._out

    # --- tasks come in

    def _submit(self, peer: Peer, message: Submit) -> None:
        client = message.client
        self._route(client, peer)
        refused: list[int] = []
        for asked, payload in zip(message.tasks, message.buffers, strict=True):
            id_ = client, asked.number
            if id_ in self._items:
                self._taken.setdefault(client, []).append(asked.number)
            elif id_ in self._unheard:
                self._told.setdefault(client, []).append(asked.number)
            elif not _sound(asked):
                self.counters["rejected.malformed"] += 1
            elif self._full(len(payload)):
                refused.append(asked.number)
            elif asked.number > self._highest.get(client, -1) or self.book.find(id_) is None:
                self._added.append(Open(id_, asked, payload, self.wall + self.now))
                self._enqueue(id_, asked, payload, self.now)
                self._taken.setdefault(client, []).append(asked.number)
            else:
                text = f"its answer is kept for {KEEP:g} s after it is there, and not any more"
                told = Told(asked.number, "failed", text, "", 0, "", "", 0.0)
                self._send(peer, Answers(client, (told,), (b"",)))
        if refused:
            self.counters["busy"] += len(refused)
            self._send(peer, Busy(client, tuple(refused), self._room_in()))
        self._dirty = True

    def _route(self, client: int, peer: Peer) -> None:
        """Where this client is now. Of too many the first is forgotten, until it speaks again."""
        if client not in self._routes and len(self._routes) >= MOST_CLIENTS:
            oldest = next(iter(self._routes))
            del self._routes[oldest]
            self._highest.pop(oldest, None)
        self._routes[client] = peer

    def _full(self, size: int) -> bool:
        s = self.settings
        return len(self._items) >= s.most_tasks or self.waiting.nbytes + size > s.most_bytes

    def _room_in(self) -> float:
        """Seconds in which a tenth of the queue may be done."""
        seconds = sum(seat.queue(self.now) for seat in self.crew) / max(1, len(self.crew))
        return min(10.0, max(0.05, seconds))

    def _enqueue(self, id_: Id, asked: Asked, payload: Buffer, came: float) -> None:
        self._highest[id_[0]] = max(self._highest.get(id_[0], -1), asked.number)
        item = Item(id_, asked, payload, came, came + asked.deadline)
        self._items[id_] = item
        self.waiting.add(item)
        self._deadlines.add(item)

    def _heard(self, peer: Peer, message: Heard) -> None:
        known = [id_ for number in message.numbers if self._unheard.pop(id_ := (message.client, number), None)]
        self.book.heard(known)  # committed with whatever comes next: nothing is promised

    # --- executors

    def _offer(self, peer: Peer, offer: Offer) -> None:
        if not all(map(is_label, (offer.name, *offer.models, *offer.data))) or not offer.price >= 0:
            self.counters["rejected.malformed"] += 1
            return
        known = self.crew.get(offer.executor)
        for other in [seat for seat in self.crew if seat.name == offer.name and seat.incarnation != offer.executor]:
            self._lost(self.crew.gone(other), "was started again")
        seat = self.crew.offered(peer, offer, self.now)
        if seat is None:
            return self._send(peer, Refused(0, "full", "there are too many executors"))
        if known is None:
            self._out.append(Log("info", f"executor {offer.name} serves {', '.join(offer.models)}"))
        for batch in self.crew.unheard(seat, self.now):
            self._send(peer, batch.work)
        self._tell(seat, again=known is not None)
        self._dirty = True

    def _tell(self, seat: Seat, again: bool = False) -> None:
        """What it should hold, where it does not yet or holds more."""
        loaded, failed = frozenset(seat.offer.loaded), frozenset(identity for identity, _ in seat.offer.failed)
        cards = self.rollout.wanted(seat.offer.models, loaded, failed)
        identities = tuple(card.identity for card in cards)
        lacks = set(identities) != loaded
        if identities != seat.told or (again and lacks and self.now - seat.told_at >= RETRY):
            seat.told, seat.told_at = identities, self.now
            self._send(seat.peer, Load(seat.incarnation, identities, tuple(card.packed for card in cards)))

    def _retire(self, peer: Peer, message: Retire) -> None:
        seat = self.crew.get(message.executor)
        if seat is not None:
            self._lost(self.crew.gone(seat), "has ended")

    def _lost(self, seat: Seat, why: str) -> None:
        """Its work is somebody else's."""
        self._out.append(Log("info", f"executor {seat.name} {why}; {len(seat.batches)} batches go to others"))
        for batch in reversed(list(seat.batches.values())):
            for item in reversed(batch.items):
                item.tries += why != "has ended"
                if item.unwanted:
                    continue
                if item.tries >= MOST_TRIES:
                    self._fail(item, "failed", f"{item.tries} executors have ended while they worked on it")
                else:
                    self.waiting.add(item, first=True)
        self._dirty = True

    def _done(self, peer: Peer, message: Done) -> None:
        self._send(peer, Settled(message.executor, message.batch))
        seat = self.crew.get(message.executor)
        batch = seat.batches.pop(message.batch, None) if seat else None
        if seat is None or batch is None:
            return
        self._dirty = True
        if not message.errors:  # it does not hold this version any more
            for item in reversed(batch.items):
                if not item.unwanted:
                    self.waiting.add(item, first=True)
            return
        if len(message.errors) != len(batch.items):
            self.counters["rejected.malformed"] += 1
            message = Done(
                0, 0, 0.0, ("an answer to other tasks than were given",) * len(batch.items), (b"",) * len(batch.items)
            )
        elif isfinite(message.seconds) and message.seconds >= 0:
            self.crew.measured(seat, batch, message.seconds)
        following = next(iter(seat.batches.values()), None)
        if following is not None:
            following.began = self.now
        for item, error, output in zip(batch.items, message.errors, message.buffers, strict=True):
            self._worked(seat, batch, item, error, output)

    def _worked(self, seat: Seat, batch: Batch, item: Item, error: str, output: Buffer) -> None:
        """An executor has done a task, or a part of one."""
        if error:
            self._believe(batch.work.identity, item.asked.kind, 0.0)
            return self._fail(item, "failed", f"on {seat.name}: {error}", batch.work.identity)
        whole: Buffer | None = output
        if item.parcel is not None:
            try:
                whole = item.parcel.put(item.part, output)
            except (ShapeError, ProtocolError) as wrong:
                return self._fail(item, "failed", f"on {seat.name}: {wrong.what}", batch.work.identity)
            item.over = True
            if whole is None:
                return
            item = item.parcel.whole
        if not item.over:
            self._close(item, "", "", whole or b"", batch.work.identity, seat.name)

    # --- answers

    def _fail(self, item: Item, code: str, text: str, identity: str = "") -> None:
        if item.parcel is not None:
            item.over = True
            item = item.parcel.whole
        if not item.over:
            self._close(item, code, text, b"", identity, "")

    def _close(self, item: Item, code: str, text: str, output: Buffer, identity: str, executor: str) -> None:
        item.over = True
        card = self.planner.card(identity)
        name, version = (card.name, card.version) if card else ("", 0)
        seconds = max(0.0, self.now - item.came)
        told = Told(item.asked.number, code, text[:4096], name, version, identity, executor, seconds)
        del self._items[item.id]
        self._unheard[item.id] = _Unheard(told, output, self.now)
        self._closed.append(Closed(item.id, told, output, item.reason, not item.asked.privacy))
        self._told.setdefault(item.id[0], []).append(item.asked.number)
        self.counters["answered" if not code else f"failed.{code}"] += 1

    # --- deciding

    def _tick(self) -> None:
        for seat in self.crew.expired(self.now):
            self._lost(seat, "is silent")
        for item in self._deadlines.passed(self.now):
            self._fail(item, "deadline", f"not done within {item.asked.deadline:g} s: {self._why_waiting(item)}")
        if self.now >= self._retry_at:
            self._retry_at = self.now + RETRY
            self._send(COORDINATOR, Host(self.life, *self._here))
            if self.rollout.look():
                self._everybody()
            self._forget()
            self._say_again()
            self._dirty = True
        if self._dirty or self.now >= self._patient_until:
            self._dirty, self._patient_until = False, inf
            self._dispatch()
        self._flush()

    def _forget(self) -> None:
        """Answers for which nobody has come; the first are the oldest."""
        late = []
        for id_, each in self._unheard.items():
            if self.now < max(each.since, self._began) + KEEP:
                break
            late.append(id_)
        for id_ in late:
            del self._unheard[id_]
        if late:
            self.counters["forgotten"] += len(late)
            self.book.heard(late)

    def _say_again(self) -> None:
        """Answers that nobody has confirmed, ever more seldom; a client that comes back asks for them."""
        for (client, number), each in self._unheard.items():
            if client in self._routes and each.times < MOST_TIMES and self.now - each.said_at >= RETRY * each.times:
                self._told.setdefault(client, []).append(number)

    def _why_waiting(self, item: Item) -> str:
        if not len(self.crew):
            return "no executor is here"
        return f"{len(self.waiting)} tasks wait for {len(self.crew)} executors"

    def _everybody(self) -> None:
        for seat in self.crew:
            self._tell(seat)

    def _dispatch(self) -> None:
        plans = self.planner.plan(self.waiting, self.now)
        for batch in plans.batches:
            self._work(batch.seat, batch.identity, batch.items)
        for item, why in plans.unmet:
            waits_until = max(item.came, self._began) + self.settings.patience
            if (why and not plans.unsettled) or self.now >= waits_until:
                text = "no model qualifies: " + ("; ".join(why) if why else "nobody serves any")
                self._fail(item, "unmet", text)
            else:
                self._patient_until = min(self._patient_until, waits_until)

    def _work(self, seat: Seat, identity: str, items: list[Item]) -> None:
        self._batch = (self._batch + 1) % (1 << 64)
        counts, payloads = tuple(item.items for item in items), tuple(item.payload for item in items)
        work = Work(seat.incarnation, self._batch, identity, counts, payloads)
        seat.batches[self._batch] = Batch(work, items, self.now, self.now)
        self._send(seat.peer, work)

    def _flush(self) -> None:
        """What was decided is written down, and then said."""
        if self._added:
            self.book.add(self._added)
        if self._closed:
            self.book.close(self._closed)
        self.book.commit()
        self._added, self._closed = [], []
        for client, numbers in self._taken.items():
            for part in _parts(numbers):
                self._send(self._routes.get(client), Taken(client, part))
        for client, numbers in self._told.items():
            for part in _parts(numbers):
                found = [self._unheard[client, number] for number in part if (client, number) in self._unheard]
                told, outputs = tuple(each.told for each in found), tuple(each.output for each in found)
                for each in found:
                    each.said_at, each.times = self.now, each.times + 1
                if found:
                    self._send(self._routes.get(client), Answers(client, told, outputs))
        self._taken, self._told = {}, {}

    # --- feedback

    def _feedback(self, peer: Peer, message: Feedback) -> None:
        unknown, touched = 0, set()
        for value, truth in zip(message.values, message.buffers, strict=True):
            line = self.book.find((value.owner, value.number)) if 0 <= value.reward <= 1 else None
            if line is None or line.told is None or line.told.code:
                unknown += 1
                continue
            self.book.value(line.id, value.reward, b"" if line.privacy else truth)
            if line.reward is None:  # the first word on it; a later one replaces it in the book
                self._believe(line.told.identity, line.kind, value.reward)
            else:
                self._rebuild(line.told.identity, line.kind)
            touched.add(line.told.model)
        self.book.commit()
        self._send(peer, Counted(message.client, message.request, unknown))
        for name in touched:
            self._judge(name)

    def _believe(self, identity: str, kind: str, reward: float) -> None:
        belief = self.beliefs.get((identity, kind))
        if belief is None:
            card = self.planner.card(identity)
            belief = Belief(card.quality_of(kind) if card else None, self.settings.window)
            self.beliefs[identity, kind] = belief
        belief.add(min(1.0, max(0.0, reward)))

    def _rebuild(self, identity: str, kind: str) -> None:
        """What is believed, anew: something that was said has been taken back."""
        self.beliefs.pop((identity, kind), None)
        for other, its_kind, reward in self.book.rewards():
            if (other, its_kind) == (identity, kind):
                self._believe(identity, kind, reward)

    def _judge(self, name: str) -> None:
        verdict = self.rollout.judge(name, self.beliefs) if name in self.rollout.models else None
        if verdict is not None:
            self._out.append(Log("info", f"{verdict[1]} was tried, and is {verdict[0]}"))
            self.book.commit()
            self._everybody()
            self._dirty = True

    def _recollect(self, peer: Peer, message: Recollect) -> None:
        rows = self.book.fed_back(message.kind, message.after, min(message.most, MOST), message.data)
        values = tuple(recalled for recalled, _, _ in rows)
        buffers = tuple(
            b"".join((len(inputs).to_bytes(4, "little"), inputs, truth)) if message.data else b""
            for _, inputs, truth in rows
        )
        self._send(peer, Recollected(message.client, message.request, values, buffers))

    # --- versions

    def _fetch(self, peer: Peer, message: Fetch) -> None:
        self._send(peer, self._shelf.fetch(message))

    def _change(self, peer: Peer, message: Upload | Publish | Govern) -> None:
        said, news = self._shelf.change(message)
        self._send(peer, said)
        if news:
            self._out.append(Log("info", news))
            self._everybody()
            self._dirty = True

    # --- the rest

    def _inquire(self, peer: Peer, message: Inquire) -> None:
        self._send(peer, Answer(message.request, self.wall + self.now, (answer(self, message.what),)))

    def _send(self, peer: Peer | None, message: Message) -> None:
        if peer is not None:
            self._out.append(Send(peer, message))

    def end(self) -> None:
        """The process ends."""
        self.book.end()
        self.library.end()

    def check(self) -> None:
        """The invariants; tests call it after every event."""
        assert not self._items.keys() & self._unheard.keys()
        assert all(not item.over for item in self._items.values())
        assert all(len(seat.batches) <= 8 for seat in self.crew)


def _sound(asked: Asked) -> bool:
    """Are these needs that can be?"""
    try:
        Needs(asked.latency, asked.quality, asked.privacy, asked.budget, asked.deadline)
    except ConfigError:
        return False
    return is_label(asked.kind) and (not asked.model or is_label(asked.model))


def _parts(numbers: list[int]) -> list[tuple[int, ...]]:
    unique = list(dict.fromkeys(numbers))
    return [tuple(unique[start : start + MOST]) for start in range(0, len(unique), MOST)]


_ACTS: dict[type[Message], Callable[[Dispatcher, Peer, Any], None]] = {
    Submit: Dispatcher._submit,
    Heard: Dispatcher._heard,
    Offer: Dispatcher._offer,
    Fetch: Dispatcher._fetch,
    Done: Dispatcher._done,
    Retire: Dispatcher._retire,
    Feedback: Dispatcher._feedback,
    Recollect: Dispatcher._recollect,
    Upload: Dispatcher._change,
    Publish: Dispatcher._change,
    Govern: Dispatcher._change,
    Inquire: Dispatcher._inquire,
}
