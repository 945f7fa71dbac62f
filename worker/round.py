"""A worker's half of federated rounds (SPEC §14): what it says, and what it refuses. No socket, no clock.

Rules
- `handle` is the only method that changes anything. What may come in which phase is a table; what is not in it changes nothing.
- A server's word is checked before anything is given away. What fails a check ends the session: `Withdraw`, and no keys left.
- It unmasks once a session, and once a round whatever the session; the round is remembered before the shares are sent.
- It advertises when a round begins, and deals when its training is over.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from enum import IntEnum
from math import inf
from typing import Any

from ..protocol.effects import COORDINATOR, Linked, Received, Send
from ..protocol.errors import ConfigError, ProtectionError, ProtocolError, RoundClosed, ShoalError
from ..protocol.messages import Message, Refused
from ..protocol.repeats import Repeats, note
from ..protocol.rounds import (
    ROUND_CLOSED,
    Abandoned,
    Advertise,
    Consent,
    Consents,
    Deal,
    Invite,
    Kept,
    Masked,
    Noted,
    Relay,
    Released,
    Roster,
    RoundMessage,
    Survivors,
    Unmask,
    Withdraw,
)
from ..protocol.schema import Buffer
from ..protocol.secure.keys import Identity
from ..protocol.secure.noise import Array
from ..protocol.secure.plan import Plan, Policy
from ..protocol.session import STAGES, ascending, read_roster
from .hand import Hand, refuse
from .parley import (
    KINDS,
    Declined,
    Input,
    Invited,
    Lost,
    Over,
    Remember,
    Result,
    RoundEffect,
    RoundEvent,
    Shards,
    Trained,
)
from .upload import Encoder, Upload, check_input

REMEMBERED = 64
"""Sessions that are over and not forgotten."""
PATIENCE = 30.0
"""Seconds beyond all deadlines after which a coordinator that says nothing is given up."""


class Phase(IntEnum):
    """Where a session is, for this client."""

    IDLE = 0
    ADVERTISED = 1
    SEATED = 2
    DEALT = 3
    SENDING = 4
    SIGNED = 5
    UNMASKED = 6


class RoundClient:
    """The client half.

    Args:
        incarnation, name: of this worker. policy: what it demands.
        elements, layout: of its own model: how many, and the layout's digest, 32 bytes.
        identity: what it signs with. peers: the pinned public keys of all clients by name. Both are needed where plans are active.
        released: the last round for which it has given shares, by run, from what `Remember` wrote down.

    Raises:
        ConfigError: the pinned identities cannot be right.
    """

    def __init__(
        self,
        incarnation: int,
        name: str,
        policy: Policy,
        elements: int,
        layout: bytes,
        identity: Identity | None = None,
        peers: Mapping[str, bytes] | None = None,
        released: Mapping[int, int] | None = None,
    ) -> None:
        if peers is not None and len(set(peers.values())) != len(peers):
            raise ConfigError("two clients have the same identity", cause="a list of identities that is not right")
        if peers is not None and identity is not None and peers.get(name) != identity.public:
            raise ConfigError(f"the identity that is listed for {name!r} is not this worker's", hint="shoal keys")
        self.incarnation, self.name, self.policy = incarnation, name, policy
        self.phase = Phase.IDLE
        self.counters: Counter[str] = Counter()
        self._model = (elements, layout)
        self._identity, self._peers = identity, peers
        self._released = dict(released or {})
        self._shards: tuple[int, ...] = ()
        self._over: OrderedDict[int, str] = OrderedDict()
        """Sessions that are over; with the name of an error if this client has left it."""
        self._last = (-1, -1)
        """Run and session of the newest invitation."""
        self._repeats = Repeats()
        self._now, self._give_up_at = 0.0, inf
        self._out: list[RoundEffect] = []
        self._memory: Array | None = None
        self._clear()

    def _clear(self) -> None:
        self.phase, self.session, self.plan = Phase.IDLE, 0, None
        self._hand: Hand | None = None
        self._given: Input | None = None
        self._upload: Upload | None = None
        self._survivors: tuple[int, ...] = ()
        self._opened = False
        self._give_up_at = inf
        self._repeats.drop()

    def __repr__(self) -> str:
        return f"RoundClient({self.name!r}, {self.phase.name})"

    session: int
    plan: Plan | None

    @property
    def released(self) -> dict[int, int]:
        """The last round for which shares were given, by run: a new life of this worker needs it."""
        return dict(self._released)

    @property
    def wake_at(self) -> float:
        """When the next `Tick` is wanted."""
        upload = self._upload.wake_at if self._upload else inf
        return min(self._repeats.wake_at, upload, self._give_up_at)

    def handle(self, event: RoundEvent, now: float) -> list[RoundEffect]:
        self._out, self._now = [], now
        try:
            self._act(event)
        except (ProtocolError, ShoalError) as error:
            self._leave(error)
        if now >= self._give_up_at:
            given_up = RoundClosed("a federated round was given up: nothing is heard of it", hint="shoal status")
            self._end(given_up, abandoned=True)
        for _, message in self._repeats.due(now):
            self._out.append(Send(COORDINATOR, message))
        if self._upload is not None:
            self._out.extend(Send(shard, piece) for shard, piece in self._upload.due(now))
        return self._out

    def _act(self, event: RoundEvent) -> None:
        match event:
            case Received(peer, message):
                self._received(peer, message)
            case Linked(peer) if peer != COORDINATOR and self._upload is not None:
                self._upload.again(peer)
            case Shards(incarnations):
                self._shards = incarnations
            case Trained(session, given) if session == self.session and self._given is None and self._hand is not None:
                self._given = given
                if self.phase == Phase.SEATED:
                    self._deal()
            case Declined(session, why) if self.phase and session == self.session:
                self._leave(RoundClosed(f"this worker has declined a federated round: {why}"))
            case Lost(why) if self.phase:
                self._end(RoundClosed(f"a federated round was interrupted: {why}"), abandoned=True)
            case _:
                pass

    # --- what comes in

    def _received(self, peer: Any, message: Message) -> None:
        if isinstance(message, Refused):
            return self._refused(peer, message)
        if getattr(message, "incarnation", self.incarnation) != self.incarnation:
            return
        if isinstance(message, Kept):
            return self._kept(peer, message)
        if peer != COORDINATOR or type(message) not in KINDS:
            self.counters["rejected.misplaced"] += 1
            return
        if isinstance(message, Invite):
            return self._invited(message)
        if message.session in self._over:  # type: ignore[union-attr]
            return self._past(message)  # type: ignore[arg-type]
        if message.session != self.session or not self.phase:  # type: ignore[union-attr]
            self.counters["rejected.misplaced"] += 1
            return
        if isinstance(message, Noted):
            self._repeats.noted(COORDINATOR, message)
            return
        phase, act = _LEGAL.get(type(message), (self.phase, None))
        if act is not None and phase == self.phase:
            self._give_up_at = self._now + self._patience
            self._repeats.answered(COORDINATOR, message)  # type: ignore[arg-type]
            self._repeats.owe(COORDINATOR, message, self._now)  # type: ignore[arg-type]
            act(self, message)
        elif act is not None and phase < self.phase:  # it was accepted before, whatever it says now
            self._note(message)  # type: ignore[arg-type]
        elif isinstance(message, Released):
            self._note(message)
            self._completed(message)
        elif isinstance(message, Abandoned):
            self._note(message)
            self._end(RoundClosed(f"a federated round was abandoned: {message.why}"), abandoned=True)
        else:
            self.counters["rejected.misplaced"] += 1

    def _note(self, message: RoundMessage) -> None:
        if not isinstance(message, Noted):
            self._out.append(Send(COORDINATOR, note(message)))

    def _past(self, message: RoundMessage) -> None:
        """Of a session that is over: if this client has left it, the coordinator may not know."""
        code = self._over[message.session]
        if code and not isinstance(message, Noted):
            self._out.append(Send(COORDINATOR, Withdraw(self.incarnation, message.session, code)))
        else:
            self._note(message)

    def _say(self, message: RoundMessage) -> None:
        self._out.append(Send(COORDINATOR, self._repeats.put(COORDINATOR, message, self._now)))

    def _refused(self, peer: Any, refused: Refused) -> None:
        if refused.request != self.session or not self.phase:
            return
        if refused.code == ROUND_CLOSED:
            error = RoundClosed(f"a federated round takes nothing more: {refused.text}"[:1024])
        else:
            error = RoundClosed(f"a server refused this worker's part of a federated round: {refused.text}"[:1024])
        if peer == COORDINATOR:
            self._end(error)
        else:
            self._leave(error)

    def _kept(self, peer: Any, kept: Kept) -> None:
        known = 0 <= peer < len(self._shards) and self._shards[peer] == kept.shard
        if known and kept.session == self.session and self._upload is not None:
            self._upload.acknowledged(peer, kept.upto)

    # --- the stages

    def _invited(self, message: Invite) -> None:
        if message.session in self._over:
            return self._past(message)
        if self.phase and message.session == self.session:
            return self._note(message)
        try:
            plan = Plan.unpack(bytes(message.buffers[0]))
        except ProtocolError:
            self.counters["rejected.malformed"] += 1
            self._out.append(Send(COORDINATOR, Withdraw(self.incarnation, message.session, ProtocolError.__name__)))
            return
        if plan.run == self._last[0] and message.session <= self._last[1]:
            return self._note(message)
        if self.phase:
            error = RoundClosed("a federated round was given up by the coordinator, which has begun another")
            self._end(error, abandoned=True)
        self._repeats.owe(COORDINATOR, message, self._now)
        self._last = (plan.run, message.session)
        self.session, self.plan, self.phase = message.session, plan, Phase.ADVERTISED
        elements, layout = self._model
        self.policy.check(plan, elements=elements, layout=layout, released=self._released.get(plan.run, -1))
        if len(plan.deadlines) != STAGES:
            raise refuse(f"a plan with {len(plan.deadlines)} deadlines, and {STAGES} stages have one")
        if plan.active and (self._identity is None or self._peers is None):
            raise ProtectionError(
                "this round needs identities, and this worker has none pinned",
                cause="it was started without them",
                hint="shoal keys",
            )
        self._give_up_at = self._now + self._patience
        self._hand = Hand(plan, self.name, self._identity)
        self._out.append(Invited(message.session, plan))
        self._say(Advertise(self.incarnation, self.session, (self._hand.advert.packed,)))

    @property
    def _patience(self) -> float:
        return PATIENCE + (sum(self.plan.deadlines) if self.plan else 0.0)

    @property
    def _held(self) -> tuple[Plan, Hand]:
        assert self.plan is not None and self._hand is not None
        return self.plan, self._hand

    def _roster(self, message: Roster) -> None:
        _, hand = self._held
        members, adverts = read_roster(message.buffers, hand.masked)
        hand.seat(members, adverts, self.policy, self._peers)
        self.phase = Phase.SEATED
        if self._given is not None:
            self._deal()

    def _deal(self) -> None:
        (plan, hand), given = self._held, self._given
        assert given is not None
        check_input(plan, given)
        if given.model != plan.model:
            raise refuse("it was given other weights than the plan says")
        self.phase = Phase.DEALT
        self._say(Deal(self.incarnation, self.session, (hand.deal(),)))

    def _relay(self, message: Relay) -> None:
        (plan, hand), given = self._held, self._given
        assert given is not None
        if len(self._shards) != len(plan.shards):
            raise refuse(f"a plan for {len(plan.shards)} shards, and {len(self._shards)} are known")
        hand.take(message.ranks, message.buffers[0])
        encoder = Encoder(plan, given, hand.count, *hand.keys(given.model), self._memory)
        self._memory, shards, session = encoder.memory, self._shards, self.session

        def make(shard: int, offset: int, piece: Buffer) -> Masked:
            return Masked(self.incarnation, shards[shard], session, offset, (piece,))

        self._upload, self.phase = Upload(encoder, make), Phase.SENDING

    def _told(self, message: Survivors) -> None:
        plan, hand = self._held
        ascending(message.ranks, "ranks")
        sent = self._upload is not None and self._upload.sent
        hand.check(message.ranks, sent, self._released.get(plan.run, -1) >= plan.round)
        if not hand.masked:
            raise refuse("it was asked to unmask in the clear")
        self._survivors = message.ranks
        if plan.active:
            self.phase = Phase.SIGNED
            return self._say(Consent(self.incarnation, self.session, (hand.sign(message.ranks),)))
        self._unmask()

    def _agreed(self, message: Consents) -> None:
        _, hand = self._held
        hand.agreed(self._survivors, message.ranks, message.buffers[0], self._peers)
        self._unmask()

    def _unmask(self) -> None:
        plan, hand = self._held
        self._remember(plan)
        self._opened, self.phase = True, Phase.UNMASKED
        ranks, shares = hand.open(self._survivors)
        self._upload = self._given = None
        self._say(Unmask(self.incarnation, self.session, ranks, (shares,)))

    def _remember(self, plan: Plan) -> None:
        """There is no more for this round from here."""
        if self._released.get(plan.run, -1) < plan.round:
            self._released[plan.run] = plan.round
            self._out.append(Remember(plan.run, plan.round))

    def _completed(self, message: Released) -> None:
        plan, hand = self._held
        if self.phase < Phase.SENDING or hand.rank not in message.survivors:  # others' shares may have been enough
            return self._end(RoundClosed("a federated round was completed without this worker", cause="it was late"))
        self._remember(plan)
        totals = message.weight, dict(message.metrics), message.capped, message.clipped
        self._end(None, Result(len(message.survivors), *totals))

    # --- the end

    def _leave(self, error: ShoalError) -> None:
        """End the session by this client's own will."""
        if isinstance(error, ProtocolError):
            self.counters[f"rejected.{error.reason}"] += 1
            error = refuse(str(error))
        if self.phase:
            self._out.append(Send(COORDINATOR, Withdraw(self.incarnation, self.session, type(error).__name__)))
        self._end(error, left=type(error).__name__)

    def _end(
        self, error: ShoalError | None, result: Result | None = None, left: str = "", abandoned: bool = False
    ) -> None:
        if not self.phase:
            return
        if self._hand is not None:
            self._hand.drop()
        self._over[self.session] = left
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)
        spent = self._opened or (self._upload is not None and self._upload.sent)
        self._out.append(Over(self.session, self.plan, result, error, self._opened, spent, abandoned))
        self._clear()


_LEGAL: dict[type[Any], tuple[Phase, Callable[[RoundClient, Any], None]]] = {
    Roster: (Phase.ADVERTISED, RoundClient._roster),
    Relay: (Phase.DEALT, RoundClient._relay),
    Survivors: (Phase.SENDING, RoundClient._told),
    Consents: (Phase.SIGNED, RoundClient._agreed),
}
"""In which phase a message is acted upon. Later it is a repetition; earlier it is out of place."""
