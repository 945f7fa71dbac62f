"""Federated rounds in a worker's life (SPEC §14.9): it enlists, waits for a round, puts its update in, hears how it ended.

Rules
- It takes part because its script has asked to, until its script or another mode ends that; a new life enlists again.
- A ticket ends once. A round that ends while nobody waits for it is told to whoever asks next.
- For which rounds shares were given is remembered across lives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import TYPE_CHECKING, Any

from ..protocol.effects import COORDINATOR, Linked, Received, Send, Tick
from ..protocol.errors import RoundClosed, ShoalError
from ..protocol.frames import payload_bytes
from ..protocol.layout import Layout
from ..protocol.messages import Message, Refused
from ..protocol.rounds import Enlist, Kept, Masked, Progress
from ..protocol.secure.plan import Policy
from . import calls
from .outgoing import Outgoing
from .parley import KINDS as FROM_COORDINATOR
from .parley import Declined, Invited, Lost, Over, RoundEvent, Shards, Trained
from .stats import Stats

if TYPE_CHECKING:
    from ..protocol.secure.keys import Identity
    from .round import RoundClient

RETRY = 1.0
KINDS = frozenset({Kept, Progress, *FROM_COORDINATOR})
"""What servers say of rounds."""


class Federation:
    """One worker's, over all its lives.

    Attributes:
        completed: rounds, as last heard of.
    """

    def __init__(self, out: Outgoing, stats: Stats, name: str) -> None:
        self.completed = 0
        self._out, self._stats, self._name = out, stats, name
        self._client: RoundClient | None = None
        self._identity: Identity | None = None
        self._peers: Mapping[str, bytes] | None = None
        self._released: dict[int, int] = {}
        self._incarnation, self._layout = 0, None  # type: tuple[int, Layout | None]
        self._lives: tuple[int, ...] = ()
        self._policy, self._metrics = Policy(), ()  # type: tuple[Policy, tuple[str, ...]]
        self._willing = self._confirmed = False
        self._told_at = -inf
        self._wanted, self._why = 0, ""
        self._enlisting: list[int] = []
        self._next: calls.NextCalled | None = None
        self._begun: calls.RoundBegun | None = None
        self._submitting: calls.TrainedCalled | None = None
        self._error: ShoalError | None = None
        """Why the last session ended, if this worker has left it and nobody was told."""
        self._now = 0.0

    def identify(self, identity: Identity | None, peers: Mapping[str, bytes] | None) -> None:
        """What this worker signs with, and the pinned public keys of all by name: both, or neither."""
        self._identity, self._peers = identity, peers

    @property
    def waiting(self) -> bool:
        """Does anybody wait for an answer?"""
        return bool(self._enlisting or self._next or self._submitting)

    @property
    def session(self) -> int:
        """The one that this worker is in, or 0."""
        return self._client.session if self._client else 0

    @property
    def wake_at(self) -> float:
        told = self._told_at + RETRY if self.waiting else inf
        return min(told, self._client.wake_at if self._client else inf)

    def why_waiting(self) -> str:
        """In words."""
        if self._submitting:
            return "waiting for the others of a federated round"
        return (
            f"no federated round has begun: the servers wait for {self._why}"
            if self._why
            else "waiting for the next round"
        )

    # --- lives

    def begin(self, incarnation: int) -> None:
        """A new incarnation of the worker."""
        if self._client is not None:
            self._give(Lost("this worker was declared dead, and joins again"))
            self._released = self._client.released
        self._client, self._incarnation, self._confirmed = None, incarnation, False

    def has_layout(self, layout: Layout) -> None:
        self._layout = layout

    def place(self, lives: tuple[int, ...]) -> None:
        """The shards' incarnations, by index."""
        self._lives = lives
        if self._client is not None:
            self._give(Shards(lives))

    # --- what users' threads ask

    def called(self, call: calls.Call) -> None:
        """One of those about rounds."""
        CALLS[type(call)](self, call)

    def _enlist(self, call: calls.EnlistCalled) -> None:
        if (self._policy, self._metrics, self._willing) != (call.policy, call.metrics, True):
            self._policy, self._metrics, self._willing, self._confirmed = call.policy, call.metrics, True, False
            self._told_at = -inf
        if self._client is not None:
            self._client.policy = call.policy
        if self._confirmed:
            return self._out.resolve(call.ticket, self.completed)
        self._enlisting.append(call.ticket)

    def _await(self, call: calls.NextCalled) -> None:
        self._next = call

    def _trained(self, call: calls.TrainedCalled) -> None:
        if self._client is None or call.session != self.session:
            text = "this federated round takes nothing more: it is over"
            error, self._error = self._error or RoundClosed(text, cause="this worker was late"), None
            return self._out.fail(call.ticket, error)
        self._submitting = call
        self._give(Trained(call.session, call.given))

    def _decline(self, call: calls.DeclineCalled) -> None:
        if self._client is not None:
            self._give(Declined(call.session, call.why))

    def _retire(self, _: calls.RetireCalled) -> None:
        if self._willing:
            if self.session:
                self._give(Declined(self.session, "it takes part in no more rounds"))
            self._willing = self._confirmed = False
            self._out.send(COORDINATOR, Enlist(self._incarnation, False, ()))

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this any more."""
        if ticket in self._enlisting:
            self._enlisting.remove(ticket)
        if self._next and self._next.ticket == ticket:
            self._next = None
        if self._submitting and self._submitting.ticket == ticket:
            self._submitting = None

    def fail(self, error: Exception) -> None:
        """The servers are lost."""
        self._out.fail_all(self._enlisting, error)
        for call in (self._next, self._submitting):
            if call is not None:
                self._out.fail(call.ticket, error)
        self._next = self._submitting = None

    # --- what the network says

    def concerns(self, refused: Refused) -> bool:
        """Is this of a session?"""
        return bool(self.session) and refused.request == self.session

    def received(self, peer: int, message: Message) -> None:
        if isinstance(message, Progress):
            return self._progress(message)
        if self._client is None and message.TYPE != Kept.TYPE:
            self._make_client()
        if self._client is not None:
            self._give(Received(peer, message))

    def linked(self, peer: int) -> None:
        if peer == COORDINATOR:
            self._told_at = -inf
        if self._client is not None:
            self._give(Linked(peer))

    def _progress(self, message: Progress) -> None:
        if message.willing != self._willing:
            return
        self.completed, self._wanted, self._why = message.completed, message.wanted, message.why
        self._confirmed = True
        self._out.resolve_all(self._enlisting, self.completed)

    # --- pursuing what is wanted

    def pursue(self, federated: bool, now: float) -> None:
        """
        Args:
            federated: does the cluster make rounds, as far as is known here?
        """
        self._now = now
        if self._client is not None and now >= self._client.wake_at:
            self._give(Tick())
        if self._willing and (not self._confirmed or self.waiting) and now >= self._told_at + RETRY:
            self._told_at = now
            self._out.send(COORDINATOR, Enlist(self._incarnation, True, self._metrics))
        if self._next is not None:
            self._answer_next(self._next, federated)

    def _answer_next(self, call: calls.NextCalled, federated: bool) -> None:
        enough = min(self._wanted or inf, inf if call.until is None else call.until)
        if self._error is not None:
            error, self._error, self._next = self._error, None, None
            self._out.fail(call.ticket, error)
        elif not federated or self.completed >= enough:
            self._next = None
            self._out.resolve(call.ticket, calls.NoRound(federated))
        elif self._begun is not None:
            begun, self._begun, self._next = self._begun, None, None
            self._out.resolve(call.ticket, begun)

    def _make_client(self) -> None:
        if self._layout is None or not self._willing:
            return
        from .round import RoundClient  # who never federates never loads it

        elements = sum(flat.elements for flat in self._layout.flats)
        digest = bytes.fromhex(self._layout.digest)
        who = (self._incarnation, self._name, self._policy)
        self._client = RoundClient(*who, elements, digest, self._identity, self._peers, self._released)
        self._give(Shards(self._lives))

    def _give(self, event: RoundEvent) -> None:
        assert self._client is not None
        for effect in self._client.handle(event, self._now):
            match effect:
                case Send(peer, message):
                    if isinstance(message, Masked):
                        self._stats.bytes_pushed += payload_bytes(message)
                    self._out.send(peer, message)  # type: ignore[arg-type]
                case Invited(session, plan):
                    self._begun, self._error = calls.RoundBegun(session, plan), None
                case Over():
                    self._over(effect)
                case _:  # what is to be remembered is, by the client; a new life is given it
                    pass

    def _over(self, end: Over) -> None:
        if self._begun is not None and self._begun.session == end.session:
            self._begun = None
        if end.result is not None:
            self._stats.steps += 1
        submitting = self._submitting
        if submitting is not None and submitting.session == end.session:
            self._submitting = None
            if end.result is not None or end.abandoned:
                return self._out.resolve(submitting.ticket, end)
            assert end.error is not None
            return self._out.fail(submitting.ticket, end.error)
        if end.error is not None and not isinstance(end.error, RoundClosed):
            self._error = end.error


CALLS: dict[type[calls.Call], Callable[[Federation, Any], None]] = {
    calls.EnlistCalled: Federation._enlist,
    calls.NextCalled: Federation._await,
    calls.TrainedCalled: Federation._trained,
    calls.DeclineCalled: Federation._decline,
    calls.RetireCalled: Federation._retire,
}
