"""A worker's session where the simulation does not lead it: refusals, wrong keys, silence, time-outs, goodbyes (rung T0)."""

from __future__ import annotations

from typing import Any

import pytest
from cores import RUN, SHARD, SMALL, carried, kinds, only

from shoal.protocol import messages as m
from shoal.protocol.effects import COORDINATOR, Denied, Fail, Linked, Log, Open, Received, Resolve, Send, Tick, Unlinked
from shoal.protocol.errors import (
    AuthError,
    ConfigError,
    ServerLost,
    ShapeError,
    VersionError,
    WorkerEvicted,
)
from shoal.protocol.layout import MIN_BLOCK_BYTES, lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD
from shoal.worker import calls
from shoal.worker.core import Core, Phase

LAYOUT = lay_out(SMALL, 1, MIN_BLOCK_BYTES)
OTHER = ModelSpec((Tensor("v", "float32", (2,)),), (SGD(lr=1.0),))
HOME = m.Place(0, SHARD, "host", 1000, "")


class Session:
    """A core, its virtual time, what it says and how its tickets end. The incarnations are 1, 2, 3, …"""

    def __init__(self) -> None:
        lives = iter(range(1, 99))
        self.core = Core(m.Place(0, 0, "boss", 7450, ""), ("me", 0, "here", 5), lambda: next(lives))
        self.now = 0.0
        self.ended: dict[int, Any] = {}
        self.logged: list[str] = []
        self._ticket = 0

    def event(self, event: Any) -> list[Any]:
        """What the core says to this, as the other side reads it. A ticket ends once, and only once it was given."""
        said = []
        for effect in self.core.handle(event, self.now):
            match effect:
                case Send(_, message):
                    said.append(carried(message))
                case Resolve(ticket, result) | Fail(ticket, result):
                    assert 0 < ticket <= self._ticket
                    assert ticket not in self.ended
                    self.ended[ticket] = result
                case Log(_, text):
                    self.logged.append(text)
                case Open():
                    said.append(effect)
        return said

    def call(self, kind: Any, *args: Any) -> int:
        self._ticket += 1
        self.said = self.event(kind(self._ticket, *args))
        return self._ticket

    def hear(self, message: Any, peer: int = COORDINATOR) -> list[Any]:
        return self.event(Received(peer, carried(message)))

    def after(self, seconds: float) -> list[Any]:
        """Time passes, with a tick each half second, as the loop gives it. What was said all the while."""
        said, until = [], self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.5, until)
            said += self.event(Tick())
        return said

    @property
    def life(self) -> int:
        return self.core.incarnation

    # --- how far it has come

    def open(self) -> int:
        return self.call(calls.OpenCalled)

    def welcome(self, run: int = RUN) -> list[Any]:
        return self.hear(m.Welcome(self.life, run, 0, 1, 15.0, (m.Phase(0, "async", 3.0),), "error", (HOME,)))

    def joined(self) -> Session:
        if self.core.phase is Phase.IDLE:
            self.open()
            self.event(Linked(COORDINATOR))
        self.welcome()
        self.event(Linked(0))
        self.hear(m.Greeting(self.life, SHARD, 0), 0)
        return self

    def answer(self, asked: Any, kind: Any, *fields: Any) -> list[Any]:
        return self.hear(kind(self.life, asked.request, *fields))

    def ack(self, seq: int, min_clock: int = 0, *refusals: Any) -> list[Any]:
        return self.hear(m.Ack(self.life, SHARD, seq, False, min_clock, refusals), 0)

    def registered(self) -> Session:
        """Joined, registered and counted in: two operations are acknowledged."""
        if self.core.phase is not Phase.JOINED:
            self.joined()
        self.call(calls.RegisterCalled, SMALL.description, lambda block: bytes(8))
        self.answer(only(m.Register, self.said), m.Registered, 1, MIN_BLOCK_BYTES, LAYOUT.digest)
        self.ack(1)
        self.ack(2)
        return self

    def push(self) -> int:
        return self.call(calls.PushCalled, (calls.Part(0, (0,), (), (bytes(8),)),), True, 1.0, ())

    def pull(self) -> int:
        return self.call(calls.PullCalled, {0: ()}, {})

    def claim(self) -> tuple[int, m.Claim]:
        self.answer(self.declare()[1], m.Declared, 4)
        ticket = self.call(calls.ClaimCalled, "data", 2)
        return ticket, only(m.Claim, self.said)

    def declare(self) -> tuple[int, m.Declare]:
        ticket = self.call(calls.DeclareCalled, "data", 40, 2, 4, 0, 0)
        return ticket, only(m.Declare, self.said)


@pytest.fixture
def at() -> Session:
    return Session()


def test_wrong_keys_end_everything(at: Session) -> None:
    """Whoever waits is told, whoever calls later too; only goodbye still works. A closed core wants nothing more."""
    opened = at.open()
    at.event(Denied(COORDINATOR, "asks for keys"))
    late = at.pull()

    assert [AuthError, AuthError] == [type(at.ended[ticket]) for ticket in (opened, late)]
    assert "the server at boss:7450 was reached, but asks for keys. Try: shoal doctor" == str(at.ended[opened])
    assert None is at.ended[at.call(calls.CloseCalled)]
    assert [] == at.event(Linked(COORDINATOR)) + at.welcome() + at.after(60)
    assert float("inf") == at.core.wake_at

    inside = Session().registered()
    waiting = [inside.pull(), inside.push(), inside.claim()[0]]
    inside.event(Denied(0, "holds another key"))  # a shard: a worker is counted in everywhere or nowhere
    assert {"the server at host:1000 was reached, but holds another key. Try: shoal doctor"} == {
        str(inside.ended[ticket]) for ticket in waiting
    }


def test_a_shard_without_a_key_is_not_spoken_to(at: Session) -> None:
    """Where the coordinator has keys every shard has (SPEC §10.3): one that is said to have none gets no word in the clear."""
    at.core = Core(m.Place(0, 0, "boss", 7450, "key"), ("me", 0, "here", 5), lambda: 1)
    ticket = at.open()
    at.welcome()

    assert "shard 0 at host:1000 has no key, while the cluster has" in str(at.ended[ticket])
    assert [] == at.event(Linked(0)) + at.after(5)


@pytest.mark.parametrize(("peer", "where"), [(COORDINATOR, "boss:7450"), (0, "host:1000")])
def test_another_version(at: Session, peer: int, where: str) -> None:
    """A server of another version is named, and what to do (SPEC §2.4)."""
    ticket = at.registered().pull()
    at.hear(m.Refused(0, "version", "2 is spoken here"), peer)

    assert isinstance(at.ended[ticket], VersionError)
    assert f"{where} speaks another version of the protocol: 2 is spoken here. Try: install" in str(at.ended[ticket])


def test_a_name_that_is_taken(at: Session) -> None:
    """A joiner that is refused is told why; once in, such a refusal is an earlier one, come late."""
    ticket = at.open()
    at.hear(m.Refused(0, "name", "a worker is named 'me' already"))
    assert isinstance(at.ended[ticket], ConfigError)
    assert "the server refused this worker: a worker is named 'me' already" in str(at.ended[ticket])

    inside = Session().joined()
    inside.hear(m.Refused(0, "name", "a worker is named 'me' already"))
    assert (Phase.JOINED, None) == (inside.core.phase, inside.core.fatal)


def test_ones_own_last_life_has_the_name(at: Session) -> None:
    """An evicted worker's last renewal may be heard after its new join: it goes on asking, for two leases (SPEC §3.1.4)."""
    at.joined()
    lease = at.core.welcome.lease
    at.hear(m.Evicted(1))
    for _ in range(3):
        at.hear(m.Refused(0, "name", "a worker is named 'me' already"))
        said = at.after(lease / 2)
        assert (Phase.JOINING, None) == (at.core.phase, at.core.fatal)
        assert "Join" in kinds(said)
    at.after(lease / 2)
    at.hear(m.Refused(0, "name", "a worker is named 'me' already"))

    assert isinstance(at.core.fatal, ConfigError)


@pytest.mark.parametrize(("code", "kind"), [("mismatch", ShapeError), ("model", ConfigError)])
def test_a_model_that_is_refused(at: Session, code: str, kind: type[Exception]) -> None:
    """Whoever registered is told, and may register another one."""
    ticket = at.joined().call(calls.RegisterCalled, OTHER.description, lambda block: b"")
    at.hear(m.Refused(only(m.Register, at.said).request, code, "it differs"))
    assert (kind, "it differs") == (type(at.ended[ticket]), str(at.ended[ticket]))

    at.registered()
    assert at.core.fleet.running


def test_two_computations_of_a_layout(at: Session) -> None:
    """A coordinator whose digest differs is another shoal: going on would mix up blocks (SPEC §4.2.5)."""
    ticket = at.joined().call(calls.RegisterCalled, SMALL.description, lambda block: b"")
    at.answer(only(m.Register, at.said), m.Registered, 1, MIN_BLOCK_BYTES, "0" * 64)

    assert isinstance(at.ended[ticket], VersionError)
    assert Phase.CLOSED is at.core.phase


def test_a_coordinator_that_forgot_a_data_set(at: Session) -> None:
    """It hears of it again before the claim is repeated, with the epoch that this worker is in (SPEC §9.5)."""
    first, claim = at.registered().claim()
    at.answer(claim, m.Leased, 11, 1, 4, 8, 1)
    assert calls.Lease(1, 11, 1, 4, 8) == at.ended[first]
    ticket = at.call(calls.ClaimCalled, "data", 2)
    said = at.hear(m.Refused(only(m.Claim, at.said).request, "undeclared", "?"))
    assert [m.Declare(1, said[0].request, "data", 40, 2, 4, 0, 1), m.Claim(1, said[1].request, "data", 2)] == said
    at.answer(said[0], m.Declared, 4)
    at.answer(said[1], m.Exhausted)

    assert None is at.ended[ticket]


def test_a_restarted_coordinator_is_told_of_data_sets(at: Session) -> None:
    """Evicted by one, welcomed by another: the welcome's run says that nothing is known there."""
    ticket, claim = at.registered().claim()
    at.hear(m.Evicted(1))
    at.event(Linked(COORDINATOR))
    said = [message for message in at.welcome(RUN + 1) if isinstance(message, m.Declare | m.Claim)]

    assert ["Declare", "Claim"] == kinds(said)
    assert claim.request < said[1].request  # a late answer to the old life's must find nobody
    at.answer(said[1], m.Leased, 3, 0, 0, 4, 0)
    assert calls.Lease(2, 3, 0, 0, 4) == at.ended[ticket]


def test_a_parked_claim_holds_nobody_up(at: Session) -> None:
    """It counts the worker out (SPEC §7); what it waits for is in the log and in the time-out's text."""
    ticket, claim = at.registered().claim()
    said = at.hear(m.Waiting(claim.request, 0, 0, "data that others work on"))

    assert "Pause" in kinds(said)
    assert "waiting for data that others work on" == at.core.why_waiting()
    for _ in range(25):  # the coordinator speaks: it is not lost
        at.after(1)
        at.hear(m.Waiting(claim.request, 0, 0, "data that others work on"))
    assert ticket not in at.ended
    assert 3 == at.logged.count("waiting for data that others work on")
    at.answer(claim, m.Exhausted)
    assert "the servers answer" == at.core.why_waiting()


def test_waiting_for_workers_is_no_rest(at: Session) -> None:
    """`wanted` says that others are awaited, not data: the worker stays counted in. One for no request of ours is nothing."""
    _, claim = at.registered().claim()
    assert [] == at.hear(m.Waiting(claim.request + 50, 0, 0, "something"))
    assert [] == at.hear(m.Waiting(claim.request, 1, 3, "workers"))

    assert at.core.fleet.running
    assert "waiting for workers: 1 of 3 are here" == at.core.why_waiting()


def test_a_silent_coordinator_is_lost_in_time(at: Session) -> None:
    """What waits for it ends after a lease; what waits for shards does not, and later requests are not told at once."""
    claimed, _ = at.registered().claim()
    pulled = at.pull()
    for _ in range(29):
        at.after(0.5)
        at.hear(m.Alive(1, SHARD, 2, 0, "slow", 0, True, (1,)), 0)
    assert {} == {ticket: end for ticket, end in at.ended.items() if ticket in (claimed, pulled)}
    at.after(1)

    error = at.ended[claimed]
    assert (ServerLost, "boss:7450") == (type(error), error.address)
    assert 15 <= error.age < 17
    assert pulled not in at.ended
    late = at.call(calls.ClaimCalled, "data", 2)
    at.after(5)
    assert late not in at.ended


def test_what_a_wait_was_for(at: Session) -> None:
    """At a time-out: nobody there, nobody answers, a shard or the coordinator is silent, or somebody is just slow."""

    def told() -> str:
        error = at.core.timed_out(5.0, at.now)
        return f"{type(error).__name__}: {error}"

    at.open()
    assert "WaitTimeout: not done after 5 s: the coordinator at boss:7450 cannot be reached" in told()
    at.event(Linked(COORDINATOR))
    assert "boss:7450 is connected but does not answer" in told()
    at.event(Unlinked(COORDINATOR))
    assert "cannot be reached" in told()
    at.event(Linked(COORDINATOR))
    at.registered()
    at.pull()
    assert "WaitTimeout: not done after 5 s: the servers answer" in told()
    at.after(2.5)
    assert "ServerLost: shard 0 at host:1000 has not answered for 2.5 s" in told()
    at.hear(m.Alive(at.life, SHARD, 2, 0, "turtle", 3, True, (1,)), 0)
    assert "WaitTimeout: not done after 5 s: this worker is at clock 0, turtle is at clock 3" in told()
    at.event(Unlinked(0))
    assert "no connection to shard 0 at host:1000" in told()
    at.event(Linked(0))
    at.claim()
    for _ in range(3):
        at.hear(m.Alive(at.life, SHARD, 2, 0, "turtle", 3, True, (1,)), 0)
        at.after(0.9)
    assert "ServerLost: the coordinator at boss:7450 has not answered for" in told()


def test_an_evicted_worker_begins_again(at: Session) -> None:
    """What was not acknowledged is lost and said so; pulls and claims go on under the new life; leases of the old one are void."""
    at.registered()
    lost, pulled, claimed = at.push(), at.pull(), at.claim()[0]
    assert m.Join(2, "me", 0, "here", 5) in at.hear(m.Evicted(1))
    refused = at.push()

    assert [WorkerEvicted] * 2 == [type(at.ended[ticket]) for ticket in (lost, refused)]
    assert not {pulled, claimed} & set(at.ended)
    assert (1, 2, 0) == (at.core.stats.evictions, at.core.stats.lost, at.core.stats.clock)
    assert "declared dead" in at.logged[0]
    assert [] == at.hear(m.Evicted(1))  # of the old life: no news
    at.event(calls.DoneCalled(calls.Lease(1, 11, 0, 0, 4), 4, True))
    assert not {"Complete"} & set(kinds(at.welcome() + at.after(2)))


def test_renewals_say_what_was_done_once(at: Session) -> None:
    """At least once a second; after an eviction the new life tells what the old one's last heard renewal had not."""
    at.registered()
    for _ in range(2):
        at.push()
    at.event(calls.LogCalled({"loss": 0.5}))
    renewals = [message for message in at.after(2) if isinstance(message, m.Renew)]
    assert [(1, 1, 2, True, (("loss", 0.5),), 2.0)] * 2 == [
        (r.incarnation, r.epoch, r.clock, r.entered, r.logged, dict(r.stats)["steps"]) for r in renewals
    ]
    at.hear(m.Renewed(1, 1))
    at.push()
    at.hear(m.Evicted(1))
    at.welcome()
    (renewed,) = (message for message in at.after(1.2) if isinstance(message, m.Renew))

    assert (2, 0, False, 1.0) == (renewed.incarnation, renewed.clock, renewed.entered, dict(renewed.stats)["steps"])


def test_a_process_that_was_stopped_blames_nobody(at: Session) -> None:
    """After SIGCONT the servers get their time to answer: they were not silent, we were deaf."""
    ticket = at.registered().pull()
    at.after(1)
    at.now += 60
    at.event(Tick())
    at.after(13)
    assert ticket not in at.ended
    at.after(3)

    assert isinstance(at.ended[ticket], ServerLost)


def test_goodbye(at: Session) -> None:
    """It carries the last news, is repeated, and is over when it is heard, also when only the eviction comes of it."""
    for answer in (lambda asked: m.Left(1, asked.request), lambda asked: m.Evicted(1)):
        one = Session().registered()
        one.event(calls.LogCalled({"loss": 0.5}))
        ticket = one.call(calls.CloseCalled)
        leave = only(m.Leave, one.said)
        assert (("loss", 0.5),) == leave.logged
        assert "Leave" in kinds(one.after(1.5))
        one.hear(answer(leave))
        assert None is one.ended[ticket]
        assert [] == one.after(5)
    early = at.open()
    assert None is at.ended[at.call(calls.CloseCalled)]
    assert early not in at.ended


def test_a_cancelled_call_is_nobodys(at: Session) -> None:
    """Its answer, when it comes, ends no ticket; the request is not repeated; what came after it is answered."""
    opened = at.open()
    at.event(calls.Cancelled(opened))
    at.registered()
    gone, claim = at.claim()
    pulled, pushed = at.pull(), at.push()
    for ticket in (gone, pulled, pushed):
        at.event(calls.Cancelled(ticket))
    assert "Claim" not in kinds(at.after(2))
    at.answer(claim, m.Exhausted)
    at.ack(3)
    at.hear(m.Values(at.life, SHARD, 1, 0, 1, 4, 0, 0, 0, (0,), (bytes(8),)), 0)

    assert not {opened, gone, pulled, pushed} & set(at.ended)
