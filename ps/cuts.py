"""A shard's half of a consistent cut: it holds still, goes up to where the others are, keeps the values, goes on (SPEC §15).

Rules
- It holds still for `HOLD` seconds at most, whatever its reader does; what is pushed meanwhile waits in its stream.
- One cut is made at a time, and one is kept: copies are made of blocks that change while it is.
- Of what a worker pushed at once, all of a step is in a cut or nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from ..protocol.cuts import CutKept, CutMessage, Freeze, Frozen, NoCut, Piece, Release, Settle, Take
from ..protocol.effects import Effect, Peer, Send, Stream
from ..protocol.messages import Enter, Fill, Operation, Pause, Push, Start
from ..protocol.phases import closed
from .answers import parts_of
from .store import Shot

if TYPE_CHECKING:
    from .shard import Shard

HOLD = 2.0
"""Seconds that steps may wait for a cut."""
READING = 2.0
"""Seconds since a cut was asked for last, in which no other takes its place."""
KEEP = 30.0
"""Seconds for which a cut is kept that nobody asks for."""
REMEMBERED = 4096
"""Workers that have left and are known to have."""
FROM_WORKERS = (Freeze, Settle, Take, Release)


@dataclass(slots=True)
class _Freeze:
    """Steps wait, until all here is at `target`."""

    said: Frozen
    until: float
    stop: dict[int, int]
    """By worker, the first clock that is not applied."""
    target: dict[int, int] | None = None
    closed: int = 0


@dataclass(slots=True)
class _Kept:
    """Values that may be read."""

    said: CutKept
    shots: dict[int, Shot]
    asked_at: float
    readings: Counter[int]
    """How often each reader has asked: it is sent what it asked for last."""


class Cuts:
    """Of one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._reached: dict[int, int] = {}
        self._begun: set[int] = set()
        """Those of whose open step a part is in the weights."""
        self._gone: OrderedDict[int, None] = OrderedDict()
        self._seen: dict[int, int] = {}
        """By maker, the newest number: what was over is not begun again by a message that comes late."""
        self._freeze: _Freeze | None = None
        self._kept: _Kept | None = None
        self._out: list[Effect] = []
        self._thawed = False
        """Has a freeze ended, and what waited for it not been looked at?"""

    @property
    def wake_at(self) -> float:
        freeze = self._freeze.until if self._freeze else inf
        return min(freeze, self._kept.asked_at + KEEP if self._kept else inf)

    @property
    def nbytes(self) -> int:
        """What is kept of blocks that have changed, or have been read, since."""
        return sum(shot.nbytes for shot in self._kept.shots.values()) if self._kept else 0

    # --- what the stream tells

    def must_wait(self, push: Push) -> bool:
        """Is a step held back?"""
        return self._freeze is not None and push.clock >= self._freeze.stop.get(push.incarnation, 0)

    def applied(self, operation: Operation, at_once: bool) -> None:
        """An operation was applied, or refused.

        Args:
            at_once: it is a push whose gradients, if any, are in the weights.
        """
        worker = operation.incarnation
        match operation:
            case Push(clock=clock, advance=True):
                self._begun.discard(worker)
                self._reach(worker, clock + 1)
            case Push(clock=clock, blocks=blocks):
                self._reach(worker, clock)
                if blocks and at_once:
                    self._begun.add(worker)
            case Enter(clock=clock) | Start(clock=clock) | Pause(clock=clock):
                if clock > self._reached.get(worker, -1):
                    self._begun.discard(worker)
                self._reach(worker, clock)
            case Fill():
                pass

    def _reach(self, worker: int, clock: int) -> None:
        self._reached[worker] = max(clock, self._reached.get(worker, 0))

    def drop(self, worker: int) -> None:
        """A worker is gone: of its last step a part may be here, as it may be in the weights."""
        self._reached.pop(worker, None)
        self._seen.pop(worker, None)
        self._begun.discard(worker)
        self._gone[worker] = None
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        if self._freeze and self._freeze.said.incarnation == worker:
            self._thaw()

    def forget(self, kept: bool = False) -> None:
        """A round has changed the weights at once, or they are others now: then what is `kept` is of no use."""
        if kept:
            self._kept = None
        if self._freeze is not None:
            self._refuse(self._freeze, "the weights were changed by a round, or filled")

    # --- what readers ask

    def received(self, peer: Peer, message: CutMessage, now: float) -> None:
        """One of `FROM_WORKERS`, of a worker that is known."""
        match message:
            case Freeze():
                self._freeze_for(peer, message, now)
            case Settle():
                self._settle(peer, message)
            case Take():
                self._take(peer, message, now)
            case Release(maker=maker, cut=cut):
                self._release(maker, cut)

    def _freeze_for(self, peer: Peer, message: Freeze, now: float) -> None:
        reader, cut, shard = message.incarnation, message.cut, self._shard
        if self._freeze is not None and (self._freeze.said.incarnation, self._freeze.said.cut) == (reader, cut):
            return self._send(peer, self._freeze.said)
        why = ""
        if cut <= self._seen.get(reader, 0):
            why = "it is over"
        elif not (shard.filled and shard.opened):
            why = "the shard has no weights yet, or has not begun"
        elif self._freeze is not None or self._being_read(reader, now):
            why = "another worker makes or reads one"
        if why:
            return self._none(peer, reader, reader, cut, why)
        self._seen[reader], self._kept = cut, None
        stop = {worker: clock + (worker in self._begun) for worker, clock in self._reached.items()}
        said = Frozen(reader, shard.incarnation, cut, self._closed, tuple(stop.items()))
        self._freeze = _Freeze(said, now + HOLD, stop)
        self._send(peer, said)

    def _being_read(self, reader: int, now: float) -> bool:
        kept = self._kept
        return kept is not None and kept.said.incarnation != reader and now - kept.asked_at < READING

    def _settle(self, peer: Peer, message: Settle) -> None:
        reader, cut, freeze, kept = message.incarnation, message.cut, self._freeze, self._kept
        if kept is not None and (kept.said.incarnation, kept.said.cut) == (reader, cut):
            return self._send(peer, kept.said)
        if freeze is None or (freeze.said.incarnation, freeze.said.cut) != (reader, cut):
            return self._none(peer, reader, reader, cut, "the shard has waited for it in vain")
        if freeze.target is None:
            freeze.target, freeze.closed = dict(message.reached), message.closed
            freeze.stop = {w: max(freeze.stop.get(w, 0), clock) for w, clock in freeze.target.items()}

    def _take(self, peer: Peer, message: Take, now: float) -> None:
        kept, reader = self._kept, message.incarnation
        if kept is None or (kept.said.incarnation, kept.said.cut) != (message.maker, message.cut):
            return self._none(peer, reader, message.maker, message.cut, "it is not kept any more")
        if any(block not in kept.shots for block in message.blocks):
            return self._none(peer, reader, message.maker, message.cut, "a block that is not on this shard")
        kept.asked_at = now
        kept.readings[reader] += 1
        if message.blocks:
            self._out.append(Stream(peer, self._pieces(kept, message, kept.readings[reader])))

    def _pieces(self, kept: _Kept, message: Take, reading: int) -> Iterator[Piece]:
        weights, reader = self._shard.weights, message.incarnation
        assert weights is not None
        for blocks in parts_of(weights.store, list(message.blocks)):
            if self._kept is not kept or kept.readings[reader] != reading:
                return
            buffers = tuple(kept.shots[block].values() for block in blocks)
            self._shard.counters["bytes_out"] += sum(map(len, buffers))
            yield Piece(reader, self._shard.incarnation, message.maker, message.cut, blocks, buffers)

    def _release(self, maker: int, cut: int) -> None:
        if maker in self._reached or maker in self._seen:
            self._seen[maker] = max(cut, self._seen.get(maker, 0))
        if self._kept is not None and (self._kept.said.incarnation, self._kept.said.cut) == (maker, cut):
            self._kept = None
        if self._freeze is not None and (self._freeze.said.incarnation, self._freeze.said.cut) == (maker, cut):
            self._thaw()

    # --- after every event

    def due(self, now: float) -> bool:
        """Is a `turn` wanted? After it, what had to wait may go on."""
        freeze = self._freeze
        moved = freeze is not None and not self._behind(freeze)
        return bool(self._out) or self._thawed or moved or now >= self.wake_at

    def turn(self, now: float) -> list[Effect]:
        """What is to be said."""
        freeze, kept = self._freeze, self._kept
        if kept is not None and now - kept.asked_at >= KEEP:
            self._kept = None
        if freeze is not None:
            behind = self._behind(freeze)
            if not behind:
                self._keep(freeze, now)
            elif now >= freeze.until:
                self._refuse(freeze, behind)
        out, self._out, self._thawed = self._out, [], False
        return out

    def _thaw(self) -> None:
        self._freeze, self._thawed = None, True

    @property
    def _closed(self) -> int:
        return closed(self._shard.phases, self._shard.open_step)

    def _behind(self, freeze: _Freeze) -> str:
        """What is not as far as it must be; "" if all is."""
        shard = self._shard
        if freeze.target is None:
            return "its maker has not come back in time"
        for worker, clock in freeze.target.items():
            if worker not in self._gone and self._reached.get(worker, 0) < clock:
                return f"{shard.roster.name(worker)} has begun step {clock - 1} and has not ended it"
        if self._closed < freeze.closed:
            return f"step {freeze.closed - 1} is not averaged everywhere"
        return "a round is about to change the weights" if shard.accumulator and shard.accumulator.ready else ""

    def _keep(self, freeze: _Freeze, now: float) -> None:
        shard = self._shard
        assert shard.weights is not None
        store, said = shard.weights.store, freeze.said
        applied = shard.accumulator.applied if shard.accumulator else 0
        how = (self._closed, shard.clocks.min, applied, store.version)
        settled = CutKept(said.incarnation, shard.incarnation, said.cut, *how)
        self._thaw()
        self._kept = _Kept(settled, {block: store.shot(block) for block in store.blocks}, now, Counter())
        shard.counters["cuts"] += 1
        self._tell(said.incarnation, settled)

    def _refuse(self, freeze: _Freeze, why: str) -> None:
        self._thaw()
        said = freeze.said
        self._tell(said.incarnation, NoCut(said.incarnation, self._shard.incarnation, said.incarnation, said.cut, why))

    def _none(self, peer: Peer, reader: int, maker: int, cut: int, why: str) -> None:
        self._send(peer, NoCut(reader, self._shard.incarnation, maker, cut, why))

    def _tell(self, worker: int, message: CutMessage) -> None:
        peer = self._shard.routes.get(worker)
        if peer is not None:
            self._send(peer, message)

    def _send(self, peer: Peer, message: CutMessage) -> None:
        self._out.append(Send(peer, message))
