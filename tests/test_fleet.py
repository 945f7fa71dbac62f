"""The shards as a worker's core sees them: pushing, refusals, restarts, moves, silence (rung T0, SPEC §5, §6).

How it enters, rests and is evicted is looked at by the simulation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cores import carried, kinds, only

from shoal.protocol import messages as m
from shoal.protocol.codecs import BF16, INT8, Codec
from shoal.protocol.coding import decode, encode
from shoal.protocol.effects import Fail, Log, Open, Resolve, Send
from shoal.protocol.errors import NonFiniteError, ServerLost, ShapeError, ShoalError
from shoal.protocol.layout import MIN_BLOCK_BYTES, lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD
from shoal.worker.calls import Part, PullCalled, PushCalled
from shoal.worker.fleet import PROBE_EVERY, WARN_EVERY, Fleet
from shoal.worker.outgoing import Outgoing
from shoal.worker.parts import PART_BYTES, packed
from shoal.worker.stats import Stats

ME, RUN, TIMEOUT = 1, 7, 10.0
ENTERER = 50


def place(index: int, incarnation: int = 0, host: str = "host") -> m.Place:
    return m.Place(index, incarnation or 900 + index, host, 1000 + index, "")


class Bench:
    """A fleet of greeted shards (incarnations 900, 901, …), each with one block unless the model is small."""

    def __init__(self, shards: int = 2, elements: int = 0) -> None:
        self.out, self.stats, self.now = Outgoing(), Stats(), 100.0
        self.fleet = Fleet(self.out, self.stats)
        self.layout = lay_out(
            ModelSpec((Tensor("w", "float32", (elements or 1024 * shards,)),), (SGD(),)), shards, MIN_BLOCK_BYTES
        )
        self.said: list[tuple[int, Any]] = []
        self.ended: dict[int, Any] = {}
        self.noted: list[str] = []
        self.opened: list[Open] = []
        self.fleet.begin(ME, ShoalError("evicted"))
        self.fleet.joined(RUN, 1, [place(index) for index in range(shards)], self.now)
        for index in range(shards):
            self.fleet.linked(index, self.now)
        self.hear(*((index, m.Greeting(ME, 900 + index, index)) for index in range(shards)))

    def look(self) -> list[tuple[int, Any]]:
        """Pursue what is wanted. What is said, by shard, as it is read there."""
        self.fleet.pursue(self.now)
        said = []
        for effect in self.out.take():
            match effect:
                case Send(peer, message):
                    assert isinstance(peer, int)
                    said.append((peer, carried(message)))
                case Resolve(ticket, result) | Fail(ticket, result):
                    assert ticket not in self.ended
                    self.ended[ticket] = result
                case Log(_, text):
                    self.noted.append(text)
                case Open():
                    self.opened.append(effect)
        self.said += said
        return said

    def hear(self, *heard: tuple[int, Any]) -> list[tuple[int, Any]]:
        for index, message in heard:
            self.fleet.received(index, carried(message), self.now)
        return self.look()

    def after(self, seconds: float) -> list[tuple[int, Any]]:
        """Time passes, half a second at a time."""
        said, until = [], self.now + seconds
        while self.now < until:
            self.now = min(self.now + 0.5, until)
            self.fleet.watch(self.now, TIMEOUT)
            said += self.look()
        return said

    def registered(self) -> list[tuple[int, Any]]:
        """The model is registered and this worker wants to be counted in."""
        self.fleet.has_layout(self.layout, lambda block: bytes(4096))
        self.fleet.active = True
        self.fleet.enterers.append(ENTERER)
        return self.look()

    def running(self) -> Bench:
        """Counted in at clock 0; operations 1 and 2 of each stream are acknowledged."""
        self.registered()
        for seq in (1, 2):
            self.hear(*((index, self.ack(index, seq)) for index in self.fleet.participants()))
        for record in (self.said, self.opened, self.ended):
            record.clear()
        return self

    def ack(self, index: int, seq: int, min_clock: int = 0, *refusals: Any, gap: bool = False, shard: int = 0) -> m.Ack:
        return m.Ack(ME, shard or 900 + index, seq, gap, min_clock, refusals)

    def push(self, ticket: int, *shards: int, advance: bool = True) -> list[tuple[int, Any]]:
        parts = tuple(Part(shard, (shard,), (), (bytes(4096),)) for shard in shards)
        self.fleet.push(PushCalled(ticket, parts, advance, 2.0, ()))
        return self.look()

    def pull(self, ticket: int, *shards: int, held: Any = None) -> list[tuple[int, Any]]:
        self.fleet.pull(PullCalled(ticket, dict.fromkeys(shards, ()), held or {}), self.now)
        return self.look()

    def values(self, index: int, request: int, min_clock: int = 0) -> tuple[int, m.Values]:
        return index, m.Values(ME, 900 + index, request, 0, 1, 5, min_clock, 0, 0, (index,), (bytes(4096),))


@pytest.fixture
def bench() -> Bench:
    return Bench().running()


def test_entering_has_two_steps() -> None:
    """First `Enter` everywhere; when every shard has said its least clock, `Start` everywhere at the largest (SPEC §6.1.2)."""
    bench = Bench(shards=3)
    assert ["Enter"] * 3 == kinds([message for _, message in bench.registered()])
    assert [] == bench.hear((0, bench.ack(0, 1, 4)), (2, bench.ack(2, 1, 9)))
    assert {} == bench.ended
    assert [(index, m.Start(ME, 900 + index, 2, 9)) for index in range(3)] == bench.hear((1, bench.ack(1, 1, 7)))

    assert {ENTERER: bench.layout} == bench.ended
    assert (9, True) == (bench.stats.clock, bench.fleet.running)


def test_a_shard_without_blocks_takes_no_part() -> None:
    """A small model is on some shards only: the others are greeted, and not entered."""
    bench = Bench(shards=3, elements=4).running()

    assert [0] == bench.fleet.participants()
    assert [0] == [index for index, _ in bench.push(7, 0)]


def test_a_step_ends_once_at_every_shard(bench: Bench) -> None:
    """The last part that goes to a shard carries `advance`; a shard that gets no part is told by an empty push.

    Without `advance` a push goes to the shards of its blocks only; a push of nothing is over at once.
    """
    assert [(1, 0, False)] == [(index, push.clock, push.advance) for index, push in bench.push(5, 1, advance=False)]
    assert [] == bench.push(6, advance=False)
    assert (None, 0) == (bench.ended[6], bench.stats.clock)
    part = Part(1, (1,), (), (bytes(4096),))
    bench.fleet.push(PushCalled(7, (part, part), True, 2.0, ()))
    said = bench.look()

    assert [(0, 0, True), (1, 1, False), (1, 1, True)] == [(i, len(push.blocks), push.advance) for i, push in said]
    assert (1, 1, 2.0, 12288) == (bench.stats.clock, bench.stats.steps, bench.stats.examples, bench.stats.bytes_pushed)
    bench.hear((1, bench.ack(1, 5)))
    assert 7 not in bench.ended
    bench.hear((0, bench.ack(0, 3)))
    assert None is bench.ended[7]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("nonfinite", NonFiniteError), ("unfilled", ServerLost), ("shape", ShapeError), ("clock", ShapeError)],
)
def test_a_refused_push_is_an_error_of_its_kind(bench: Bench, code: str, kind: type[Exception]) -> None:
    """The first refusal is told once every shard has taken or refused its part; the stream goes on."""
    bench.push(7, 0, 1)
    bench.push(8, 0, 1)
    bench.hear((0, bench.ack(0, 3, 0, (3, code, "why"))))
    assert 7 not in bench.ended
    bench.hear((1, bench.ack(1, 4, 0, (3, "internal", "later"))), (0, bench.ack(0, 4, 0, (3, code, "why"))))

    assert kind is type(bench.ended[7])
    assert "why" in str(bench.ended[7])
    assert None is bench.ended[8]


def test_a_push_in_a_codec_travels_as_bytes(bench: Bench) -> None:
    """Though its region is shared with the shard; what is counted is what travels, and the raw part lies in the region."""
    for index in (0, 1):
        bench.fleet.links[index].shared[3] = ""
    parts = (Part(0, (0,), (), (bytes(2048),), BF16), Part(1, (1,), (), (bytes(4096),)))
    bench.fleet.push(PushCalled(7, parts, True, 2.0, (), 3))
    said = bench.look()

    assert [(0, BF16, 1), (3, 0, 0)] == [(push.region, push.codec, len(push.buffers)) for _, push in said]
    assert 2048 + 4096 == bench.stats.bytes_pushed


def test_a_pull_in_a_codec(bench: Bench) -> None:
    """The shard is asked for it, the sink decodes it, the bytes are counted as they come; an answer may yet be raw."""
    values = np.linspace(-1, 1, 1024, dtype=np.float32)
    found: dict[int, Any] = {}

    def sink(block: int, payload: Any, codec: int) -> None:
        found[block] = decode(codec, payload, 1024)

    bench.fleet.pull(PullCalled(5, {0: (), 1: ()}, {}, 0, sink, INT8), bench.now)
    assert [INT8, INT8] == [message.codec for _, message in bench.look()]
    payload = bytes(encode(Codec(INT8), values))
    bench.hear((0, m.Values(ME, 900, 1, 0, 1, 5, 0, 0, INT8, (0,), (payload,))))
    bench.hear((1, m.Values(ME, 901, 2, 0, 1, 5, 0, 0, 0, (1,), (values.tobytes(),))))

    assert {} == bench.ended[5].blocks
    assert (len(payload) + 4096) == bench.stats.bytes_pulled
    assert np.abs(found[0] - values).max() <= 1 / 250
    assert np.array_equal(values, found[1])


@pytest.mark.parametrize(
    ("codec", "payload"), [(INT8, bytes(1039)), (INT8, b"\xff" * 1040), (BF16, bytes(4096)), (0, bytes(2048))]
)
@pytest.mark.parametrize("with_sink", [True, False])
def test_an_answer_that_cannot_be_read_ends_the_pull(bench: Bench, codec: int, payload: bytes, with_sink: bool) -> None:
    """Of the wrong length or with what no encoder writes; in a codec that nobody here would decode. The reader is told."""
    sink = (lambda block, payload, codec: decode(codec, payload, 1024)) if with_sink else None
    bench.fleet.pull(PullCalled(5, {0: ()}, {}, 0, sink, codec), bench.now)
    bench.look()
    bench.hear((0, m.Values(ME, 900, 1, 0, 1, 5, 0, 0, codec, (0,), (payload,))))

    assert isinstance(bench.ended[5], ShapeError)
    assert "shard 0 answered with a block 0 that" in str(bench.ended[5])


def test_a_refusal_that_nobody_waits_for_is_logged_once(bench: Bench) -> None:
    """An operation of the core's own has no caller; `Ack` repeats its refusals, the log does not. A cancelled one is nobody's."""
    bench.push(7, 0)
    bench.fleet.cancel(7)
    bench.fleet.pause()
    bench.look()
    for _ in range(2):
        bench.hear((0, bench.ack(0, 4, 0, (3, "shape", "cancelled"), (4, "internal", "words"))))

    assert ["shard 0 refused operation 4: words"] == bench.noted


@pytest.mark.parametrize("greeted", [True, False])
def test_a_restarted_shard_is_a_new_stream(bench: Bench, greeted: bool) -> None:
    """What the old life had not acknowledged is lost and said so; reads are asked again of the new one; we are counted in there."""
    bench.push(7, 0, 1)
    bench.push(8, 0, 1)
    bench.pull(9, 0, held={0: (900, 44)})
    if not greeted:
        assert [] == [
            message for _, message in bench.hear((0, m.Stranger(ME, 900))) if not isinstance(message, m.Hello)
        ]
    said = bench.hear((0, m.Greeting(ME, 990, 0)))

    assert [m.Pull(ME, 990, 1, 2, 0, 0, 0, 0, ()), m.Start(ME, 990, 1, 2)] == [
        message for index, message in said if index == 0
    ]
    assert [ServerLost] * 2 == [type(bench.ended[ticket]) for ticket in (7, 8)]
    assert ("host:1000", 2) == (bench.ended[7].address, bench.stats.lost)
    bench.hear((1, bench.ack(1, 4)))  # the other shard's part of them is nobody's any more
    assert 9 not in bench.ended


def test_an_earlier_life_of_a_shard_is_not_heard(bench: Bench) -> None:
    """Its acknowledgements would end what the new one has not seen. A repeated greeting, or nonsense, begins nothing anew."""
    bench.push(7, 0, 1)
    assert [] == bench.hear((0, m.Greeting(ME, 900, 0)))
    bench.hear(
        (0, bench.ack(0, 99, shard=899)), (1, bench.ack(1, 99, shard=899)), (5, bench.ack(5, 9)), (0, m.Left(ME, 3))
    )

    assert 7 not in bench.ended


def test_shards_that_move(bench: Bench) -> None:
    """Another address is connected to; another life at the same address is greeted there; an unchanged place changes nothing."""
    bench.pull(7, 0, 1)
    bench.fleet.place([place(0, 900, "elsewhere"), place(1, 991)], bench.now)
    said = bench.look()

    assert [Open(0, "elsewhere", 1000, "")] == bench.opened
    assert [(1, m.Hello(ME, RUN, 1))] == said
    bench.fleet.linked(0, bench.now)
    assert [(0, m.Hello(ME, RUN, 1))] == bench.look()
    said = bench.hear((0, m.Greeting(ME, 900, 0)), (1, m.Greeting(ME, 991, 1)))
    assert {(0, "Pull"), (1, "Pull"), (0, "Start"), (1, "Start")} == {
        (index, type(message).__name__) for index, message in said
    }
    links = dict(bench.fleet.links)
    bench.fleet.place([place(0, 900, "elsewhere"), place(1, 991)], bench.now)
    assert links == bench.fleet.links


def test_a_restarted_shard_may_be_met_before_it_is_told_of(bench: Bench) -> None:
    """When the coordinator's word comes, the stream that has begun goes on: a second first number would pass for a repetition."""
    bench.hear((0, m.Stranger(ME, 990)))
    bench.hear((0, m.Greeting(ME, 990, 0)))
    link = bench.fleet.links[0]
    bench.fleet.place([place(0, 990), place(1)], bench.now)
    bench.hear((0, m.Stranger(ME, 990)))  # of what the old life was sent

    assert (link, 1, 990) == (bench.fleet.links[0], link.outbox.last, link.shard)


def test_a_shard_that_took_anothers_address_is_not_taken_for_it(bench: Bench) -> None:
    """Two restarted shards may change places; each says its index, and one shard never gets two streams."""
    bench.hear((0, m.Stranger(ME, 990)))
    bench.hear((0, m.Greeting(ME, 990, 1)))

    assert 0 == bench.fleet.links[0].shard


def test_what_is_pushed_while_nobody_is_there_is_lost_and_told(bench: Bench) -> None:
    """Between two lives of a shard a push has nobody to go to; the other shard's part is not the whole of it."""
    bench.hear((0, m.Stranger(ME, 990)))
    bench.push(7, 0, 1)
    bench.hear((1, bench.ack(1, 3)))
    assert 7 not in bench.ended
    bench.hear((0, m.Greeting(ME, 990, 0)))

    assert isinstance(bench.ended[7], ServerLost)


def test_a_silent_shard_is_probed_then_lost(bench: Bench) -> None:
    """A probe a second; at the time-out whoever waits for this shard is told, others wait on, and the next is not told at once."""
    bench.push(6, 0, 1)
    bench.hear((1, bench.ack(1, 3)))
    bench.pull(7, 0)
    bench.pull(8, 1)
    for _ in range(int(TIMEOUT)):
        bench.after(1.0)
        bench.hear((1, m.Alive(ME, 901, 3, 0, "slow", 0, True, (2,))))
    probes = [index for index, message in bench.said if isinstance(message, m.Probe)]
    assert 8 <= probes.count(0) <= TIMEOUT / PROBE_EVERY
    bench.after(1.0)

    assert {6, 7} == {ticket for ticket, end in bench.ended.items() if isinstance(end, ServerLost)}
    assert ("host:1000", True) == (bench.ended[7].address, 10 <= bench.ended[7].age <= 12)
    assert 8 not in bench.ended
    bench.pull(9, 0)
    bench.after(TIMEOUT / 2)
    assert 9 not in bench.ended
    entering = Bench()
    entering.registered()
    entering.after(TIMEOUT + 1)
    assert isinstance(entering.ended[ENTERER], ServerLost)


def test_what_a_probe_shows_missing_is_sent_again(bench: Bench) -> None:
    """Operations that the shard has not received, reads that it does not name; what was sent after the probe is left alone."""
    bench.push(6, 0, 1)
    bench.push(7, 0, 1)
    bench.pull(8, 0)
    bench.pull(9, 0)
    assert (0, m.Probe(ME, 900)) in bench.after(1.5)
    bench.pull(10, 0)
    said = bench.hear((0, m.Alive(ME, 900, 3, 0, "", 0, True, (1,))))

    assert [(0, "Pull", 2), (0, "Push", 4)] == [
        (index, type(message).__name__, getattr(message, "seq", 0) or message.request) for index, message in said
    ]
    assert 2 == bench.stats.retries
    bench.push(11, 0)
    assert [] == bench.hear((0, m.Alive(ME, 900, 4, 0, "", 0, True, (1, 2))))


def test_a_long_pull_says_whom_it_waits_for(bench: Bench) -> None:
    """In the log, each ten seconds: the slowest worker, a shard without weights, or a connection that is gone."""
    bench.pull(7, 0)
    for second in range(3 * int(WARN_EVERY) + 2):
        bench.after(1.0)
        bench.hear((0, m.Alive(ME, 900, 2, 0, "turtle", 3, second < WARN_EVERY + 2, (1,))))
        if second == 2 * WARN_EVERY + 1:
            bench.fleet.unlinked(1)

    assert [
        "a pull has waited for 10 s: this worker is at clock 0, turtle is at clock 3",
        "a pull has waited for 20 s: this worker is at clock 0, shard 0 has no weights yet",
        "a pull has waited for 30 s: no connection to shard 1 at host:1001",
    ] == bench.noted


def test_a_pull_may_be_answered_refused_or_cancelled(bench: Bench) -> None:
    """An answer is of the least clock that any shard saw; a refusal by one ends it whole; a cancelled one is not asked again."""
    bench.push(6, 0, 1)
    bench.pull(5, 0, 1)
    bench.hear(bench.values(0, 1, min_clock=0), bench.values(1, 2, min_clock=1))
    assert (1, 0, {1: 1}) == (bench.ended[5].clock, bench.ended[5].min_clock, bench.stats.staleness)
    bench.pull(7, 0, 1)
    bench.fleet.refused_pull(0, 3, "no such block")
    bench.fleet.refused_pull(0, 3, "again")
    bench.fleet.refused_pull(9, 3, "of no shard")
    bench.hear(bench.values(1, 4))
    assert "a pull was refused: no such block" == str(bench.ended[7])
    bench.pull(8, 0)
    bench.fleet.cancel(8)
    bench.fleet.unlinked(0)
    bench.fleet.linked(0, bench.now)
    assert "Pull" not in kinds([message for _, message in bench.look()])
    bench.fleet.enterers.append(9)
    bench.fleet.cancel(9)
    bench.look()
    assert not {8, 9} & set(bench.ended)


def test_a_reader_that_rests_is_not_stale(bench: Bench) -> None:
    """Counted out it may still read, and what it sees says nothing about the bound."""
    bench.push(6, 0)
    bench.fleet.pause()
    bench.pull(7, 0)
    bench.hear(bench.values(0, 1, min_clock=0))

    assert ({}, 1) == (bench.stats.staleness, bench.ended[7].clock)


def test_an_empty_shard_is_filled_once(bench: Bench) -> None:
    """With every block of it, from the source, naming the view that asked; and again when it was restarted."""
    bench.fleet.fill((1,), 6)
    fill = only(m.Fill, [message for _, message in bench.look()])
    bench.fleet.fill((1, 7), 6)

    assert (901, 6, (1,), 4096) == (fill.shard, fill.epoch, fill.blocks, len(fill.buffers[0]))
    assert [] == bench.look()
    assert "Fill" in kinds([message for _, message in bench.hear((1, m.Greeting(ME, 991, 1)))])


def test_blocks_are_packed_into_messages() -> None:
    """In order, within the limit of a message, at most 1,024; a block over the limit goes alone."""
    assert [(0, 1), (2,), (3,), (4,)] == list(
        packed([(0, 1), (1, PART_BYTES - 1), (2, 1), (3, PART_BYTES + 1), (4, 1)])
    )
    assert [1024, 1] == [len(run) for run in packed((index, 1) for index in range(1025))]
    assert [] == list(packed([]))


def test_a_push_says_what_it_was_computed_on(bench: Bench) -> None:
    """The version read last, of each shard; of a part, the least of its blocks'; of a new life, nothing (SPEC §13.1)."""

    def seen(ticket: int) -> list[int]:
        return [message.seen for _, message in bench.push(ticket, 0, 1, advance=False) if isinstance(message, m.Push)]

    assert [0, 0] == seen(1)
    bench.pull(2, 0, 1)
    bench.hear(bench.values(0, 1))
    assert [5, 0] == seen(3), "each shard's answer is taken in as it comes"
    bench.hear(bench.values(1, 2))
    assert [5, 5] == seen(4)

    bench.fleet.pull(PullCalled(5, {0: (0,)}, {}), bench.now)
    bench.look()
    bench.hear((0, m.Values(ME, 900, 3, 0, 1, 9, 0, 0, 0, (0,), (bytes(4096),))))
    link = bench.fleet.links[0]
    assert [9, 5] == seen(6)
    assert (5, 5, 9) == (link.seen((0, 7)), link.seen(()), link.seen((0,)))
    link.has_read((), 10)
    assert (10, 10) == (link.seen((0,)), link.seen((7,)))

    bench.hear((0, m.Stranger(ME, 950)), (0, m.Greeting(ME, 950, 0)))
    assert [0, 5] == seen(7)
