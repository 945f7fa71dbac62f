"""The coordinator's core: who is here, what is trained, who holds which data (SPEC §3, §4.3, §9). It never touches a tensor.

Rules
- `handle` is the only method that changes anything. A request is answered once; a repeated one gets the same answer.
- What cannot be answered yet is kept, and looked at again after every event that could allow it.
- Every change of the membership is a new epoch, sent to all shards until they report it.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..protocol.asking import Answer as AnswerMessage
from ..protocol.asking import Echo, Echoed, Inquire, Switch
from ..protocol.effects import Effect, Log, Peer, Received, Send, Tick, Unreadable
from ..protocol.errors import ProtocolError
from ..protocol.join import is_name
from ..protocol.layout import lay_out
from ..protocol.messages import (
    Claim,
    Cluster,
    Complete,
    Completed,
    Declare,
    Declared,
    Evicted,
    Exhausted,
    Join,
    Leased,
    Leave,
    Left,
    Message,
    Model,
    Refused,
    Register,
    Registered,
    Renew,
    Renewed,
    Report,
    ShardJoin,
    ShardWelcome,
    View,
    Waiting,
    Welcome,
)
from ..protocol.model import ModelSpec, read_model
from ..protocol.records import Member
from .lobby import Lobby
from .members import Life, Members, Refusal
from .partitions import Answer, Partitions
from .settings import Settings
from .shards import Held, Shards
from .status import status
from .switch import Modes, Verdict

RETRY = 1.0
REMEMBERED_ANSWERS = 64
MAX_NAMES = 4096
"""Names of logged values and of counters that are kept."""


@dataclass(frozen=True, slots=True)
class Died:
    """A supervisor on this machine saw the process of the worker of this name end."""

    name: str


@dataclass(slots=True)
class _Parked:
    """A request that cannot be answered yet."""

    peer: Peer
    message: Register | Claim


@dataclass(slots=True)
class Totals:
    """What ended lives have done."""

    lost: int = 0
    left: int = 0
    stats: Counter[str] = field(default_factory=Counter)


class Coordinator:
    """The coordinator.

    Args:
        run: this life, a random 64-bit number.
        wall: seconds since 1970 at `now = 0`.
    """

    def __init__(self, run: int, settings: Settings, wall: float = 0.0) -> None:
        self.run, self.settings, self.wall = run, settings, wall
        self.now = 0.0
        self.epoch = 1
        self.members = Members(settings.lease)
        self.shards = Shards(settings.lease, settings.min_shards)
        self.partitions = Partitions()
        self.counters: Counter[str] = Counter()
        self.totals = Totals()
        self.logged: dict[str, float] = {}
        self.spec: ModelSpec | None = None
        self.opened_at: float | None = None
        """When `min_workers` were here for the first time."""
        self.modes = Modes(settings.mode, settings.staleness, settings.lease)
        self._begun = False
        """Has every shard had `min_workers` workers counted in at once?"""
        self._model: Model | None = None
        self._filler = 0
        self._registrations = 0
        self._cluster_epoch = 1
        self._answered: dict[int, OrderedDict[int, Message]] = {}
        self._parked: OrderedDict[tuple[int, int], _Parked] = OrderedDict()
        self._lobby = Lobby()
        self._retry_at = 0.0
        self._out: list[Effect] = []

    @property
    def wake_at(self) -> float:
        return min(self._retry_at, self.members.next_expiry)

    def handle(self, event: Received | Unreadable | Tick | Died, now: float) -> list[Effect]:
        self._out, self.now = [], now
        match event:
            case Received(peer, message):
                act = _ACTS.get(type(message))
                if act is None:
                    self.counters["rejected.misplaced"] += 1
                else:
                    act(self, peer, message)
            case Unreadable(peer, reason):
                self.counters[f"rejected.{reason}"] += 1
                if reason == "version":
                    self._send(peer, Refused(0, "version", "this coordinator speaks version 1 of the protocol"))
            case Died(name):
                life = self.members.named(name)
                if life is not None:
                    self._end(life, "lost", "its process ended")
            case Tick():
                pass
        for life in self.members.expired(now):
            self._end(life, "lost", f"silent for {self.settings.lease:g} s")
        if now >= self._retry_at:
            self._retry_at = now + RETRY
            self._repeat()
        return self._out

    # --- shards

    def _shard_join(self, peer: Peer, join: ShardJoin) -> None:
        if not is_name(join.host) or not 1 <= join.port <= 65535:
            self.counters["rejected.malformed"] += 1
            return
        held, changed = self.shards.join(join, peer, self.now)
        if join.digest and self.modes.adopt(join.phases):  # it was there before this life of ours
            self._new_epoch(cluster=True)
        if held is None:
            return self._send(
                peer, Waiting(0, len(self.shards), self.shards.fixed, "a free place: this shard is a spare")
            )
        self._send(peer, ShardWelcome(join.incarnation, self.run, held.place.index, self.settings.lease))
        if changed:
            self._log("info", f"shard {held.place.index} is here: {held.place.host}:{held.place.port}")
            self._shards_changed()

    def _report(self, peer: Peer, report: Report) -> None:
        held = self.shards.known(report.incarnation)
        if held is None or report.run != self.run:
            return self._send(peer, Evicted(report.incarnation))
        before, unfilled = (held.filled, held.digest), self.shards.unfilled
        self.shards.report(held, report, peer, self.now)
        for incarnation, clock in report.clocks:
            life = self.members.get(incarnation)
            if life is not None:
                life.clock, life.entered = max(life.clock, clock), True  # a shard knows before the next renewal
        if self.opened_at is None and held.opened and held.clocks:  # it began before we were started
            self.opened_at = self.now
            self._new_epoch()
            self._look_again()
        if not self._begun and self.shards.opened:
            self._begun = True
            self._new_epoch()
        self._change(self.modes.agree(self.shards))
        if before != (held.filled, held.digest):
            self._filling_changed(unfilled)
        self._inform(held)

    def _shards_changed(self) -> None:
        """A shard has come."""
        if self.shards.ready:
            for peer, join in self._lobby.waiting(self.now):
                self._admit(peer, join)
        self._choose_filler()
        self._new_epoch(cluster=True)
        self._look_again()

    def _filling_changed(self, unfilled: tuple[int, ...]) -> None:
        """A shard has taken in the model, has been filled, or has lost its weights."""
        filler = self._filler
        self._choose_filler()
        if filler != self._filler or set(self.shards.unfilled) - set(unfilled):
            self._new_epoch(cluster=True)
        self._look_again()

    def _choose_filler(self) -> None:
        unfilled = self.shards.unfilled if self._model else ()
        if not unfilled:
            self._filler = 0
        elif self.members.get(self._filler) is None:
            ready = [life for life in self.members if life.registered]
            best = max(ready, key=lambda life: (life.entered, life.clock, -life.registered), default=None)
            self._filler = best.incarnation if best else 0

    def _new_epoch(self, cluster: bool = False) -> None:
        self.epoch += 1
        view = self._view()
        for held in self.shards:
            self._inform(held, view)
        if cluster:
            self._cluster_epoch = self.epoch
            for life in self.members:
                self._cluster(life)

    def _inform(self, held: Held, view: View | None = None) -> None:
        """Send a shard what it lacks: the model first, then the view. Each is repeated after a while, and of views one is under way
        at a time: many workers who come at once would cost the square of their number (SPEC §3.2.1)."""
        if self._lacks_model(held) and self.now - held.model_sent_at >= RETRY:
            held.model_sent_at = self.now
            assert self._model is not None
            self._send(held.peer, self._model)
        if held.epoch < self.epoch and (held.epoch >= held.told or self.now - held.told_at >= RETRY):
            held.told, held.told_at = self.epoch, self.now
            self._send(held.peer, view or self._view())

    def _view(self) -> View:
        hold = self.modes.changing or not self.shards.ready
        members = tuple(Member(life.incarnation, life.name, life.registered > 0) for life in self.members)
        return View(self.run, self.epoch, self.modes.phases, hold, self._filler, self._quorum, members)

    @property
    def _quorum(self) -> int:
        """How many must be counted in before the first clock begins. Those who died since all were here are not waited for."""
        if self._begun:
            return 0
        wanted = self.settings.min_workers
        return wanted if self.opened_at is None else min(wanted, len(self.members))

    def _lacks_model(self, held: Held) -> bool:
        return self._model is not None and held.place.index < self.shards.fixed and held.digest != self._model.digest

    def _cluster(self, life: Life) -> None:
        fill = self.shards.unfilled if life.incarnation == self._filler else ()
        self._send(life.peer, Cluster(life.incarnation, self.epoch, self.shards.places, self.modes.phases, fill))

    # --- workers come, stay and go

    def _join(self, peer: Peer, join: Join) -> None:
        life = self.members.get(join.incarnation)
        if life is not None:
            life.peer = peer
            self.members.renew(life, self.now)  # it lives, though no welcome has reached it yet
            return self._send(peer, self._welcome(life))
        if not self.shards.ready:
            self._lobby.wait(peer, join, self.now)
            self._send(peer, Waiting(0, len(self.shards), max(self.shards.fixed, self.shards.wanted), "shards"))
            return
        self._admit(peer, join)

    def _admit(self, peer: Peer, join: Join) -> None:
        if not (is_name(join.name) and is_name(join.host)):
            self.counters["rejected.malformed"] += 1
            return self._send(peer, Refused(0, "malformed", "a name is printable and has at most 128 bytes"))
        try:
            before = self.members.holder(join)
        except Refusal as refusal:
            if refusal.code == "ended":
                return self._send(peer, Evicted(join.incarnation))
            if refusal.code == "name" and self._lobby.contest(
                peer, join
            ):  # the holder's next renewal, or its lease, will tell
                what = f"the lease of an earlier worker named {join.name!r}"
                return self._send(peer, Waiting(0, 0, 0, what[:256]))
            return self._send(peer, Refused(0, refusal.code, str(refusal)))
        if before is not None:
            self._end(before, "replaced", f"restarted as attempt {join.attempt}")
        life = self.members.admit(join, peer, self.now)
        self._log("info", f"worker {life.name} has joined from {life.host} (pid {life.pid})")
        self._new_epoch()
        self._send(peer, self._welcome(life))
        if self.opened_at is None and len(self.members) >= self.settings.min_workers:
            self.opened_at = self.now
            self._look_again()

    def _welcome(self, life: Life) -> Welcome:
        s = self.settings
        return Welcome(
            life.incarnation,
            self.run,
            life.number,
            self.epoch,
            s.lease,
            self.modes.phases,
            s.nonfinite,
            self.shards.places,
        )

    def _renew(self, peer: Peer, renew: Renew) -> None:
        life = self._known(peer, renew.incarnation)
        if life is None:
            return
        life.entered = renew.entered
        self.members.renew(life, self.now)
        for peer_, _join in self._lobby.contesting(life.name):
            text = f"a live worker on {life.host} (pid {life.pid}) is named {life.name!r} already"
            self._send(peer_, Refused(0, "name", text))
        life.clock = max(life.clock, renew.clock)
        self._note(life, renew)
        self._send(peer, Renewed(life.incarnation, self.epoch))
        if renew.epoch < self._cluster_epoch:
            self._cluster(life)

    def _note(self, life: Life, news: Renew | Leave) -> None:
        life.stats = dict(news.stats)
        life.logged = dict(news.logged)
        for name, value in life.logged.items():
            if name in self.logged or len(self.logged) < MAX_NAMES:
                self.logged[name] = value
        for lease, done in news.progress:
            self.partitions.progress(life.incarnation, lease, done)

    def _leave(self, peer: Peer, leave: Leave) -> None:
        life = self.members.get(leave.incarnation)
        if life is not None:
            self._note(life, leave)
            self._end(life, "left", "")
        self._send(peer, Left(leave.incarnation, leave.request))

    def _end(self, life: Life, state: str, why: str) -> None:
        self.members.end(life, state)
        self.partitions.end(life.incarnation)
        self._answered.pop(life.incarnation, None)
        for key in [key for key in self._parked if key[0] == life.incarnation]:
            del self._parked[key]
        for name, value in life.stats.items():
            if name in self.totals.stats or len(self.totals.stats) < MAX_NAMES:
                self.totals.stats[name] += value  # type: ignore[assignment]
        if state == "left":
            self.totals.left += 1
            self._log("info", f"worker {life.name} has left after {life.clock} clocks")
        else:
            self.totals.lost += 1
            self._log(
                "warning", f"worker {life.name} (pid {life.pid} on {life.host}) is gone: {why}; its data is free again"
            )
        filler = self._filler
        self._choose_filler()
        self._new_epoch(cluster=filler != self._filler)
        self._look_again()
        if state != "replaced":
            for peer, join in list(self._lobby.contesting(life.name)):
                self._admit(peer, join)

    def _known(self, peer: Peer, incarnation: int) -> Life | None:
        life = self.members.get(incarnation)
        if life is None:
            self.counters["evicted"] += 1
            self._send(peer, Evicted(incarnation))
        else:
            life.peer = peer
        return life

    # --- requests that may have to wait

    def _request(self, peer: Peer, message: Register | Claim | Declare | Complete) -> None:
        life = self._known(peer, message.incarnation)
        if life is None:
            return
        before = self._answered.get(life.incarnation, OrderedDict()).get(message.request)
        if before is not None:
            return self._send(peer, before)
        match message:
            case Register() | Claim():
                key = (life.incarnation, message.request)
                again = key in self._parked
                self._parked[key] = _Parked(peer, message)
                if not self._try(key) and (again or isinstance(message, Claim)):
                    self._send(peer, self._waiting(message))
            case Declare():
                wrong = self.partitions.declare(message)
                answer: Message = (
                    Declared(life.incarnation, message.request, self.partitions.jobs[message.job].size)
                    if not wrong
                    else (Refused(message.request, "mismatch", wrong))
                )
                self._answer(life, message.request, answer)
            case Complete():
                self.partitions.complete(life.incarnation, message.lease, message.done)
                self._answer(life, message.request, Completed(life.incarnation, message.request))
                self._look_again()

    def _waiting(self, message: Register | Claim) -> Waiting:
        if self.opened_at is None:
            return Waiting(message.request, len(self.members), self.settings.min_workers, "workers")
        if isinstance(message, Claim):
            return Waiting(message.request, 0, 0, "data that others hold")
        filled = sum(held.digest == self.shards.digest and held.filled for held in self.shards)
        return Waiting(message.request, filled, self.shards.fixed, "shards to take in the model and the first weights")

    def _answer(self, life: Life, request: int, answer: Message) -> None:
        kept = self._answered.setdefault(life.incarnation, OrderedDict())
        kept[request] = answer
        while len(kept) > REMEMBERED_ANSWERS:
            kept.popitem(last=False)
        self._send(life.peer, answer)

    def _look_again(self) -> None:
        for key in list(self._parked):
            if key in self._parked:
                self._try(key)

    def _try(self, key: tuple[int, int]) -> bool:
        """Answer a parked request if it can be answered now."""
        parked, life = self._parked[key], self.members.get(key[0])
        assert life is not None
        message = parked.message
        answer = self._try_register(life, message) if isinstance(message, Register) else self._try_claim(life, message)
        if answer is None:
            return False
        self._parked.pop(key, None)
        self._answer(life, key[1], answer)
        return True

    def _try_register(self, life: Life, message: Register) -> Message | None:
        try:
            spec = (
                read_model(message.buffers[0])
                if self.spec is None or self.spec.description != message.buffers[0]
                else self.spec
            )
        except ProtocolError as error:
            self.counters["rejected.malformed"] += 1
            return Refused(message.request, "malformed", str(error)[:4096])
        if self.spec is None:
            if not self.shards.ready:
                return None
            self.spec = spec
            layout = lay_out(spec, len(self.shards), self.settings.block_bytes)
            self.shards.fixed, self.shards.digest = layout.shards, layout.digest
            self.shards.idle = frozenset(i for i, blocks in enumerate(layout.by_shard) if not blocks)
            self._model = Model(self.run, layout.shards, layout.block_bytes, layout.digest, (spec.description,))
            self._log(
                "info",
                f"the model has {len(spec.tensors)} tensors, {spec.total_bytes} bytes, {len(layout.blocks)} blocks",
            )
            for held in self.shards:
                self._inform(held)
        if spec is not self.spec:
            difference = self.spec.difference(spec)
            if difference:
                text = f"this worker's model is not the one that is being trained: {difference}"
                return Refused(message.request, "mismatch", text[:4096])
        if not life.registered:
            self._registrations += 1
            life.registered = self._registrations
            filler = self._filler
            self._choose_filler()
            if filler != self._filler:
                self._new_epoch(cluster=True)
        if self.opened_at is None or not self.shards.agreed:
            return None
        if self.shards.unfilled and life.incarnation != self._filler:
            return None
        assert self._model is not None
        return Registered(
            life.incarnation, message.request, self._model.shards, self._model.block_bytes, self._model.digest
        )

    def _try_claim(self, life: Life, message: Claim) -> Message | None:
        if self.opened_at is None:
            return None
        found = self.partitions.claim(life.incarnation, message.job, message.epochs)
        if found is Answer.LATER:
            return None
        if found is Answer.NEVER:
            return Exhausted(life.incarnation, message.request)
        if found is None or isinstance(found, Answer):
            return Refused(message.request, "undeclared", f"data set {message.job!r} is not declared")
        oldest = self.partitions.jobs[message.job].oldest
        return Leased(life.incarnation, message.request, found.lease, found.epoch, found.start, found.stop, oldest)

    # --- the rest

    def _repeat(self) -> None:
        """Once a second: shards that have not confirmed the newest view or model are told again."""
        self._change(self.modes.give_up(self.shards, self.now))
        for held in self.shards.close_ranks(self.now):
            self._send(held.peer, Evicted(held.place.incarnation))
        for held in self.shards:
            self._inform(held)

    def _switch(self, peer: Peer, message: Switch) -> None:
        self._change(self.modes.ask(peer, message, self.shards, self.epoch + 1, self.now))

    def _change(self, verdict: Verdict) -> None:
        if verdict.news:
            self._log("info", verdict.news)
        if verdict.view:
            self._new_epoch(cluster=True)
        for peer, answer in verdict.told:
            self._send(peer, answer)

    def _inquire(self, peer: Peer, message: Inquire) -> None:
        body = json.dumps(status(self), allow_nan=False).encode()
        self._send(peer, AnswerMessage(message.request, self.wall + self.now, (body,)))

    def _echo(self, peer: Peer, message: Echo) -> None:
        self._send(peer, Echoed(message.request, message.buffers))

    def _ignore(self, peer: Peer, message: Message) -> None:
        pass

    def _send(self, peer: Peer, message: Message) -> None:
        self._out.append(Send(peer, message))

    def _log(self, level: str, text: str) -> None:
        self._out.append(Log(level, text))

    def check(self) -> None:
        """The invariants; tests call it after every event."""
        live = {life.incarnation for life in self.members}
        assert {key[0] for key in self._parked} <= live
        assert set(self._answered) <= live
        assert not self._filler or self._filler in live
        for job in self.partitions.jobs.values():
            assert {held.incarnation for held in job.leased.values()} <= live
            spans = sorted([(h.epoch, h.start, h.stop) for h in job.leased.values()] + job.returned)
            assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(spans)), "a range is held twice"


_Act = Callable[[Coordinator, Peer, Any], None]

_ACTS: dict[type[Message], _Act] = {
    Join: Coordinator._join,
    Renew: Coordinator._renew,
    Leave: Coordinator._leave,
    Register: Coordinator._request,
    Declare: Coordinator._request,
    Claim: Coordinator._request,
    Complete: Coordinator._request,
    ShardJoin: Coordinator._shard_join,
    Report: Coordinator._report,
    Switch: Coordinator._switch,
    Inquire: Coordinator._inquire,
    Echo: Coordinator._echo,
    Refused: Coordinator._ignore,
}
