"""The coordinator's core: who is here, what is trained, who holds which data (SPEC §3, §4.3, §9). It never touches a tensor.

Rules
- `handle` is the only method that changes anything. A request is answered once; a repeated one gets the same answer.
- What cannot be answered yet is kept, and looked at again after every event that could allow it.
- Every change of the membership is a new epoch, sent to all shards until they report it.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..protocol.asking import Answer as AnswerMessage
from ..protocol.asking import Echo, Echoed, Inquire, Switch
from ..protocol.effects import Effect, Log, Peer, Received, Send, Tick, Unreadable
from ..protocol.errors import ProtocolError
from ..protocol.join import is_name
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
from ..protocol.records import Member
from ..protocol.rounds import Deal, Enlist
from ..protocol.tasking import Host
from .evaluations import KINDS as OF_EVALUATIONS
from .evaluations import Evaluations
from .federation import Federation
from .hosted import Hosted
from .lobby import Lobby
from .members import Life, Members, Refusal, Totals
from .partitions import Answer, Partitions
from .registration import Registration
from .requests import Requests
from .rounds import KINDS
from .settings import Settings
from .shards import Held, Shards
from .status import status
from .switch import Modes, Verdict

RETRY = 1.0
MAX_NAMES = 4096
"""Names of logged values and of counters that are kept."""


@dataclass(frozen=True, slots=True)
class Died:
    """A supervisor on this machine saw the process of the worker of this name end."""

    name: str


class Coordinator:
    """The coordinator.

    Args:
        run: this life, a random 64-bit number.
        wall: seconds since 1970 at `now = 0`.
        below: a uniform number from 0 up to its argument, without it; draws who is in a round.
        peers: public keys of clients by name, where rounds need them.
    """

    def __init__(
        self,
        run: int,
        settings: Settings,
        wall: float = 0.0,
        below: Callable[[int], int] = secrets.randbelow,
        peers: Mapping[str, bytes] | None = None,
    ) -> None:
        self.run, self.settings, self.wall = run, settings, wall
        self.now = 0.0
        self.epoch = 1
        self.members = Members(settings.lease)
        self.shards = Shards(settings.lease, settings.min_shards)
        self.partitions = Partitions()
        self.counters: Counter[str] = Counter()
        self.totals = Totals()
        self.logged: dict[str, float] = {}
        self.opened_at: float | None = None
        """When `min_workers` were here for the first time."""
        self.modes = Modes(settings.mode, settings.staleness, settings.lease)
        self.evaluations = Evaluations()
        least = max(settings.min_workers, settings.recipe.fewest)
        self.federation = Federation(run, settings.recipe, below, least, peers, self.evaluations)
        self._begun = False
        """Has every shard had `min_workers` workers counted in at once?"""
        self.registration = Registration(run)
        self._cluster_epoch = 1
        self._requests = Requests()
        self._lobby = Lobby()
        self._dispatcher = Hosted()
        self._retry_at = 0.0
        self._out: list[Effect] = []

    @property
    def wake_at(self) -> float:
        return min(self._retry_at, self.members.next_expiry, self.federation.wake_at)

    def handle(self, event: Received | Unreadable | Tick | Died, now: float) -> list[Effect]:
        self._out, self.now = [], now
        heard: Message | None = None
        match event:
            case Received(peer, message):
                act = _ACTS.get(type(message))
                if type(message) in KINDS:
                    heard = self._of_a_round(peer, message)
                elif act is None:
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
        self._federate(heard)
        while self.evaluations.news:
            self._log("info", self.evaluations.news.pop(0))
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
        self._change(self.modes.agree(self.shards, self.federation.idle))
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
        if self._choose_filler() or set(self.shards.unfilled) - set(unfilled):
            self._new_epoch(cluster=True)
        self._look_again()

    def _choose_filler(self) -> bool:
        alive = self.members.get(self.registration.filler) is not None
        return self.registration.choose_filler(self.shards, self.members, alive)

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
        model = self.registration.message
        if model and self.registration.lacked_by(held, self.shards) and self.now - held.model_sent_at >= RETRY:
            held.model_sent_at = self.now
            self._send(held.peer, model)
        if held.epoch < self.epoch and (held.epoch >= held.told or self.now - held.told_at >= RETRY):
            held.told, held.told_at = self.epoch, self.now
            self._send(held.peer, view or self._view())

    def _view(self) -> View:
        hold = self.modes.changing or not self.shards.ready
        members = tuple(Member(life.incarnation, life.name, life.registered > 0) for life in self.members)
        return View(self.run, self.epoch, self.modes.phases, hold, self.registration.filler, self._quorum, members)

    @property
    def _quorum(self) -> int:
        """How many must be counted in before the first clock begins. Those who died since all were here are not waited for."""
        if self._begun:
            return 0
        wanted = self.settings.min_workers
        return wanted if self.opened_at is None else min(wanted, len(self.members))

    def _cluster(self, life: Life) -> None:
        fill = self.shards.unfilled if life.incarnation == self.registration.filler else ()
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
        s, phases = self.settings, self.modes.phases
        now = (life.incarnation, self.run, life.number, self.epoch)
        return Welcome(*now, s.lease, phases, s.nonfinite, self.shards.places)

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
        self.evaluations.end(life.incarnation)
        self._requests.end(life.incarnation)
        self.federation.gone(life.incarnation)
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
        self._new_epoch(cluster=self._choose_filler())
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

    def _request(self, peer: Peer, message: Any) -> None:
        life = self._known(peer, message.incarnation)
        if life is None:
            return
        before = self._requests.answer_to((life.incarnation, message.request))
        if before is not None:
            return self._send(peer, before)
        match message:
            case Register() | Claim():
                again = self._requests.park(message)
                if not self._try(message) and (again or isinstance(message, Claim)):
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
            case _:
                self._answer(life, message.request, self.evaluations.handle(message, self.now))

    def _waiting(self, message: Register | Claim) -> Waiting:
        if self.opened_at is None:
            return Waiting(message.request, len(self.members), self.settings.min_workers, "workers")
        if isinstance(message, Claim):
            return Waiting(message.request, 0, 0, "data that others hold")
        filled = sum(held.digest == self.shards.digest and held.filled for held in self.shards)
        return Waiting(message.request, filled, self.shards.fixed, "shards to take in the model and the first weights")

    def _answer(self, life: Life, request: int, answer: Message) -> None:
        self._requests.answered((life.incarnation, request), answer)
        self._send(life.peer, answer)

    def _look_again(self) -> None:
        for message in self._requests.parked():
            self._try(message)

    def _try(self, message: Register | Claim) -> bool:
        """Answer a parked request if it can be answered now."""
        life = self.members.get(message.incarnation)
        assert life is not None
        answer = self._try_register(life, message) if isinstance(message, Register) else self._try_claim(life, message)
        if answer is None:
            return False
        self._answer(life, message.request, answer)
        return True

    def _try_register(self, life: Life, message: Register) -> Message | None:
        try:
            spec = self.registration.read(bytes(message.buffers[0]))
        except ProtocolError as error:
            self.counters["rejected.malformed"] += 1
            return Refused(message.request, "malformed", str(error)[:4096])
        if self.registration.spec is None:
            if not self.shards.ready:
                return None
            layout = self.registration.lay_out(spec, self.shards, self.settings.block_bytes)
            self.federation.laid_out(layout)
            self._log(
                "info",
                f"the model has {len(spec.tensors)} tensors, {spec.total_bytes} bytes, {len(layout.blocks)} blocks",
            )
            for held in self.shards:
                self._inform(held)
        elif spec is not self.registration.spec and (difference := self.registration.spec.difference(spec)):
            text = f"this worker's model is not the one that is being trained: {difference}"
            return Refused(message.request, "mismatch", text[:4096])
        if self.registration.count(life) and self._choose_filler():
            self._new_epoch(cluster=True)
        model = self.registration.message
        if self.opened_at is None or not self.shards.agreed or model is None:
            return None
        if self.shards.unfilled and life.incarnation != self.registration.filler:
            return None
        return Registered(life.incarnation, message.request, model.shards, model.block_bytes, model.digest)

    def _try_claim(self, life: Life, message: Claim) -> Message | None:
        if self.modes.now.mode == "federated":
            return Refused(message.request, "federated", "in federated mode data stay where they are")
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

    # --- federated rounds

    def _enlist(self, peer: Peer, message: Enlist) -> None:
        life = self._known(peer, message.incarnation)
        if life is not None:
            self.federation.enlist(message, life.name)

    def _of_a_round(self, peer: Peer, message: Any) -> Message | None:
        """The message, if it is from somebody who is known by its incarnation."""
        held = self.shards.known(message.incarnation)
        if held is not None:
            held.peer = peer
        else:
            life = self._known(peer, message.incarnation)
            if life is None:
                return None
            if isinstance(message, Deal):  # it fills a shard that is restarted
                life.round = self.federation.rounds.round
        return message  # type: ignore[no-any-return]

    def _federate(self, message: Message | None) -> None:
        for effect in self.federation.turn(message, self.modes, self.shards, self.now):
            if isinstance(effect, Log):
                self._out.append(effect)
                continue
            receiver = self.shards.known(effect.to) or self.members.get(effect.to)
            if receiver is not None:
                self._send(receiver.peer, effect.message)
        self._change(self.modes.agree(self.shards, self.federation.idle))

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
            self._look_again()  # data that somebody waits for are not leased where rounds are made
        for peer, answer in verdict.told:
            self._send(peer, answer)

    def _inquire(self, peer: Peer, message: Inquire) -> None:
        found = self._dispatcher.place(self.now) if message.what == "dispatcher" else status(self)
        body = json.dumps(found, allow_nan=False).encode()
        self._send(peer, AnswerMessage(message.request, self.wall + self.now, (body,)))

    def _host(self, peer: Peer, message: Host) -> None:
        self._dispatcher.heard(message, self.now)

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
        assert self._requests.workers <= live
        assert not self.registration.filler or self.registration.filler in live
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
    **dict.fromkeys(OF_EVALUATIONS, Coordinator._request),
    ShardJoin: Coordinator._shard_join,
    Report: Coordinator._report,
    Switch: Coordinator._switch,
    Enlist: Coordinator._enlist,
    Inquire: Coordinator._inquire,
    Host: Coordinator._host,
    Echo: Coordinator._echo,
    Refused: Coordinator._ignore,
}
