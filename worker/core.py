"""The worker's core: it joins, registers, leases data, and begins a new life when it must (SPEC §3, §4.3, §9). Its parts are the
fleet (the shards) and the desk (requests to the coordinator).

Rules
- `handle` is the only method that changes anything; it never waits, never reads a clock.
- After every event it pursues what is wanted; so any message may be lost, and any event may come at any time. While all is
  settled, a push or a pull pursues itself alone.
- A ticket ends once, with `Resolve` or `Fail`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from math import inf
from typing import Any

from ..protocol.effects import COORDINATOR, Denied, Effect, Linked, Received, Tick, Unlinked, Unreadable
from ..protocol.errors import AuthError, ConfigError, ShapeError, VersionError, WaitTimeout
from ..protocol.join import bracket
from ..protocol.layout import Layout, lay_out
from ..protocol.messages import (
    Ack,
    Claim,
    Cluster,
    Evicted,
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
    Values,
    Waiting,
    Welcome,
)
from ..protocol.model import read_model
from ..protocol.phases import Phases, floor
from ..protocol.records import Place
from ..protocol.schema import Buffer
from . import calls
from .calls import Call
from .desk import ANSWERS, RETRY, Ask, Desk, completion, declaration, value_of
from .failures import evicted_error, lost_error
from .federation import KINDS as OF_ROUNDS
from .federation import Federation
from .fleet import WARN_EVERY, Fleet
from .outgoing import Outgoing
from .stats import Stats

RENEW_AT_LEAST_EVERY = 1.0
JUMP = 2.0
"""A gap between two ticks over this many seconds: this process was stopped."""
LEAST_SERVER_TIMEOUT = 10.0
SILENT = 2.0
"""A server that owes an answer for so long when a wait times out is what the wait was for."""


class Phase(Enum):
    """Where the session is."""

    IDLE = "not connected"
    JOINING = "joining"
    JOINED = "joined"
    CLOSED = "closed"


class Core:
    """One worker.

    Args:
        place: of the coordinator (its index and incarnation do not matter).
        who: name, attempt, host, pid, as in `Join`.
        entropy: gives a random 64-bit number that is not 0.
    """

    def __init__(self, place: Place, who: tuple[str, int, str, int], entropy: Callable[[], int]) -> None:
        self.stats = Stats()
        self.phase = Phase.IDLE
        self.wake_at = inf
        self.welcome: Welcome | None = None
        self.phases: Phases = ()
        self.incarnation = 0
        self.fatal: Exception | None = None
        """Set once nothing can work any more; every later call ends with it."""
        self._out = Outgoing()
        self.fleet = Fleet(self._out, self.stats)
        self.federation = Federation(self._out, self.stats, who[0])
        self._place, self._who, self._entropy = Place(0, 0, place.host, place.port, place.key), who, entropy
        self._now = self._ticked_at = 0.0
        self._description = b""
        self._source: Callable[[int], Buffer] = lambda block: b""
        self._registering = 0
        self._desk = Desk()
        self._waiting: Waiting | None = None
        self._openers: list[int] = []
        self._leaving = 0
        self._run = 0
        self._declared: dict[str, calls.DeclareCalled] = {}
        """Data sets by name, each with the oldest epoch that was unfinished when last heard of."""
        self._done: list[tuple[dict[int, tuple[int, int]], calls.DoneCalled]] = []
        self._progress: dict[int, int] = {}
        self._logged: dict[str, float] = {}
        self._epoch = 0
        self._join_at = self._renew_at = self._warn_at = self._began_at = -inf
        self._lease = 0.0
        self._linked_to_coordinator = False
        self._heard_at = 0.0
        self._owed_since: float | None = None
        self._baseline = self._confirmed = self._snapshot = Stats()
        self._settled = False
        """Is there nothing to pursue but pushes and pulls?"""

    def handle(
        self, event: Call | Received | Tick | Linked | Unlinked | Denied | Unreadable, now: float
    ) -> list[Effect]:
        self._now = now
        self._forgive_a_stop()
        kind: type[Any] = type(event)
        if isinstance(event, Received):
            kind = type(event.message)
            if self.phase is not Phase.CLOSED:
                self._received(event.peer, event.message)  # type: ignore[arg-type]
        else:
            self._happened(event)
        if self.phase is Phase.CLOSED:
            self.wake_at = inf
        elif self._settled and kind in _FLOWING:
            self.fleet.flow(now)
            self.wake_at = min(self.wake_at, now + RETRY / 2)
        elif kind is not calls.LogCalled:  # it travels with the next renewal
            self._pursue()
        return self._out.take()

    def _happened(self, event: Call | Tick | Linked | Unlinked | Denied | Unreadable) -> None:
        """Anything but a message."""
        if type(event) in _CALLS:
            return self._called(event)  # type: ignore[arg-type]
        match event:
            case Linked() | Unlinked() | Denied() if self.phase is Phase.CLOSED:
                pass
            case Linked(peer):
                self._on_linked(peer)
            case Unlinked(peer):
                if peer == COORDINATOR:
                    self._linked_to_coordinator = False
                else:
                    self.fleet.unlinked(peer)
            case Denied(peer, why):
                self._fail_session(
                    AuthError(f"the server at {self._where(peer)} was reached, but {why}", hint="shoal doctor")
                )
            case Tick() | Unreadable():
                pass
            case _:
                self._called(event)

    # --- what users' threads ask

    def _called(self, call: Call) -> None:
        ticket: int = getattr(call, "ticket", 0)
        if self.fatal is not None and ticket and not isinstance(call, calls.CloseCalled | calls.Cancelled):
            return self._out.fail(ticket, self.fatal)
        act = _CALLS.get(type(call))
        if act is None:
            return self.federation.called(call)
        act(self, call)

    def _open(self, call: calls.OpenCalled) -> None:
        self._openers.append(call.ticket)
        if self.phase is Phase.IDLE:
            self._out.open(Place(COORDINATOR, 0, self._place.host, self._place.port, self._place.key))
            self._begin()

    def _register(self, call: calls.RegisterCalled) -> None:
        if self._description and call.description != self._description:
            wrong = read_model(self._description).difference(read_model(call.description))
            return self._out.fail(call.ticket, ConfigError(f"this worker has registered another model before: {wrong}"))
        self._description, self._source = call.description, call.source
        self.fleet.active = True
        self.fleet.enterers.append(call.ticket)

    def _push(self, call: calls.PushCalled) -> None:
        if self.fleet.running:
            return self.fleet.push(call)
        self.stats.lost += 1
        self._out.fail(call.ticket, evicted_error())

    def _early(self, call: calls.EarlyCalled) -> None:
        self.fleet.early(call)

    def _pull(self, call: calls.PullCalled) -> None:
        self.fleet.pull(call, self._now)

    def _share(self, call: calls.ShareCalled) -> None:
        self.fleet.offers.share(call)

    def _unshare(self, call: calls.UnshareCalled) -> None:
        self.fleet.offers.unshare(self.incarnation, call.region, list(self.fleet.links.values()))

    def _pause(self, _: calls.PauseCalled) -> None:
        self.fleet.pause()

    def _resume(self, call: calls.ResumeCalled) -> None:
        self.fleet.active = True
        self.fleet.enterers.append(call.ticket)

    def _declare(self, call: calls.DeclareCalled) -> None:
        self._declared[call.job] = call
        self._desk.add(declaration(call, call.ticket))

    def _declare_again(self) -> None:
        """The coordinator does not know our data sets: it was restarted."""
        for call in self._declared.values():
            self._desk.add_first(declaration(call, 0))

    def _claim(self, call: calls.ClaimCalled) -> None:
        def make(incarnation: int, request: int) -> Message:
            return Claim(incarnation, request, call.job, call.epochs)

        self._desk.add(Ask(call.ticket, make, lasting=True, idle=True, job=call.job))

    def _ask(self, call: calls.AskCalled) -> None:
        self._desk.add(Ask(call.ticket, call.make, lasting=True))

    def _processed(self, call: calls.DoneCalled) -> None:
        if call.lease.incarnation == self.incarnation:
            self._done.append((self.fleet.marks(), call))

    def _log(self, call: calls.LogCalled) -> None:
        self._logged.update(call.values)

    def _close(self, call: calls.CloseCalled) -> None:
        if self.phase is not Phase.JOINED:
            self.phase = Phase.CLOSED
            return self._out.resolve(call.ticket, None)
        self._leaving = call.ticket
        self._desk.add(Ask(call.ticket, lambda inc, request: Leave(inc, request, *self._news()), lasting=False))

    def _cancelled(self, call: calls.Cancelled) -> None:
        self.fleet.cancel(call.ticket)
        self.federation.cancel(call.ticket)
        self._desk.drop(call.ticket)
        if call.ticket in self._openers:
            self._openers.remove(call.ticket)

    # --- what the network says

    def _on_linked(self, peer: int) -> None:
        if peer == COORDINATOR:
            self._linked_to_coordinator = True
            self._join_at = self._renew_at = -inf
            self._desk.hurry()
        else:
            self.fleet.linked(peer, self._now)
        self.federation.linked(peer)

    def _received(self, peer: int, message: Message) -> None:
        if peer == COORDINATOR:
            self._heard_at, self._owed_since = self._now, None
        if isinstance(message, Refused):
            return self._refused(peer, message)
        if isinstance(message, Waiting):
            return self._told_to_wait(message)
        if getattr(message, "incarnation", 0) != self.incarnation:
            return  # an earlier life's, or no business of a worker
        if isinstance(message, Evicted):
            return self._evicted()
        if type(message) in OF_ROUNDS:
            return self.federation.received(peer, message)
        if peer != COORDINATOR:
            return self.fleet.received(peer, message, self._now)
        match message:
            case Welcome() if self.phase is Phase.JOINING:
                if self._run not in (0, message.run):
                    self._declare_again()
                self._run, self._lease = message.run, message.lease
                self.phase, self.welcome, self._epoch = Phase.JOINED, message, message.epoch
                self._renew_at, self._waiting = self._now + self._renew_every, None
                self._check_keys(message.shards)
                self.fleet.joined(message.run, message.epoch, message.shards, self._now)
                self._know(message)
            case Renewed():
                self._confirmed = self._snapshot
            case Cluster() if message.epoch >= self._epoch and self.phase is Phase.JOINED:
                self._epoch = message.epoch
                self._check_keys(message.shards)
                self.fleet.place(message.shards, self._now)
                self._know(message)
                self.fleet.fill(message.fill, message.epoch)
            case _ if type(message) in ANSWERS:
                self._answered(message)

    def _know(self, message: Welcome | Cluster) -> None:
        """How the cluster is now."""
        self.phases = message.phases
        self.fleet.floor = floor(message.phases)
        self.federation.place(tuple(place.incarnation for place in sorted(message.shards, key=lambda each: each.index)))

    @property
    def federated(self) -> bool:
        """Is this worker's next step a federated round? One that is counted in goes on to the clock where they begin."""
        newest = self.phases[-1] if self.phases else None
        if newest is None or newest.mode != "federated":
            return False
        return not self.fleet.running or self.stats.clock >= newest.clock

    def _check_keys(self, places: Iterable[Place]) -> None:
        """Where the coordinator has keys, every shard has (SPEC §10.3): nothing is sent in the clear because somebody said so."""
        bare = next((place for place in places if self._place.key and not place.key), None)
        if bare is not None:
            where = f"{bracket(bare.host)}:{bare.port}"
            self._fail_session(
                AuthError(f"shard {bare.index} at {where} has no key, while the cluster has", hint="shoal status")
            )

    def _told_to_wait(self, message: Waiting) -> None:
        ask = self._desk.get(message.request)
        if ask is None and not (message.request == 0 and self.phase is Phase.JOINING):
            return
        self._waiting = message
        if ask is not None and ask.idle and not message.wanted:
            self.fleet.pause()  # no data for now: hold nobody up (SPEC §7)

    def _refused(self, peer: int, message: Refused) -> None:
        if message.code == "version":
            text = f"{self._where(peer)} speaks another version of the protocol: {message.text}"
            return self._fail_session(VersionError(text, hint="install the same shoal on both sides"))
        if self.federation.concerns(message):
            return self.federation.received(peer, message)
        if peer != COORDINATOR:
            return self.fleet.refused_pull(peer, message.request, message.text)
        if message.request == 0:
            if message.code == "name" and self.stats.evictions and self._now - self._began_at < 2 * self._lease:
                return  # our own last life, whose last words are still under way; its lease will end
            if self.phase is Phase.JOINING:
                text = f"the server refused this worker: {message.text}"
                self._fail_session(ConfigError(text, hint="give it another name, or none"))
            return
        ask = self._desk.answered(message.request)
        if ask is None:
            return
        if message.code == "federated":
            return self._out.resolve(ask.ticket, calls.Federated())
        if message.code == "undeclared" and ask.job in self._declared:
            ask.sent_at = -inf
            self._desk.add(ask)
            return self._declare_again()
        error = ShapeError(message.text) if message.code == "mismatch" else ConfigError(message.text)
        if message.request == self._registering:
            self._registering, self._description, self.fleet.active = 0, b"", False
            self._out.fail_all(self.fleet.enterers, error)
        self._out.fail(ask.ticket, error)

    def _left(self) -> None:
        self.phase = Phase.CLOSED
        self._out.resolve(self._leaving, None)

    def _evicted(self) -> None:
        if self._leaving:  # the goodbye was heard, its answer is under way
            return self._left()
        self._out.note(
            "warning",
            "this worker was declared dead (it was silent for its lease); it joins again as a new incarnation",
        )
        self.stats.evictions += 1
        self._baseline = self._confirmed
        self._begin()

    def _answered(self, message: Any) -> None:
        ask = self._desk.answered(message.request)
        if ask is None:
            return
        self.stats.retries += max(0, ask.sent - 1)
        self._waiting = None
        match message:
            case Registered():
                self._registered(message)
            case Leased():
                self._declared[ask.job] = replace(self._declared[ask.job], epoch=message.oldest)
                lease = calls.Lease(self.incarnation, message.lease, message.epoch, message.start, message.stop)
                self._out.resolve(ask.ticket, lease)
            case Left():
                self._left()
            case _:
                self._out.resolve(ask.ticket, value_of(message))

    def _registered(self, message: Registered) -> None:
        self._registering = 0
        layout = self.fleet.layout
        if layout is None or (layout.shards, layout.block_bytes) != (message.shards, message.block_bytes):
            layout = lay_out(read_model(self._description), message.shards, message.block_bytes)
        if layout.digest != message.digest:
            error = VersionError(
                "this worker computes another layout than the coordinator", hint="install the same shoal on both sides"
            )
            return self._fail_session(error)
        self.fleet.has_layout(layout, self._source)
        self.federation.has_layout(layout)

    # --- pursuing what is wanted

    def _begin(self) -> None:
        """A new incarnation joins."""
        self.incarnation, self._began_at = self._entropy(), self._now
        self.phase, self.welcome, self._registering = Phase.JOINING, None, 0
        self.fleet.begin(self.incarnation, evicted_error())
        self.federation.begin(self.incarnation)
        self._desk.carry_over()
        self._done.clear()
        self._progress.clear()
        self._join_at = -inf

    def _pursue(self) -> None:
        now = self._now
        if self.phase is Phase.JOINING and now >= self._join_at:
            self._join_at = now + RETRY
            self._out.send(COORDINATOR, Join(self.incarnation, *self._who))
        if self.phase is Phase.JOINED:
            self._want_registration()
            self._report_done()
            for message in self._desk.due(self.incarnation, now):
                self._out.send(COORDINATOR, message)
            if now >= self._renew_at:
                self._renew_at = now + self._renew_every
                self._snapshot = self.stats.copy()
                renew = Renew(self.incarnation, self._epoch, self.stats.clock, self.fleet.running, *self._news())
                self._out.send(COORDINATOR, renew)
            self.fleet.pursue(now)
            self.federation.pursue(self.federated, now)
            if self._openers and self.fleet.greeted:
                self._out.resolve_all(self._openers, None)
            self.fleet.watch(now, self.server_timeout)
        self._watch_coordinator()
        asking = bool(self.phase is Phase.JOINING or len(self._desk) or self._done or self._openers)
        self._settled = not asking and self.phase is Phase.JOINED and self.fleet.settled
        soonest = now + RETRY / 2 if asking or self.fleet.busy else inf
        parts = min(self._renew_at, self.fleet.cutter.wake_at, self.federation.wake_at)
        self.wake_at = min(soonest, parts if self.phase is Phase.JOINED else inf)

    def _want_registration(self) -> None:
        if self._description and not self.fleet.registered and not self._registering:
            description = self._description
            self._registering = self._desk.add(
                Ask(0, lambda inc, request: Register(inc, request, (description,)), lasting=False)
            )

    def _news(self) -> tuple[Any, Any, Any]:
        """The last three fields of `Renew` and `Leave`."""
        return self.stats.numbers(self._baseline), tuple(self._logged.items()), tuple(self._progress.items())

    @property
    def _renew_every(self) -> float:
        return min(self.welcome.lease / 3, RENEW_AT_LEAST_EVERY) if self.welcome else RENEW_AT_LEAST_EVERY

    def _report_done(self) -> None:
        """Tell of data whose every update is acknowledged (SPEC §9.4)."""
        while self._done and self.fleet.passed(self._done[0][0]):
            _, call = self._done.pop(0)
            lease = call.lease.number
            self._progress[lease] = call.done
            if call.over:
                del self._progress[lease]
                self._desk.add(completion(lease, call.done))

    # --- silence and failure

    @property
    def server_timeout(self) -> float:
        """Seconds after which a silent server is lost."""
        return max(self.welcome.lease if self.welcome else 0.0, LEAST_SERVER_TIMEOUT)

    def _forgive_a_stop(self) -> None:
        gap = self._now - self._ticked_at
        if (
            gap > JUMP and self.wake_at < self._now - JUMP / 2
        ):  # a tick was due long ago: we were stopped, and nobody else
            for link in self.fleet.links.values():
                link.forgive(gap)
            self._heard_at += gap
            if self._owed_since is not None:
                self._owed_since += gap
        self._ticked_at = self._now

    def _watch_coordinator(self) -> None:
        if self._waiting is not None and self._now >= self._warn_at:
            self._warn_at = self._now + WARN_EVERY
            self._out.note("info", self.why_waiting())
        rejoining = self.phase is Phase.JOINING and not self._openers
        if not len(self._desk) and not rejoining and not self.federation.waiting:
            self._owed_since = None
            return
        if self._owed_since is None:
            self._owed_since = self._now
        if self._now - self._owed_since >= self.server_timeout:
            self._owed_since = None
            error = lost_error("the coordinator", self._where(COORDINATOR), self._now - self._heard_at)
            for ticket in self._desk.tickets():
                self._desk.drop(ticket)
                self._out.fail(ticket, error)
            self.federation.fail(error)
            if rejoining or self._registering:
                self.fleet.fail_everybody(error)

    def timed_out(self, seconds: float, now: float) -> Exception:
        """The error for a wait that has ended at its time-out: a server may be silent, or all is well and slow."""
        link = self.fleet.silent(now, SILENT)
        if link is not None:
            return lost_error(f"shard {link.place.index}", link.address, now - link.heard_at)
        if self._owed_since is not None and now - self._owed_since >= SILENT and self.phase is Phase.JOINED:
            return lost_error("the coordinator", self._where(COORDINATOR), now - self._heard_at)
        return WaitTimeout(
            f"not done after {seconds:g} s: {self.why_waiting()}",
            hint="a longer timeout, or `shoal status` to see who is slow",
        )

    def _fail_session(self, error: Exception) -> None:
        """Nothing can work any more: everybody who waits is told, and whoever calls later."""
        self.fatal = error
        self.phase = Phase.CLOSED
        self._out.fail_all(self._openers, error)
        for ticket in self._desk.tickets():
            self._desk.drop(ticket)
            self._out.fail(ticket, error)
        self.federation.fail(error)
        self.fleet.fail_everybody(error)

    def why_waiting(self) -> str:
        """What this worker waits for, in words."""
        if self._waiting is not None:
            count = f": {self._waiting.joined} of {self._waiting.wanted} are here" if self._waiting.wanted else ""
            return f"waiting for {self._waiting.what}{count}"
        if self.phase is Phase.JOINING:
            state = "is connected but does not answer" if self._linked_to_coordinator else "cannot be reached"
            return f"the coordinator at {self._where(COORDINATOR)} {state}"
        rounds = self.federation.why_waiting() if self.federation.waiting else ""
        return self.fleet.why_waiting() or rounds or "the servers answer"

    def _where(self, peer: int) -> str:
        if peer == COORDINATOR:
            return f"{bracket(self._place.host)}:{self._place.port}"
        return self.fleet.links[peer].address if peer in self.fleet.links else "?"

    @property
    def layout(self) -> Layout | None:
        return self.fleet.layout


_FLOWING = frozenset({calls.EarlyCalled, calls.PushCalled, calls.PullCalled, Ack, Values})
"""What pushes and pulls are made of."""

_CALLS: dict[type[Call], Callable[[Core, Any], None]] = {
    calls.OpenCalled: Core._open,
    calls.RegisterCalled: Core._register,
    calls.ShareCalled: Core._share,
    calls.UnshareCalled: Core._unshare,
    calls.EarlyCalled: Core._early,
    calls.PushCalled: Core._push,
    calls.PullCalled: Core._pull,
    **dict.fromkeys((calls.CutCalled, calls.CutReleased), lambda core, call: core.fleet.cutter.called(call)),
    calls.PauseCalled: Core._pause,
    calls.ResumeCalled: Core._resume,
    calls.DeclareCalled: Core._declare,
    calls.ClaimCalled: Core._claim,
    calls.DoneCalled: Core._processed,
    calls.AskCalled: Core._ask,
    calls.LogCalled: Core._log,
    calls.CloseCalled: Core._close,
    calls.Cancelled: Core._cancelled,
}
