"""The worker's half of a consistent cut: it asks the shards how far they are, brings all to one boundary, reads (SPEC §15).

Rules
- An attempt is whole or nothing: if one shard has no part in it, or another than the others, it is made anew.
- Shards hold still between the first question and the last answer of an attempt; between two attempts they go on.
- One cut at a time; whoever asks meanwhile waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from ..protocol.cuts import CutKept, CutMessage, Freeze, Frozen, NoCut, Piece, Release, Settle, Take
from ..protocol.errors import ServerLost, ShapeError
from .calls import CutCalled, CutMade, CutReleased
from .outgoing import Outgoing

if TYPE_CHECKING:
    from .fleet import Fleet
    from .link import Link

REPEAT = 0.25
"""Seconds after which what was said is said again."""
PATIENCE = 2.5
"""Seconds for all shards to come to one boundary."""
SILENCE = 1.0
"""Seconds without a block after which those that are missing are asked for again."""
TOUCH = 10.0
"""Seconds after which they are in any case: the shards keep a cut that somebody asks for."""
MOST_ASKED = 4096
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0


@dataclass(slots=True)
class _Attempt:
    """One cut, as far as it has come. By shard, where nothing else is said."""

    maker: int
    number: int
    began: float
    lives: dict[int, int]
    missing: dict[int, set[int]]
    frozen: dict[int, Frozen] = field(default_factory=dict)
    settled: dict[int, CutKept] = field(default_factory=dict)
    asked_at: dict[int, float] = field(default_factory=dict)
    heard_at: dict[int, float] = field(default_factory=dict)

    @property
    def reading(self) -> bool:
        return len(self.settled) == len(self.lives)

    def boundary(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """What every shard is to come to: closed steps, and the clock of each worker."""
        reached: dict[int, int] = {}
        for said in self.frozen.values():
            for worker, clock in said.reached:
                reached[worker] = max(clock, reached.get(worker, 0))
        return max(said.closed for said in self.frozen.values()), tuple(sorted(reached.items()))

    def difference(self) -> str:
        """In what two shards have settled differently; "" if they have not."""
        if len({said.closed for said in self.settled.values()}) > 1:
            return "a step was averaged at some shards and not at others"
        rounds = {said.round for said in self.settled.values()} - {0}
        return "a round was applied at some shards and not at others" if len(rounds) > 1 else ""


class Cutter:
    """Of one worker; `fleet` has the links."""

    def __init__(self, out: Outgoing, fleet: Fleet) -> None:
        self._out, self._fleet = out, fleet
        self._calls: deque[CutCalled] = deque()
        self._attempt: _Attempt | None = None
        self._incarnation = 0
        self._numbers = 0
        self._failures = 0
        self._begin_at = -inf
        self._why = ""
        self.wake_at = inf

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    def why_waiting(self) -> str:
        """In words; "" if nobody waits."""
        return f"no consistent cut yet: {self._why or 'the shards come to one boundary'}" if self._calls else ""

    def begin(self, incarnation: int) -> None:
        """A new life of the worker."""
        self._incarnation, self._numbers, self._attempt, self.wake_at = incarnation, 0, None, inf

    def called(self, call: CutCalled | CutReleased) -> None:
        if isinstance(call, CutCalled):
            return self._calls.append(call)
        for index in self._fleet.participants():
            self._send(index, call.maker, call.number)

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this any more."""
        for call in [call for call in self._calls if call.ticket == ticket]:
            if call is self._calls[0]:
                self._give_up("")
            self._calls.remove(call)

    def fail(self, error: Exception) -> None:
        self._attempt, self.wake_at = None, inf
        while self._calls:
            self._out.fail(self._calls.popleft().ticket, error)

    # --- what the shards say

    def received(self, link: Link, message: CutMessage, now: float) -> None:
        attempt, index = self._attempt, link.place.index
        if attempt is None or attempt.lives.get(index) != message.shard or message.cut != attempt.number:
            return
        match message:
            case Frozen():
                attempt.frozen.setdefault(index, message)
                attempt.asked_at[index] = -inf
            case CutKept() if not attempt.reading:
                attempt.settled[index] = message
                attempt.asked_at[index] = -inf
            case Piece(maker=maker) if maker == attempt.maker:
                self._take(attempt, index, message, now)
            case NoCut(maker=maker, why=why) if maker == attempt.maker:
                self._failed(f"shard {index}: {why}", now)

    def _take(self, attempt: _Attempt, index: int, piece: Piece, now: float) -> None:
        layout, missing = self._fleet.layout, attempt.missing[index]
        assert layout is not None
        attempt.heard_at[index] = now
        for block, payload in zip(piece.blocks, piece.buffers, strict=True):
            if block in missing:
                if len(payload) != layout.blocks[block].nbytes:
                    error = ShapeError(f"shard {index} has answered with a block {block} that does not fit the model")
                    return self._end(error)
                missing.discard(block)
                self._calls[0].sink(block, payload)

    # --- pursuing what is wanted

    def pursue(self, now: float) -> None:
        self.wake_at = inf
        while self._calls:
            attempt = self._attempt or self._began(now)
            if attempt is None:
                self.wake_at = max(self._begin_at, now + FIRST_PAUSE)
                return
            links = self._fleet.links
            moved = [index for index, life in attempt.lives.items() if links[index].shard != life]
            if moved:
                self._failed(f"shard {moved[0]} was restarted, or is out of reach", now)
            elif not attempt.reading and now - attempt.began >= PATIENCE:
                silent = sorted(attempt.lives.keys() - attempt.settled.keys())
                self._failed(f"shard {silent[0]} has not answered in {PATIENCE:g} s", now)
            elif attempt.reading and (difference := attempt.difference()):
                self._failed(difference, now)
            elif attempt.reading and not any(attempt.missing.values()):
                self._end(None)
            else:
                for index in attempt.lives:
                    self._ask(attempt, index, now)
                self.wake_at = now + REPEAT / 2
                return

    def _began(self, now: float) -> _Attempt | None:
        fleet, call = self._fleet, self._calls[0]
        shards = fleet.participants()
        ready = fleet.registered and all(index in fleet.links and fleet.links[index].open for index in shards)
        if not ready or not self._incarnation or now < self._begin_at:
            return None
        assert fleet.layout is not None
        lives = {index: fleet.links[index].shard for index in shards}
        missing = {index: {block.index for block in fleet.layout.by_shard[index]} for index in shards}
        if call.maker:
            self._attempt = _Attempt(call.maker, call.number, now, lives, missing)
            for index, life in lives.items():  # another has made it: it is there, or it is not
                self._attempt.settled[index] = CutKept(self._incarnation, life, call.number, 0, 0, 0, 0)
        else:
            self._numbers += 1
            self._attempt = _Attempt(self._incarnation, self._numbers, now, lives, missing)
        return self._attempt

    def _ask(self, attempt: _Attempt, index: int, now: float) -> None:
        asked = attempt.asked_at.get(index, -inf)
        head = (self._incarnation, attempt.lives[index])
        message: CutMessage
        if attempt.reading:
            heard = max(asked, attempt.heard_at.get(index, -inf))
            if not attempt.missing[index] or (now - heard < SILENCE and now - asked < TOUCH):
                return
            blocks = tuple(sorted(attempt.missing[index])[:MOST_ASKED])
            message = Take(*head, attempt.maker, attempt.number, blocks)
        elif now - asked < REPEAT:
            return
        elif index not in attempt.frozen:
            message = Freeze(*head, attempt.number)
        elif len(attempt.frozen) == len(attempt.lives) and index not in attempt.settled:
            message = Settle(*head, attempt.number, *attempt.boundary())
        else:
            return
        attempt.asked_at[index] = now
        self._out.send(index, message)

    def _failed(self, why: str, now: float) -> None:
        """This attempt is over; the next begins after a pause, longer each time, and never the same for two workers."""
        self._why = why
        if self._calls[0].maker:
            return self._end(ServerLost(f"a cut that another worker made cannot be read: {why}"))
        self._give_up(why)
        self._failures += 1
        pause = min(FIRST_PAUSE * 2 ** min(self._failures, 8), LONGEST_PAUSE)
        self._begin_at = now + pause * (0.5 + (self._incarnation >> self._failures % 32) % 1024 / 1024)

    def _give_up(self, why: str) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None and attempt.maker == self._incarnation:
            for index in attempt.lives:
                self._send(index, attempt.maker, attempt.number)

    def _end(self, error: Exception | None) -> None:
        attempt, call = self._attempt, self._calls.popleft()
        assert attempt is not None
        self._attempt, self._failures, self._why = None, 0, ""
        if not call.keep and attempt.maker == self._incarnation:
            self.called(CutReleased(attempt.maker, attempt.number))
        if error is not None:
            return self._out.fail(call.ticket, error)
        self._out.resolve(call.ticket, _made(attempt))

    def _send(self, index: int, maker: int, number: int) -> None:
        link = self._fleet.links.get(index)
        if link is not None and link.open:
            self._out.send(index, Release(self._incarnation, link.shard, maker, number))


def _made(attempt: _Attempt) -> CutMade:
    settled: Iterable[CutKept] = attempt.settled.values()
    clocks = dict(attempt.boundary()[1]) if attempt.frozen else {}
    return CutMade(
        attempt.maker,
        attempt.number,
        clocks,
        max((said.closed for said in settled), default=0),
        min((said.min_clock for said in settled), default=0),
        max((said.round for said in settled), default=0),
        {index: (said.shard, said.version) for index, said in attempt.settled.items()},
    )
