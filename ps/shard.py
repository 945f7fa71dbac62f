"""The shard's core: who may push and pull what, and when (SPEC §3.2, §5, §6). Its parts are clocks, inboxes and the store.

Rules
- `handle` is the only method that changes anything; it never waits, never reads a clock.
- A pull is answered in the same `handle` that makes it answerable; nobody is asked to come back.
- A peer's mistake is counted and refused, never raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..protocol.asking import Answer, Echo, Echoed, Inquire
from ..protocol.effects import (
    COORDINATOR,
    Attached,
    Effect,
    Linked,
    Log,
    Peer,
    Received,
    Send,
    Stream,
    Tick,
    Unreadable,
)
from ..protocol.errors import ProtocolError
from ..protocol.frames import payload_bytes
from ..protocol.layout import lay_out
from ..protocol.messages import (
    Ack,
    Enter,
    Evicted,
    Fill,
    Greeting,
    Hello,
    Message,
    Model,
    Operation,
    Pause,
    Probe,
    Pull,
    Push,
    Refused,
    ShardJoin,
    ShardWelcome,
    Share,
    Start,
    Stranger,
    Unshare,
    View,
    Waiting,
)
from ..protocol.model import read_model
from ..protocol.phases import Phases, at, needed, opens
from .accumulator import KINDS, Accumulator, Apply
from .answers import in_buffers
from .clocks import Clocks
from .cuts import FROM_WORKERS, Cuts
from .early import Early
from .inbox import Inbox, Verdict
from .roster import Roster
from .shard_status import alive, answer, report
from .shared import SharedMemory
from .store import Misfit
from .weights import Weights

RETRY = 1.0
REPORT_EVERY = 1.0
MAX_PARKED = 64
"""Pulls of one worker that may wait at once."""


class Shard:
    """One shard.

    Args:
        incarnation: this life, a random 64-bit number.
        host, port, key: where workers reach it; `key` is its CURVE public key in base64url, or empty.
        wall: seconds since 1970 at `now = 0`.
    """

    def __init__(self, incarnation: int, host: str, port: int, key: str = "", wall: float = 0.0) -> None:
        self.incarnation = incarnation
        self.counters: Counter[str] = Counter()
        self.accumulator: Accumulator | None = None
        """Of federated rounds, once there is a layout."""
        self._wake_at = 0.0
        self._place = (host, port, key)
        self._wall, self._now = wall, 0.0
        self.run = self.epoch = 0
        self.index = -1
        self._shards = 0
        self._welcomed = False
        self._view: View | None = None
        self.roster = Roster()
        self.weights: Weights | None = None
        self.clocks = Clocks()
        self._entered: set[int] = set()
        """Those in the view who were counted in here at least once."""
        self._unheard: set[int] = set()
        """Those of the first view who may run on elsewhere and have not said so here yet."""
        self.opened = False
        """Has the first clock begun?"""
        self.open_step = 0
        self.phases: Phases = ()
        self.held_at: int | None = None
        """From this clock on no step is applied, while the next phase is agreed on (SPEC §6.5)."""
        self._inboxes: dict[int, Inbox] = {}
        self.routes: dict[int, Peer] = {}
        self._pulls: dict[int, dict[int, Pull]] = {}
        self._shared = SharedMemory()
        self._early = Early()
        self.cuts = Cuts(self)
        self._out: list[Effect] = []

    def handle(self, event: Received | Unreadable | Tick | Linked | Attached, now: float) -> list[Effect]:
        self._out, self._now = [], now
        match event:
            case Received():
                self._received(event)
            case Unreadable(peer, reason):
                self.counters[f"rejected.{reason}"] += 1
                if reason == "version":
                    self._send(peer, Refused(0, "version", "this shard speaks version 1 of the protocol"))
            case Linked():
                self._join()
            case Attached():
                known = event.offer.incarnation in self._inboxes
                self._out.append(self._shared.attached(event, self.incarnation, known))
            case Tick() if self.accumulator is not None:
                self._sum(event)
        if self.cuts.due(now):
            self._out += self.cuts.turn(now)
            self._settle()
        if now >= self._wake_at:
            self._wake_at = now + (REPORT_EVERY if self._welcomed else RETRY)
            self._report() if self._welcomed else self._join()
        return self._out

    def _received(self, event: Received) -> None:
        peer, message = event.peer, event.message
        act = (_FROM_COORDINATOR if peer == COORDINATOR else _FROM_WORKERS).get(type(message))
        if act is not None:
            act(self, peer, message)
        elif type(message) in KINDS and self.accumulator is not None:
            self._sum(event)
        else:
            self.counters["rejected.misplaced"] += 1

    @property
    def wake_at(self) -> float:
        return min(self._wake_at, self.cuts.wake_at, *(each.wake_at for each in (self.accumulator,) if each))

    # --- the coordinator's side

    def _join(self) -> None:
        digest = self.weights.layout.digest if self.weights else ""
        who, decided = (self.incarnation, *self._place), self.phases if self.filled else ()
        self._send(COORDINATOR, ShardJoin(*who, self.index, self._shards, digest, decided))

    def _welcome(self, _: Peer, message: ShardWelcome) -> None:
        if message.incarnation != self.incarnation:
            return
        if message.run != self.run:
            self.run, self.epoch = message.run, 0
        if message.index != self.index:
            self.weights = self.accumulator = None
            self.cuts.forget(kept=True)
        self.index, self._welcomed = message.index, True
        self._report()

    def _forgotten(self, _: Peer, message: Evicted) -> None:
        """The coordinator does not know this shard: it was restarted, or we were silent for too long."""
        self._welcomed = False
        self._join()

    def _model(self, _: Peer, message: Model) -> None:
        if message.run != self.run or (self.weights and self.weights.layout.digest == message.digest):
            return self._report()
        try:
            layout = lay_out(read_model(message.buffers[0]), message.shards, message.block_bytes)
        except (ProtocolError, ValueError) as error:
            self.counters["rejected.malformed"] += 1
            return self._log("error", f"the coordinator sent a model that cannot be read: {error}")
        if layout.digest != message.digest or not 0 <= self.index < layout.shards:
            self._log(
                "error", "this shard computes another layout than the coordinator; are the versions of shoal the same?"
            )
            return
        self.weights, self._shards = Weights(layout, self.index), layout.shards
        self.accumulator = Accumulator(self.incarnation, self.weights.elements, self.weights.digest)
        self.cuts.forget(kept=True)
        self._settle()
        self._report()

    @property
    def filled(self) -> bool:
        return self.weights is not None and self.weights.filled

    def _new_view(self, _: Peer, view: View) -> None:
        if view.run != self.run or view.epoch <= self.epoch or not view.phases:
            return self._report()
        first, before = self._view is None, self._view
        self._view, self.epoch = view, view.epoch
        if not self.phases or view.phases[-1].clock > self.phases[-1].clock or not self.filled:
            self.phases = view.phases  # else a restarted coordinator hears of ours when we join it
        if view.held != (self.held_at is not None):
            self.held_at = self.clocks.highest if view.held else None
        self.roster.update(view.members)
        for gone in [known for known in {*self._inboxes, *dict(self.clocks.items())} if known not in self.roster]:
            self._drop(gone)
        if first:  # a restarted shard: some may be counted in elsewhere, nobody knows at which clock (SPEC §6.1.5)
            self._unheard = {member.incarnation for member in view.members if member.registered}
        self._unheard.intersection_update(self.roster)
        if self.weights and not self.filled and (before is None or before.filler != view.filler):
            self.weights.restart_filling()
        self._open()
        for peer, incarnation in self._early.admit(view):
            self._greet(peer, incarnation)
        self._settle()
        self._report()

    def _open(self) -> None:
        """The first clock begins when a quorum is counted in, and everybody has been heard (SPEC §6.1.4, §6.1.5)."""
        if self.opened or self._unheard or self._view is None:
            return
        if len(self._entered) >= self._view.quorum:
            self.opened = True
            self.clocks.release()
            self._report()

    def _drop(self, incarnation: int) -> None:
        for held in (self._inboxes, self._pulls, self.routes):
            held.pop(incarnation, None)
        self._shared.drop(incarnation)
        self.cuts.drop(incarnation)
        if self.weights:
            self.weights.leave(incarnation)
        self._entered.discard(incarnation)
        self.clocks.leave(incarnation)

    def _report(self) -> None:
        if self._welcomed:
            self._send(COORDINATOR, report(self))

    # --- getting to know a worker

    def _hello(self, peer: Peer, message: Hello) -> None:
        newer = message.run != self.run or message.epoch > self.epoch  # epochs of two runs say nothing of each other
        if newer and message.incarnation not in self.roster:
            return self._early.wait(peer, message)
        self._greet(peer, message.incarnation)

    def _greet(self, peer: Peer, incarnation: int) -> None:
        if incarnation not in self.roster:
            return self._send(peer, Evicted(incarnation))
        self._inboxes.setdefault(incarnation, Inbox())
        self.routes.setdefault(incarnation, peer)
        self._send(peer, Greeting(incarnation, self.incarnation, max(self.index, 0)))

    def _known(self, peer: Peer, incarnation: int, shard: int) -> Inbox | None:
        """The worker's inbox; if it has none here, it is told why (SPEC §3.2)."""
        inbox = self._inboxes.get(incarnation)
        if inbox is not None and shard == self.incarnation:
            self.routes[incarnation] = peer
            return inbox
        if self._view is not None and incarnation not in self.roster:
            self.counters["evicted"] += 1
            self._send(peer, Evicted(incarnation))
        else:
            self._send(peer, Stranger(incarnation, self.incarnation))
        return None

    # --- the stream (SPEC §5)

    def _operation(self, peer: Peer, operation: Operation) -> None:
        incarnation = operation.incarnation
        inbox = self._known(peer, incarnation, operation.shard)
        if inbox is None:
            return
        verdict = inbox.take(operation)
        if verdict is Verdict.QUEUED:
            self.counters["bytes_in"] += payload_bytes(operation)
            before = (self.clocks.min, self.filled, self.opened)  # nothing else of a worker's concerns another's
            self._drain(incarnation, inbox)
            if before != (self.clocks.min, self.filled, self.opened):
                self._settle()
            else:
                self._answer(incarnation)
        else:
            self.counters[f"stream.{verdict.value}"] += 1
        self._ack(incarnation, gap=verdict is Verdict.GAP)

    def _ack(self, incarnation: int, gap: bool = False) -> None:
        inbox = self._inboxes[incarnation]
        self._send(
            self.routes[incarnation],
            Ack(incarnation, self.incarnation, inbox.applied, gap, self.clocks.min, tuple(inbox.refusals)),
        )

    def _drain(self, incarnation: int, inbox: Inbox) -> bool:
        """Apply what can be applied. True if anything was."""
        before = inbox.applied
        while (operation := inbox.head) is not None:
            if self._must_wait(operation):
                break
            refusal = None
            try:
                self._apply(operation)
            except Misfit as misfit:
                refusal = (misfit.code, str(misfit)[:256])
            except Exception as error:  # a fault of ours or of torch's must not take everybody's weights with it
                self._log("error", f"applying {type(operation).__name__} failed: {type(error).__name__}: {error}")
                refusal = ("internal", f"{type(error).__name__}: {error}"[:256])
            if refusal:
                self.counters[f"refused.{refusal[0]}"] += 1
            inbox.applied_head(refusal)
            self.cuts.applied(operation, isinstance(operation, Push) and not self._keeps(operation))
        return inbox.applied > before

    def _must_wait(self, operation: Operation) -> bool:
        """A filling waits for the model and the view that asks for it; in sync mode a push of a later step waits for its step."""
        match operation:
            case Push():
                clock = operation.clock
                if (self.held_at is not None and clock >= self.held_at) or self.cuts.must_wait(operation):
                    return True
                first = clock if self._sync(clock) else opens(self.phases, clock)
                return self.open_step < first and operation.incarnation in self.clocks
            case Fill():
                return self.weights is None or operation.epoch > self.epoch
            case _:
                return False

    def _sync(self, clock: int) -> bool:
        """Are steps of this clock averaged?"""
        return bool(self.phases) and at(self.phases, clock).mode == "sync"

    def _apply(self, operation: Operation) -> None:
        match operation:
            case Push():
                self._push(operation)
            case Enter(incarnation):
                self.clocks.enter(incarnation, reached=operation.clock)
                self._counted_in(incarnation)
            case Start(incarnation):
                if incarnation not in self.clocks:
                    self.clocks.enter(incarnation, operation.clock)
                self.clocks.reach(incarnation, operation.clock)
                self._counted_in(incarnation)
            case Pause(incarnation):
                self.clocks.leave(incarnation, operation.clock)
                self._counted_in(incarnation)  # once it was, here or at an earlier life of this shard
                if self.weights:
                    self.weights.leave(incarnation)
            case Fill():
                self._fill(operation)

    def _counted_in(self, incarnation: int) -> None:
        self._entered.add(incarnation)
        self._unheard.discard(incarnation)
        self._open()

    def _fill(self, fill: Fill) -> None:
        if self.weights is None:
            raise Misfit("unfilled", "no model is registered")
        if self.weights.filled or self._view is None or fill.incarnation != self._view.filler:
            return
        self.weights.fill(fill)
        if self.weights.filled:
            self._report()

    def _push(self, push: Push) -> None:
        clock = self.clocks.get(push.incarnation)
        try:
            if push.blocks:
                self._gradients(push, clock)
            elif self.weights is not None:
                self.weights.check(push)
            if push.advance and clock == push.clock and self.weights is not None and not self._sync(clock):
                self.weights.apply_held(push, len(self.clocks))
        except Exception:
            if self.weights is not None and clock == push.clock and (self._sync(push.clock) or push.held):
                self.weights.spoil(push.incarnation)
            raise
        finally:  # a refused gradient must not hold the worker's clock, and with it everybody
            if push.advance and clock == push.clock:
                if self.weights is not None and self._sync(push.clock):
                    self.weights.contribute(push, self.roster.rank(push.incarnation))
                elif self.weights is not None:
                    self.weights.drop(push.incarnation)
                self.clocks.reach(push.incarnation, push.clock + 1)

    def _gradients(self, push: Push, clock: int | None) -> None:
        if self.weights is None:
            raise Misfit("unfilled", "no model is registered")
        kept = self._keeps(push)
        buffers = None
        if push.region:  # what is kept is copied: the region is its worker's again
            buffers = self._shared.brought_in(push, self.weights, copy=kept)
            self.counters["bytes_shared_in"] += sum(map(len, buffers))
        if not kept:
            self.weights.apply(push, len(self.clocks), buffers=buffers)
        elif clock == push.clock:
            self.weights.collect(push if buffers is None else replace(push, buffers=buffers))
        else:
            raise Misfit("clock", f"a push of step {push.clock} from a worker at {clock}")

    def _keeps(self, push: Push) -> bool:
        """Is it kept for longer than the push lasts, until its step ends?"""
        return self._sync(push.clock) or (push.held and not push.advance)

    # --- federated rounds (SPEC §14)

    def _sum(self, event: Received | Tick) -> None:
        assert self.accumulator is not None and self.weights is not None
        for effect in self.accumulator.handle(event, self._now):
            if isinstance(effect, Apply):
                self.cuts.forget()
                self.weights.federate(effect.update, effect.rule)
            else:
                self._out.append(effect)

    def _cut(self, peer: Peer, message: Any) -> None:
        if self._known(peer, message.incarnation, message.shard) is not None:
            self.cuts.received(peer, message, self._now)
            self._settle()  # what it waits for may be here

    # --- pulls (SPEC §6.2, §6.4)

    def _settle(self) -> None:
        """The least clock, the members or the filling have changed: do what that allows."""
        moved = True
        while moved:
            if self.open_step < self.clocks.min:
                averaged, self.open_step = self._sync(self.open_step), self.clocks.min
                if averaged and self.weights is not None:
                    self._close_step(self.weights)
            moved = False
            for incarnation, inbox in self._inboxes.items():
                if len(inbox) and self._drain(incarnation, inbox):
                    moved = True
                    self._ack(incarnation)
        for incarnation in list(self._pulls):
            self._answer(incarnation)

    def _close_step(self, weights: Weights) -> None:
        try:
            weights.close_step()
        except Exception as error:  # as in `_drain`: the step is lost, the weights are not
            self.counters["refused.internal"] += 1
            self._log("error", f"averaging a step failed: {type(error).__name__}: {error}")

    def _pull(self, peer: Peer, pull: Pull) -> None:
        if self._known(peer, pull.incarnation, pull.shard) is None:
            return
        self.counters["pulls"] += 1
        parked = self._pulls.setdefault(pull.incarnation, {})
        if len(parked) >= MAX_PARKED and pull.request not in parked:
            return self._send(peer, Refused(pull.request, "busy", f"{MAX_PARKED} pulls of this worker are waiting"))
        parked[pull.request] = pull
        self._answer(pull.incarnation)
        if pull.request in self._pulls.get(pull.incarnation, ()):
            self.counters["parked"] += 1

    def _answer(self, incarnation: int) -> None:
        parked = self._pulls.get(incarnation)
        if not parked or not self.filled or not self.opened:
            return
        for request, pull in list(parked.items()):
            if self._inboxes[incarnation].applied >= pull.after and self._within(incarnation, pull.clock):
                del parked[request]
                self._values(pull)
        if not parked:
            del self._pulls[incarnation]

    def _within(self, incarnation: int, clock: int) -> bool:
        """The staleness rule: a reader who is not counted in waits for averages alone."""
        if self.held_at is not None and clock > self.held_at:
            return False  # it has heard of a phase that is not known here
        bound = needed if incarnation in self.clocks or self._sync(clock) else opens
        return self.clocks.min >= bound(self.phases, clock)

    def _values(self, pull: Pull) -> None:
        assert self.weights is not None
        store, peer = self.weights.store, self.routes[pull.incarnation]
        if any(block not in store for block in pull.blocks):
            self.counters["rejected.malformed"] += 1
            return self._send(peer, Refused(pull.request, "shape", "a block that is not on this shard"))
        shown = self._shared.answer(pull, self.incarnation, self.weights, self.clocks.min)
        if not self._sync(pull.clock) and pull.incarnation in self.clocks:
            self.weights.read(pull.incarnation, pull.blocks, shown.version if shown else store.version)
        if shown:
            return self._send(peer, shown)
        self._out.append(Stream(peer, in_buffers(pull, self.incarnation, store, self.clocks.min, self.counters)))

    # --- sharing memory (SPEC §11)

    def _share(self, peer: Peer, offer: Share) -> None:
        if self._known(peer, offer.incarnation, offer.shard) is None or self.weights is None:
            return  # without the model nobody can say what it should be; the offer is repeated
        self._out.append(self._shared.offered(peer, offer, self.incarnation, self.weights.layout))

    def _unshare(self, peer: Peer, message: Unshare) -> None:
        self._shared.drop(message.incarnation, message.region)

    def _probe(self, peer: Peer, message: Probe) -> None:
        inbox = self._known(peer, message.incarnation, message.shard)
        if inbox is not None:
            self._ack(message.incarnation)
            self._send(peer, alive(self, message.incarnation, inbox.received, self._pulls.get(message.incarnation, ())))

    # --- status

    def _inquire(self, peer: Peer, message: Inquire) -> None:
        self._send(peer, Answer(message.request, self._wall + self._now, (answer(self),)))

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
        assert set(self._pulls) <= set(self._inboxes) <= set(self.routes)
        assert all(clock >= self.clocks.min for _, clock in self.clocks.items())
        assert {known for known, _ in self.clocks.items()} <= set(self.roster)
        if self.filled and self.opened:
            for incarnation, parked in self._pulls.items():
                for pull in parked.values():
                    late = self._inboxes[incarnation].applied < pull.after
                    assert late or not self._within(incarnation, pull.clock), "a pull that could be answered is parked"


_Act = Callable[[Shard, Peer, Any], None]

_FROM_WORKERS: dict[type[Message], _Act] = {
    Hello: Shard._hello,
    Enter: Shard._operation,
    Fill: Shard._operation,
    Start: Shard._operation,
    Push: Shard._operation,
    Pause: Shard._operation,
    Pull: Shard._pull,
    Probe: Shard._probe,
    Share: Shard._share,
    Unshare: Shard._unshare,
    **dict.fromkeys(FROM_WORKERS, Shard._cut),
    Inquire: Shard._inquire,
    Echo: Shard._echo,
    Refused: Shard._ignore,
}

_FROM_COORDINATOR: dict[type[Message], _Act] = {
    ShardWelcome: Shard._welcome,
    Evicted: Shard._forgotten,
    Waiting: Shard._ignore,
    Model: Shard._model,
    View: Shard._new_view,
    Refused: Shard._ignore,
}
