"""The coordinator's half of one session: from the invitation to its end (SPEC §14.4). It never touches an update.

Rules
- `handle` and `tick` are the only methods that change anything; what they want said is in `out`.
- A stage ends when everybody has answered or is gone, or at its deadline; without its quorum the round is abandoned.
- Completed or abandoned, for all: shards apply nothing before all of them are right.
- A message counts once. What comes too late is refused with `round_closed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import inf
from typing import Any

from ..protocol.errors import ProtocolError
from ..protocol.federated import Aggregate
from ..protocol.messages import Message, Refused
from ..protocol.repeats import Repeats, note
from ..protocol.rounds import (
    ROUND_CLOSED,
    Abandoned,
    Advertise,
    Arrived,
    Begin,
    Consent,
    Consents,
    Deal,
    Finish,
    Finished,
    Invite,
    Measure,
    Measured,
    Noted,
    Relay,
    Released,
    Roster,
    RoundMessage,
    Ruling,
    Survivors,
    Unmask,
    Withdraw,
)
from ..protocol.secure.graph import neighbours
from ..protocol.secure.keys import KEY_BYTES, SIGNATURE_BYTES, verify
from ..protocol.secure.plan import Plan
from ..protocol.session import (
    ADVERTISE,
    CONSENT,
    DEAL,
    FINISH,
    MASKED,
    MAX_COMPLETE,
    SEALED_BYTES,
    TURN,
    UNMASK,
    Advert,
    Members,
    ascending,
    ends,
    pack_adverts,
    pack_leaves,
    read_advert,
)
from .krum import choose, total
from .ruling import Turns
from .unmasking import Dealt, Unmasking

LINGER = 3.0
"""Seconds for which clients are told how a round has ended, if they do not note it."""
TURNS = 4
"""Slices that a shard has room for, at most."""


class Stage(IntEnum):
    """Where a session is."""

    ADVERTISE = 0
    DEAL = 1
    MASKED = 2
    MEASURE = 3
    CONSENT = 4
    UNMASK = 5
    FINISH = 6
    RELEASED = 7
    ABANDONED = 8


@dataclass(frozen=True, slots=True)
class Say:
    """Effect: a message for the worker or the shard with this incarnation."""

    to: int
    message: Message


class Session:
    """One try at a round.

    Args:
        number: of the session. plan: with seven deadlines.
        cohort: names of the invited by incarnation, as many as `plan.cohort`. shards: incarnations by index.
        wanted: as many as these who have dealt are enough. room: slices that a shard has room for.
        peers: public keys by name, if they are known here, so that an advert which no client would accept is refused.

    Attributes:
        asked: may a client have given shares? Then the round's number is used up.
        result: what the shards were told to apply, once the stage is RELEASED. why: it was abandoned.
        declined: it was abandoned because clients left before they took part, as they do at their end.
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        cohort: Mapping[int, str],
        shards: Sequence[int],
        now: float,
        wanted: int | None = None,
        room: int = TURNS,
        peers: Mapping[str, bytes] | None = None,
    ) -> None:
        self.number, self.plan, self.stage = number, plan, Stage.ADVERTISE
        self.shards = tuple(shards)
        self.counters: Counter[str] = Counter()
        self.out: list[Say] = []
        self.asked, self.why, self.declined = False, "", False
        self.result: Released | None = None
        self._masked = plan.threshold > 0
        self._quorum = max(plan.minimum, plan.threshold)
        self._wanted = max(self._quorum, min(wanted or plan.cohort, plan.cohort))
        self._room, self._peers = room, peers
        self._repeats = Repeats()
        self._cohort = dict(cohort)
        self._adverts: dict[int, Advert] = {}
        """By incarnation; after the stage those of the members, by rank as in `_members`."""
        self._members: tuple[int, ...] = ()
        self._ranks: dict[int, int] = {}
        self._near: Sequence[Sequence[int]] = ()
        self._sid = b""
        self._commitments: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        """By receiver, then by sender."""
        self._done: dict[Stage, set[int]] = {}
        """Whose message of a stage has counted."""
        self._gone: set[int] = set()
        self._turns: Turns | None = None
        self._untold: list[int] = []
        """Who has a turn that not every shard knows of."""
        self._consents: dict[int, bytes] = {}
        self._unmasking: Unmasking | None = None
        self._aggregate = Aggregate.read(dict(plan.training))
        self._measured: dict[int, Measured] = {}
        self._finished: dict[int, Finished] = {}
        self.settled = False
        """Has every shard noted the end? Clients hear of a result then, so that they pull what it made."""
        self._deadline = self._ended_at = inf
        self._enter(Stage.ADVERTISE, ADVERTISE, now)
        for incarnation in self._cohort:
            self._tell(incarnation, Invite(incarnation, number, (plan.packed,)), now)

    def __repr__(self) -> str:
        return f"Session({self.number}, {self.stage.name})"

    def over(self, now: float) -> bool:
        """Is the round's end decided, and do all shards know it, and all clients who can be told?"""
        if not self.settled:
            return False
        return not len(self._repeats) or now >= self._ended_at + LINGER

    @property
    def survivors(self) -> tuple[int, ...]:
        """Incarnations of those whose input is in the sum."""
        return tuple(self._members[rank] for rank in self._added)

    @property
    def wake_at(self) -> float:
        turn = self._turns.wake_at if self._turns and self.stage == Stage.MASKED else inf
        return min(self._deadline, self._repeats.wake_at, turn)

    # --- what happens

    def handle(self, message: Message, now: float) -> None:
        """A message of this session, from whoever its incarnation says."""
        incarnation: int = message.incarnation  # type: ignore[union-attr]
        if isinstance(message, Noted):
            self._repeats.noted(incarnation, message)
        elif isinstance(message, Withdraw):
            self.gone(incarnation, now)
        else:
            self._repeats.answered(incarnation, message)  # type: ignore[arg-type]
            if type(message) in _FROM_WORKERS:
                self._from_worker(incarnation, message, now)
            elif type(message) in _FROM_SHARDS and incarnation in self.shards:
                self._from_shard(message, now)
        self.tick(now)

    def _from_shard(self, message: Any, now: float) -> None:
        self._repeats.owe(message.incarnation, message, now)
        index = self.shards.index(message.incarnation)
        if isinstance(message, Arrived):
            if self.stage == Stage.MASKED and self._turns:
                self._turns.arrived(index, [rank for rank in message.ranks if rank < len(self._members)])
        elif isinstance(message, Measured) and self.stage == Stage.MEASURE:
            self._measured.setdefault(index, message)
        elif isinstance(message, Finished) and self.stage == Stage.FINISH:
            self._finished.setdefault(index, message)

    def _from_worker(self, incarnation: int, message: Any, now: float) -> None:
        stage, read = _FROM_WORKERS[type(message)]
        if incarnation in self._done.setdefault(stage, set()):
            return self._say(incarnation, note(message))  # again: the first one counts
        if Stage.CONSENT <= stage < self.stage and incarnation in self._summed:
            return self._say(incarnation, note(message))  # enough have said it before
        if stage != self.stage or incarnation in self._gone or incarnation not in self._expected(stage):
            return self._close(incarnation)
        try:
            read(self, incarnation, message)
        except ProtocolError as error:
            self.counters[f"rejected.{error.reason}"] += 1
            self._say(incarnation, Refused(self.number, "malformed", str(error)[:256]))
            return self.gone(incarnation, now)
        self._done[stage].add(incarnation)
        self._repeats.owe(incarnation, message, now)

    def _expected(self, stage: Stage) -> Any:
        if stage == Stage.ADVERTISE:
            return self._cohort
        return self._ranks if stage == Stage.DEAL else self._summed

    def _close(self, incarnation: int) -> None:
        self._say(incarnation, Refused(self.number, ROUND_CLOSED, f"the stage is {self.stage.name.lower()}"))

    def gone(self, incarnation: int, now: float) -> None:
        """A worker has left, died, withdrawn, or broken the rules; or a shard has."""
        if incarnation in self.shards:
            self.abandon("a shard is gone", now)
        self._repeats.forget(incarnation)
        if incarnation in self._cohort and incarnation not in self._gone:
            self._gone.add(incarnation)
            if self._turns is not None and incarnation in self._ranks:
                self._turns.drop(self._ranks[incarnation])
        self.tick(now)

    def tick(self, now: float) -> None:
        """Go on as far as can be; send again what is not noted."""
        while _STAGES[self.stage](self, now):
            pass
        for to, message in self._repeats.due(now):
            self._say(to, message)

    # --- stage by stage; each returns whether the next one has begun

    def _advertising(self, now: float) -> bool:
        if len(self._adverts) + len(self._gone) < len(self._cohort) and now < self._deadline:
            return False
        here = self._adverts.keys() - self._gone
        if not self._adverts.keys() | self._gone >= self._cohort.keys() and now < self._deadline:
            return False
        names = {incarnation: self._cohort[incarnation] for incarnation in here}
        if len(here) < self._quorum:
            self.declined = now < self._deadline
            return self._abandon(f"{len(here)} of {self._quorum} clients have advertised", now)
        self._members = tuple(sorted(names, key=names.__getitem__))
        for late in self._cohort.keys() - here - self._gone:
            self._repeats.forget(late)
            self._close(late)
        self._ranks = {incarnation: rank for rank, incarnation in enumerate(self._members)}
        adverts = [self._adverts[incarnation] for incarnation in self._members]
        members = Members(tuple(advert.name for advert in adverts), tuple(advert.leaf for advert in adverts))
        if self._masked:
            self._sid, count = members.sid(self.plan.context), len(adverts)
            degree = self.plan.degree_of(count)
            if degree == count - 1 and count > MAX_COMPLETE:
                return self._abandon(f"{count} clients that are all neighbours, and {MAX_COMPLETE} are the most", now)
            self._near = neighbours(self._sid, count, degree)
        self._enter(Stage.DEAL, DEAL, now)
        leaves = pack_leaves(members)
        for rank, incarnation in enumerate(self._members):
            near = self._near[rank] if self._near else ()
            roster = Roster(incarnation, self.number, (leaves, pack_adverts(adverts[other] for other in near)))
            self._tell(incarnation, roster, now)
        return True

    def _dealing(self, now: float) -> bool:
        if len(self._commitments) < min(self._wanted, len(self._members) - len(self._gone)) and now < self._deadline:
            return False
        dealt = {self._members[rank] for rank in self._commitments}
        waited = set(self._members) - dealt - self._gone
        if waited and len(dealt - self._gone) < self._wanted and now < self._deadline:
            return False
        here = {rank for rank in self._commitments if self._members[rank] not in self._gone}
        if len(here) < self._quorum:
            return self._abandon(f"{len(here)} of {self._quorum} clients have dealt", now)
        self._commitments = {rank: self._commitments[rank] for rank in sorted(here)}
        for late in waited:
            self._repeats.forget(late)
            self._close(late)
        self._enter(Stage.MASKED, MASKED, now)
        self._turns = Turns(here, len(self.shards), self._room, self.plan.deadlines[TURN])
        for index, shard in enumerate(self.shards):
            begin = Begin(shard, self.number, index, self._members, (self.plan.packed,))
            self._tell(shard, begin, now)
        return True

    def _summing(self, now: float) -> bool:
        turns = self._turns
        assert turns is not None
        if now >= self._deadline and self._closing:
            return self._abandon("a shard does not answer", now)
        if now >= self._deadline:
            self._closing, self._deadline = True, now + self.plan.deadlines[FINISH]
        self._untold += turns.go_on(now, self._closing)
        if turns.number != self._ruled:
            self._ruled = turns.number
            state = turns.turns, tuple(sorted(turns.added)), tuple(sorted(turns.dropped))
            for shard in self.shards:
                self._tell(shard, Ruling(shard, self.number, turns.number, *state), now)
        if self._repeats.owes(Begin) or self._repeats.owes(Ruling):
            return False
        for rank in self._untold:
            if rank in turns.turns:
                turns.told(rank, now)
                sealed = dict(sorted(self._sealed.get(rank, {}).items()))
                sealed = {sender: text for sender, text in sealed.items() if sender in self._commitments}
                relay = Relay(self._members[rank], self.number, tuple(sealed), (b"".join(sealed.values()),))
                self._tell(relay.incarnation, relay, now)
        self._untold = []
        if not turns.over:
            return False
        self._added = tuple(sorted(turns.added))
        self._summed = frozenset(self.survivors)
        self._repeats.drop(lambda message: isinstance(message, Relay))
        for rank in turns.dropped:
            if self._members[rank] not in self._gone:
                self._close(self._members[rank])
        if len(self._added) < self._quorum:
            return self._abandon(f"the input of {len(self._added)} clients has arrived, of {self._quorum}", now)
        if self._aggregate.chooses:
            self._enter(Stage.MEASURE, FINISH, now)
            for shard in self.shards:
                self._tell(shard, Measure(shard, self.number), now)
            return True
        if not self._masked:
            return self._finish(b"", b"", now)
        dealt = Dealt(
            self._sid,
            self.plan.threshold,
            self.plan.model,
            [self._adverts[incarnation] for incarnation in self._members],
            self._near,
            self._commitments,
        )
        self._unmasking = Unmasking(dealt, self._added)
        self._sealed.clear()
        if self.plan.active:
            self._enter(Stage.CONSENT, CONSENT, now)
        else:
            self.asked = True
            self._enter(Stage.UNMASK, UNMASK, now)
        for incarnation in self._alive:
            self._tell(incarnation, Survivors(incarnation, self.number, self._added), now)
        return True

    def _measuring(self, now: float) -> bool:
        if len(self._measured) < len(self.shards):
            return self._abandon("a shard does not measure", now) if now >= self._deadline else False
        try:
            squares = total([each.buffers[0] for each in self._measured.values()], len(self._added))
        except ProtocolError as error:
            return self._abandon(f"a shard has measured wrongly: {error.what}"[:256], now)
        chosen = choose(squares, int(self._aggregate.named["faulty"]), self._aggregate.keep)
        self._measured.clear()
        return self._finish(b"", b"", now, tuple(self._added[place] for place in chosen))

    def _consenting(self, now: float) -> bool:
        if {self._ranks[each] for each in self._alive} - self._consents.keys() and now < self._deadline:
            return False
        if len(self._consents) < self.plan.threshold:
            return self._abandon(f"{len(self._consents)} of {self.plan.threshold} clients have confirmed", now)
        signed = dict(sorted(self._consents.items()))
        self.asked = True
        self._enter(Stage.UNMASK, UNMASK, now)
        for incarnation in self._alive:
            signatures = b"".join(signed.values())
            self._tell(incarnation, Consents(incarnation, self.number, tuple(signed), (signatures,)), now)
        return True

    def _unmasks(self, now: float) -> bool:
        unmasking = self._unmasking
        assert unmasking is not None
        if len(unmasking.heard) >= self.plan.threshold and len(unmasking.heard) > self._solved:
            self._solved = len(unmasking.heard)
            if unmasking.solve():
                return self._finish(*unmasking.masks(), now)
        if now < self._deadline and unmasking.missing(self._ranks[each] for each in self._alive):
            return False
        return self._abandon(f"{len(unmasking.heard)} clients have unmasked, and that is not enough", now)

    def _finish(self, add: bytes, subtract: bytes, now: float, chosen: tuple[int, ...] = ()) -> bool:
        self._forget()
        self._enter(Stage.FINISH, FINISH, now)
        for shard in self.shards:
            self._tell(shard, Finish(shard, self.number, self._added, chosen, (add, subtract)), now)
        return True

    def _finishing(self, now: float) -> bool:
        wrong = next((each.why for each in self._finished.values() if not each.right), "")
        if wrong:
            return self._abandon(f"a shard's sum is not right: {wrong}"[:256], now)
        if len(self._finished) < len(self.shards):
            return self._abandon("a shard does not finish", now) if now >= self._deadline else False
        counts = {(each.weight, each.capped, each.clipped, each.metrics) for each in self._finished.values()}
        if len(counts) > 1:
            return self._abandon("the shards have counted different things", now)
        self.stage, self._deadline = Stage.RELEASED, inf
        self.result = Released(0, self.number, self._added, *counts.pop())
        self._repeats.drop()
        for shard in self.shards:
            self._tell(shard, replace(self.result, incarnation=shard), now)
        return True

    def _abandon(self, why: str, now: float) -> bool:
        self.stage, self._deadline, self.why = Stage.ABANDONED, inf, why
        self._repeats.drop()
        self._forget()
        for to in (*self.shards, *self._witnesses):
            self._tell(to, Abandoned(to, self.number, why), now)
        return True

    def abandon(self, why: str, now: float) -> None:
        """End it, if its end is not decided yet."""
        if self.stage < Stage.RELEASED:
            self._abandon(why, now)

    def _ended(self, now: float) -> bool:
        if self.settled or any(self._repeats.owed(shard) for shard in self.shards):
            return False
        self.settled, self._ended_at = True, now
        for to in self._witnesses if self.result else ():
            assert self.result is not None
            self._tell(to, replace(self.result, incarnation=to), now)
        return False

    # --- small things

    _added: tuple[int, ...] = ()
    _summed: frozenset[int] = frozenset()
    _ruled = -1
    _closing = False
    _solved = 0

    @property
    def _alive(self) -> list[int]:
        """Survivors who are still here."""
        return [each for each in self.survivors if each not in self._gone]

    @property
    def _witnesses(self) -> list[int]:
        """Clients who want to know how it ends."""
        return [each for each in self._members or self._cohort if each not in self._gone]

    def _enter(self, stage: Stage, deadline: int, now: float) -> None:
        self.stage, self._deadline = stage, now + self.plan.deadlines[deadline]

    def _tell(self, to: int, message: RoundMessage, now: float) -> None:
        self._say(to, self._repeats.put(to, message, now))

    def _say(self, to: int, message: Message) -> None:
        self.out.append(Say(to, message))

    def _forget(self) -> None:
        """Nothing of what was secret is needed any more."""
        self._unmasking = None
        self._sealed.clear()
        self._consents.clear()

    # --- what workers say

    def _take_advert(self, incarnation: int, message: Advertise) -> None:
        advert = read_advert(message.buffers[0], self._masked)
        if advert.name != self._cohort[incarnation] or advert.context != self.plan.context:
            raise ProtocolError("malformed", "an advert of somebody else, or for another plan")
        known = self._peers is None or verify(self._peers.get(advert.name, b""), advert.signature, advert.signed)
        if self.plan.active and not known:
            raise ProtocolError("malformed", "an advert that is not signed by the identity that is listed")
        if any({advert.sealing, advert.masking} & {o.sealing, o.masking} for o in self._adverts.values() if o.sealing):
            raise ProtocolError("malformed", "a key that somebody else has advertised")
        self._adverts[incarnation] = advert

    def _take_deal(self, incarnation: int, message: Deal) -> None:
        rank, buffer = self._ranks[incarnation], bytes(message.buffers[0])
        near = self._near[rank] if self._near else ()
        sealed = ends(buffer[KEY_BYTES:], SEALED_BYTES, len(near), "sealed shares") if self._masked else []
        if not self._masked and buffer:
            raise ProtocolError("malformed", "shares in the clear")
        self._commitments[rank] = buffer[:KEY_BYTES]
        for receiver, text in zip(near, sealed, strict=True):
            self._sealed.setdefault(receiver, {})[rank] = text

    def _take_consent(self, incarnation: int, message: Consent) -> None:
        (signature,) = ends(message.buffers[0], SIGNATURE_BYTES, 1, "signatures")
        self._consents[self._ranks[incarnation]] = signature

    def _take_unmask(self, incarnation: int, message: Unmask) -> None:
        assert self._unmasking is not None
        ascending(message.ranks, "ranks")
        self._unmasking.take(self._ranks[incarnation], message.ranks, message.buffers[0])


_FROM_WORKERS: dict[type[Any], tuple[Stage, Callable[[Session, int, Any], None]]] = {
    Advertise: (Stage.ADVERTISE, Session._take_advert),
    Deal: (Stage.DEAL, Session._take_deal),
    Consent: (Stage.CONSENT, Session._take_consent),
    Unmask: (Stage.UNMASK, Session._take_unmask),
}
_FROM_SHARDS = frozenset({Arrived, Measured, Finished})
_STAGES: dict[Stage, Callable[[Session, float], bool]] = {
    Stage.ADVERTISE: Session._advertising,
    Stage.DEAL: Session._dealing,
    Stage.MASKED: Session._summing,
    Stage.MEASURE: Session._measuring,
    Stage.CONSENT: Session._consenting,
    Stage.UNMASK: Session._unmasks,
    Stage.FINISH: Session._finishing,
    Stage.RELEASED: Session._ended,
    Stage.ABANDONED: Session._ended,
}
