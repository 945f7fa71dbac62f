"""All shards as a worker's core sees them: entering the clocks, pushing, pulling, probing (SPEC §5, §6).

Rules
- A worker is counted in everywhere or nowhere.
- `pursue` looks at what is wanted and at what is the case, and sends the next message toward it.
- What a stream had not had acknowledged when it ended is lost, and whoever waits for it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf

from ..protocol.codecs import RAW, size
from ..protocol.cuts import CutKept, Frozen, NoCut, Piece
from ..protocol.errors import ProtocolError, ServerLost, ShapeError
from ..protocol.layout import Layout
from ..protocol.messages import (
    Ack,
    Alive,
    Enter,
    Fill,
    Greeting,
    Hello,
    Message,
    Pause,
    Probe,
    Push,
    Shared,
    Start,
    Stranger,
    Values,
)
from ..protocol.records import Place
from ..protocol.schema import Buffer
from .calls import EarlyCalled, Part, PullCalled, Pulled, PushCalled
from .cutter import Cutter
from .failures import lost_error, refusal
from .link import Link, Read
from .offers import Offers
from .outgoing import Outgoing
from .parts import in_region, packed
from .stats import Stats

RETRY = 1.0
PROBE_EVERY = 1.0
WARN_EVERY = 10.0


@dataclass(slots=True)
class _Pulling:
    """A pull under way, over all its shards. `since` is when it was asked for."""

    call: PullCalled
    since: float
    warn_at: float
    clock: int = 0
    open: set[int] = field(default_factory=set)
    blocks: dict[int, Buffer] = field(default_factory=dict)
    versions: dict[int, tuple[int, int]] = field(default_factory=dict)
    min_clock: float = inf


@dataclass(slots=True)
class _Pushing:
    """A push under way: how many operations are not acknowledged, and the first refusal."""

    left: int
    error: Exception | None = None


class Fleet:
    """The links to the shards, for one incarnation of the worker after the other."""

    def __init__(self, out: Outgoing, stats: Stats) -> None:
        self.links: dict[int, Link] = {}
        self.layout: Layout | None = None
        self._participants: list[int] = []
        self.registered = False
        self.running = False
        """Counted in at every shard."""
        self.active = False
        """Does the worker want to be counted in?"""
        self.floor = 0
        """The least clock to start at."""
        self.enterers: list[int] = []
        """Tickets that wait for `running`."""
        self._out, self._stats = out, stats
        self._incarnation = self._run = 0
        self._epoch: int | None = None
        self._to_fill: dict[int, int] = {}
        self._source: Callable[[int], Buffer] = lambda block: b""
        self._requests = 0
        self._pulls: dict[int, _Pulling] = {}
        self._pushes: dict[int, _Pushing] = {}
        self.offers = Offers(out)
        self.cutter = Cutter(out, self)

    # --- lives of the worker and of shards

    def begin(self, incarnation: int, error: Exception) -> None:
        """A new incarnation of the worker: the old streams end with `error`, pulls are asked again."""
        for link in self.links.values():
            self._end_stream(link, error)
            link.reset()
            link.reads.clear()
            link.place = Place(link.place.index, 0, link.place.host, link.place.port, link.place.key)
        for pulling in self._pulls.values():
            pulling.open.clear()
        self._incarnation, self._epoch = incarnation, None
        self.cutter.begin(incarnation)
        self.registered = self.running = False
        self._to_fill.clear()
        self._stats.clock = 0

    def joined(self, run: int, epoch: int, places: Iterable[Place], now: float) -> None:
        """The coordinator has admitted this incarnation."""
        self._run, self._epoch = run, epoch
        self.place(places, now)

    def place(self, places: Iterable[Place], now: float) -> None:
        """The shards are at these places now."""
        for place in places:
            old = self.links.get(place.index)
            same_door = old is not None and (old.place.host, old.place.port, old.place.key) == (
                place.host,
                place.port,
                place.key,
            )
            if old is not None and same_door and place.incarnation in (old.place.incarnation, old.shard):
                old.place = place  # the link may have met this life before the coordinator told of it
                continue
            link = Link(place, now)
            if old is not None:
                self._end_stream(old, self._restarted(old))
                link.reads = old.reads
                link.connected = same_door and old.connected
            self.links[place.index] = link
            if not same_door:
                self._out.open(place)

    def has_layout(self, layout: Layout, source: Callable[[int], Buffer]) -> None:
        """The coordinator has registered the model. `source` gives a block's values if a shard is to be filled."""
        self.layout, self._source, self.registered = layout, source, True
        self._participants = [index for index, blocks in enumerate(layout.by_shard) if blocks]

    def fill(self, shards: Sequence[int], epoch: int) -> None:
        """These shards are to be filled by this worker, says the view of `epoch`."""
        self._to_fill = dict.fromkeys(shards, epoch)

    # --- what users' threads ask

    def push(self, call: PushCalled) -> None:
        """`running` must be true."""
        by_shard: dict[int, list[Part]] = {}
        for part in call.parts:
            by_shard.setdefault(part.shard, []).append(part)
        operations = 0
        for index in self.participants() if call.advance else by_shard:
            link = self.links[index]
            parts, early = by_shard.get(index, []), False
            if call.advance:
                parts, early = link.end_step(parts, call.early)
            parts = parts or [Part(index, (), (), ())]
            region = call.region if call.region and link.shares(call.region) else 0
            for part in parts:
                self._stats.bytes_pushed += sum(map(len, part.buffers))
                if part.codec:
                    region = 0
            if region:
                parts = in_region(parts)
            outbox, left = link.outbox, len(parts)
            operations += left
            for part in parts:
                left -= 1
                head = (self._incarnation, link.shard, outbox.next, self._stats.clock, call.advance and not left)
                what, seen = (region, part.codec, part.blocks, part.ranges, early and not left), link.seen(part.blocks)
                outbox.add(Push(*head, call.examples, call.hyper, *what, seen, part.buffers), call.ticket)
        if operations:
            self._pushes[call.ticket] = _Pushing(operations)
        else:
            self._out.resolve(call.ticket, None)
        if call.advance:
            self._stats.clock += 1
            self._stats.steps += 1
            self._stats.examples += call.examples

    def early(self, call: EarlyCalled) -> None:
        """Blocks of a step that is not over travel; those that cannot go with the rest of the step."""
        for part in call.parts:
            link = self.links.get(part.shard)
            if not self.running or link is None or not link.started or link.shares(call.region):
                continue
            head = (self._incarnation, link.shard, link.outbox.next, self._stats.clock, False)
            seen = link.seen(part.blocks)
            link.outbox.add(Push(*head, 0.0, (), 0, part.codec, part.blocks, (), True, seen, part.buffers))
            link.left_early(part.blocks)
            size = sum(map(len, part.buffers))
            self._stats.bytes_pushed += size
            self._stats.bytes_early += size

    def pull(self, call: PullCalled, now: float) -> None:
        if not call.blocks:  # of nothing
            return self._out.resolve(call.ticket, Pulled({}, {}, self._stats.clock, self._stats.min_clock))
        self._pulls[call.ticket] = _Pulling(call, now, now + WARN_EVERY)

    def pause(self) -> None:
        """Be counted out everywhere."""
        if self.active and self.registered:
            self.active = self.running = False
            for index in self.participants():
                link = self.links[index]
                link.started, link.entering, link.entered = False, 0, None
                link.early.clear()

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this ticket any more."""
        self._forget_pull(ticket)
        self._pushes.pop(ticket, None)
        self.offers.cancel(ticket)
        self.cutter.cancel(ticket)
        if ticket in self.enterers:
            self.enterers.remove(ticket)

    # --- what the shards say

    def linked(self, index: int, now: float) -> None:
        link = self.links[index]
        link.connected, link.asked_at = True, -inf
        self._stats.retries += link.rewind(now)
        for request in link.reads:
            self._ask(link, request, now)

    def unlinked(self, index: int) -> None:
        self.links[index].connected = False

    def received(self, index: int, message: Message, now: float) -> None:
        link = self.links.get(index)
        act = _ACTS.get(type(message))
        if link is None or act is None:
            return
        if message.shard != link.shard and not isinstance(message, Greeting | Stranger):  # type: ignore[union-attr]
            return  # an earlier life of the shard
        act(self, link, message, now)
        link.heard(now)

    def _greeting(self, link: Link, message: Greeting, now: float) -> None:
        if link.shard == message.shard or message.index != link.place.index:
            return  # another shard may have bound this address; the coordinator will say where ours is
        self._end_stream(link, self._restarted(link))  # with what was pushed while nobody was there
        link.reset(message.shard)
        for request in link.reads:
            self._ask(link, request, now)

    def _stranger(self, link: Link, message: Stranger, now: float) -> None:
        if link.shard == message.shard:
            return  # it speaks of what an earlier life was sent; this one has greeted us since
        self._end_stream(link, self._restarted(link))
        link.reset()

    def _ack(self, link: Link, ack: Ack, now: float) -> None:
        self._clock(link, ack.min_clock)
        refusals = {seq: (code, text) for seq, code, text in ack.refusals}
        for seq, ticket in link.outbox.acknowledge(ack.seq):
            pushing = self._pushes.get(ticket)
            if pushing is None:
                if seq in refusals and not ticket:
                    self._out.note("error", f"shard {link.place.index} refused operation {seq}: {refusals[seq][1]}")
                continue
            pushing.left -= 1
            if seq in refusals and pushing.error is None:
                pushing.error = refusal(*refusals[seq])
            if pushing.left == 0:
                del self._pushes[ticket]
                if pushing.error:
                    self._out.fail(ticket, pushing.error)
                else:
                    self._out.resolve(ticket, None)
        if link.entering and link.entered is None and ack.seq >= link.entering:
            link.entered = ack.min_clock
        if ack.gap:
            self._stats.retries += link.rewind(now, at_most_every=PROBE_EVERY / 4)

    def _values(self, link: Link, values: Values, now: float) -> None:
        self._clock(link, values.min_clock)
        read = link.reads.get(values.request)
        pulling = self._pulls.get(read.ticket) if read is not None else None
        if read is None or pulling is None:
            return
        wrong = self._take(pulling, values)
        if wrong:
            return self._fail_pull(read.ticket, ShapeError(f"shard {link.place.index} answered with {wrong}"))
        if not read.take(values):
            return
        del link.reads[values.request]
        pulling.versions[link.place.index] = (link.shard, values.version)
        link.has_read(read.blocks, values.version)
        pulling.min_clock = min(pulling.min_clock, values.min_clock)
        pulling.open.discard(link.place.index)
        if not pulling.open:
            del self._pulls[read.ticket]
            least = int(pulling.min_clock)
            if self.running:
                self._stats.saw(pulling.clock - least)
            self._out.resolve(read.ticket, Pulled(pulling.blocks, pulling.versions, pulling.clock, least))

    def _take(self, pulling: _Pulling, values: Values) -> str:
        """Blocks go where the pull wants them. Returns what is wrong with them."""
        assert self.layout is not None
        known, sink = self.layout.blocks, pulling.call.sink
        for block, buffer in zip_longest(values.blocks, values.buffers):
            if block >= len(known):
                return f"a block {block} that does not fit the model"
            codec = values.codec if self.layout.coded[block] else RAW
            nbytes = size(codec, known[block].elements) if codec else known[block].nbytes
            if buffer is not None and (len(buffer) != nbytes or (codec and sink is None)):
                return f"a block {block} that does not fit the model"
            self._stats.bytes_pulled += nbytes
            if buffer is not None and sink is not None:
                try:
                    sink(block, buffer, codec)
                except ProtocolError as error:
                    return f"a block {block} that cannot be read: {error.what}"
            elif buffer is not None:
                pulling.blocks[block] = buffer
        return ""

    def _alive(self, link: Link, message: Alive, now: float) -> None:
        self._clock(link, message.min_clock)
        link.alive(message)
        if message.seq < link.sent_at_probe:
            self._stats.retries += link.rewind(now, message.seq)
        for request, read in link.reads.items():
            if request not in message.parked and read.sent_at < link.asked_at:
                self._stats.retries += 1
                self._ask(link, request, now)

    # --- pursuing what is wanted

    def pursue(self, now: float) -> None:
        if self._epoch is None:
            return
        for index, link in self.links.items():
            if not link.shard and link.may_ask(now, RETRY):
                self._out.send(index, Hello(self._incarnation, self._run, self._epoch))
        if self.registered:
            self._fill()
            self._enter()
            self.offers.pursue(self._incarnation, self._owners(), now)
        self.cutter.pursue(now)
        self.flow(now)

    def flow(self, now: float) -> None:
        """Send what may be sent of pushes and pulls: all that there is to pursue while the fleet is `settled`."""
        if self._pulls and self.registered and (self.running or not self.active):
            for pulling in self._pulls.values():
                if not pulling.open:
                    self._issue(pulling, now)
        for index, link in self.links.items():
            if link.outbox.unsent and link.open:  # of many shards few have anything
                for operation in link.outbox.due():
                    self._out.send(index, operation)

    @property
    def settled(self) -> bool:
        """Is this worker known and counted in everywhere, with nothing on offer that is not answered?"""
        return (
            self.running
            and not self.enterers
            and all(index in self.links and self.links[index].filled_by_us for index in self._to_fill)
            and all(link.shard and link.started and self.offers.answered_by(link) for link in self._owners())
            and self.greeted
        )

    def _owners(self) -> list[Link]:
        """The links to the shards that own blocks."""
        return [self.links[index] for index in self.participants() if index in self.links]

    @property
    def greeted(self) -> bool:
        return bool(self.links) and all(link.shard for link in self.links.values())

    def participants(self) -> list[int]:
        """The shards that own blocks."""
        return self._participants

    def _fill(self) -> None:
        assert self.layout is not None
        for index, epoch in self._to_fill.items():
            link = self.links.get(index)
            if link is None or not link.shard or link.filled_by_us or index >= self.layout.shards:
                continue
            link.filled_by_us = True
            for blocks in packed((block.index, block.nbytes) for block in self.layout.by_shard[index]):
                values = tuple(map(self._source, blocks))
                link.outbox.add(Fill(self._incarnation, link.shard, link.outbox.next, epoch, blocks, values))

    def _enter(self) -> None:
        """Be counted in or out (SPEC §6.1.2); tell a shard that was restarted how things are."""
        indices = self.participants()
        if not all(index in self.links and self.links[index].shard for index in indices):
            return
        links = [self.links[index] for index in indices]
        if self.running or not self.active:
            for link in links:
                if not link.started:
                    link.started = True
                    kind = Start if self.running else Pause
                    link.outbox.add(kind(self._incarnation, link.shard, link.outbox.next, self._stats.clock))
            if self.running:
                self._out.resolve_all(self.enterers, self.layout)
            return
        for link in links:
            if not link.entering:
                link.outbox.add(Enter(self._incarnation, link.shard, link.outbox.next, self._stats.clock))
                link.entering = link.outbox.last
        if any(link.entered is None for link in links):
            return
        self._stats.clock = max([self._stats.clock, self.floor, *(link.entered or 0 for link in links)])
        for link in links:
            link.started = True
            link.outbox.add(Start(self._incarnation, link.shard, link.outbox.next, self._stats.clock))
        self.running = True
        self._out.resolve_all(self.enterers, self.layout)

    def _issue(self, pulling: _Pulling, now: float) -> None:
        pulling.clock, pulling.min_clock = self._stats.clock, inf
        pulling.blocks, pulling.versions = {}, {}
        for index, blocks in pulling.call.blocks.items():
            self._requests += 1
            pulling.open.add(index)
            held = pulling.call.held.get(index, (0, 0))
            self.links[index].reads[self._requests] = Read(
                pulling.call.ticket, pulling.clock, blocks, held, pulling.call.region, pulling.call.codec
            )
            self._ask(self.links[index], self._requests, now)

    def _ask(self, link: Link, request: int, now: float) -> None:
        if link.open:
            self._out.send(link.place.index, link.pull(request, self._incarnation, now))

    # --- silence

    def watch(self, now: float, timeout: float) -> None:
        """Probe shards that owe an answer, give up on those that stay silent, say whom a pull waits for."""
        for index, link in self.links.items():
            owed = link.owed(now)
            if owed >= timeout:
                self._lost(link, now)
            elif owed >= PROBE_EVERY and link.shard and link.may_ask(now, PROBE_EVERY):
                link.sent_at_probe = link.outbox.sent
                self._out.send(index, Probe(self._incarnation, link.shard))
        for pulling in self._pulls.values():
            if now >= pulling.warn_at:
                pulling.warn_at = now + WARN_EVERY
                self._out.note("warning", f"a pull has waited for {now - pulling.since:.0f} s: {self.why_waiting()}")

    def why_waiting(self) -> str:
        """What this worker waits for, in words; "" if no shard is to blame."""
        silent = [link for link in self.links.values() if not link.open]
        if silent:
            return "no connection to " + ", ".join(f"shard {link.place.index} at {link.address}" for link in silent)
        holdups = sorted({link.holdup for link in self.links.values()} - {""})
        if holdups:
            return f"this worker is at clock {self._stats.clock}, {'; '.join(holdups)}"
        return self.cutter.why_waiting()

    def silent(self, now: float, seconds: float) -> Link | None:
        """A shard that owes an answer for at least so long."""
        return next((link for link in self.links.values() if link.owed(now) >= seconds), None)

    def _lost(self, link: Link, now: float) -> None:
        error = lost_error(f"shard {link.place.index}", link.address, now - link.heard_at)
        self.fail_link(link, error)
        self._out.fail_all(self.enterers, error)
        link.given_up()

    def fail_link(self, link: Link, error: Exception) -> None:
        """Whoever waits for this shard is told."""
        for ticket in {read.ticket for read in link.reads.values()}:
            self._fail_pull(ticket, error)
        for ticket in link.outbox.tickets():
            if self._pushes.pop(ticket, None) is not None:
                self._out.fail(ticket, error)

    def fail_everybody(self, error: Exception) -> None:
        for ticket in [*self._pulls]:
            self._fail_pull(ticket, error)
        for ticket in [*self._pushes]:
            del self._pushes[ticket]
            self._out.fail(ticket, error)
        self.offers.fail(error)
        self.cutter.fail(error)
        self._out.fail_all(self.enterers, error)

    @property
    def busy(self) -> bool:
        """Is a tick wanted soon?"""
        return bool(
            self._pulls
            or self._pushes
            or self.enterers
            or self.offers.busy
            or self.cutter.busy
            or any(link.busy for link in self.links.values())
        )

    # --- small things

    def marks(self) -> dict[int, tuple[int, int]]:
        """How far each stream is now: (the shard's incarnation, the highest number given)."""
        return {index: (link.shard, link.outbox.last) for index, link in self.links.items()}

    def passed(self, marks: dict[int, tuple[int, int]]) -> bool:
        """Is everything up to `marks` acknowledged? A stream that has ended since has nothing left to wait for."""
        return all(
            index not in self.links or self.links[index].shard != shard or self.links[index].outbox.acknowledged >= last
            for index, (shard, last) in marks.items()
        )

    def _clock(self, link: Link, min_clock: int) -> None:
        if self._stats.min_clock == link.min_clock == min_clock:
            return
        link.min_clock = max(link.min_clock, min_clock)
        self._stats.min_clock = min((self.links[index].min_clock for index in self.participants()), default=0)

    def _end_stream(self, link: Link, error: Exception) -> None:
        tickets = link.outbox.tickets()
        self._stats.lost += len(tickets)
        for ticket in tickets:
            if self._pushes.pop(ticket, None) is not None:
                self._out.fail(ticket, error)

    def _restarted(self, link: Link) -> ServerLost:
        return ServerLost(
            f"shard {link.place.index} at {link.address} was restarted and has lost its state; this update is lost",
            address=link.address,
        )

    def _fail_pull(self, ticket: int, error: Exception) -> None:
        self._forget_pull(ticket)
        self._out.fail(ticket, error)

    def _forget_pull(self, ticket: int) -> None:
        self._pulls.pop(ticket, None)
        for link in self.links.values():
            for request in [r for r, read in link.reads.items() if read.ticket == ticket]:
                del link.reads[request]

    def refused_pull(self, index: int, request: int, text: str) -> None:
        """A shard has refused a pull."""
        read = self.links[index].reads.get(request) if index in self.links else None
        if read is not None:
            self._fail_pull(read.ticket, ShapeError(f"a pull was refused: {text}"))


_ACTS: dict[type[Message], Callable[..., None]] = {
    Greeting: Fleet._greeting,
    Stranger: Fleet._stranger,
    Ack: Fleet._ack,
    Values: Fleet._values,
    Alive: Fleet._alive,
    Shared: lambda fleet, link, message, now: fleet.offers.answered(link, message),
    **dict.fromkeys((Frozen, CutKept, Piece, NoCut), lambda fleet, *heard: fleet.cutter.received(*heard)),
}
