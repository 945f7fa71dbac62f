"""One shard as a worker's core sees it: the greeting, the stream, the reads that wait, and how long it has been silent.

Rules
- A shard that turns out to be another incarnation than before is a new shard: a new stream, nothing held.
- Silence counts only while something is awaited, and only while this process was running.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from ..protocol.join import bracket
from ..protocol.messages import Alive, Pull, Values
from ..protocol.records import Place
from .calls import Part
from .outbox import Outbox
from .parts import without


@dataclass(slots=True)
class Read:
    """One shard's part of a pull that is under way. `held` is the incarnation and version that the reader has all blocks of."""

    ticket: int
    clock: int
    blocks: tuple[int, ...]
    held: tuple[int, int]
    region: int = 0
    codec: int = 0
    into: int = 0
    """The region that this life of the shard was asked to write to. A repeated request must not name another: the answer to the
    first may be under way, and what is written after it nobody waits for."""
    shard: int = 0
    after: int = 0
    sent_at: float = -inf
    parts: set[int] = field(default_factory=set)
    """Of the newest answer, which parts have come."""
    parts_wanted: int = 0
    version: int = -1

    def take(self, values: Values) -> bool:
        """A part has come. True when the answer is whole."""
        if (values.parts, values.version) != (self.parts_wanted, self.version):
            self.parts.clear()  # an answer to a repeated request supersedes what came of the first
            self.parts_wanted, self.version = values.parts, values.version
        self.parts.add(values.part)
        return len(self.parts) == self.parts_wanted


class Link:
    """The connection to the shard at `place`."""

    def __init__(self, place: Place, now: float) -> None:
        self.place = place
        self.connected = False
        self.reads: dict[int, Read] = {}
        self.heard_at = now
        self.min_clock = 0
        self._slowest: Alive | None = None
        self._awaiting_since: float | None = None
        self.reset()

    def reset(self, shard: int = 0) -> None:
        """Begin anew with this incarnation of the shard; 0: it has not greeted yet."""
        self.shard = shard
        self.outbox = Outbox()
        self.entering = 0
        """The number of the newest `Enter`; 0 if there is none."""
        self.entered: int | None = None
        """The least clock that the shard answered to it."""
        self.started = self.filled_by_us = False
        self.early: set[int] = set()
        """Blocks that were sent early of the step that is being made."""
        self.early_twice = False
        """One of them was sent again: which of the two counts nobody could say."""
        self._read_all, self._read = 0, dict[int, int]()
        """The version as of which all blocks were read last, and the blocks of which some newer one was."""
        self.shared: dict[int, str] = {}
        """By region, why the shard does not share it, or ""."""
        self.offered: dict[int, float] = {}
        self.asked_at = self.rewound_at = -inf
        self.sent_at_probe = 0

    @property
    def address(self) -> str:
        return f"{bracket(self.place.host)}:{self.place.port}"

    @property
    def open(self) -> bool:
        """May operations and pulls be sent?"""
        return self.connected and self.shard != 0

    @property
    def busy(self) -> bool:
        """Does anything wait for this shard?"""
        return bool(len(self.outbox) or self.reads or not self.shard)

    def may_ask(self, now: float, every: float) -> bool:
        """Is a `Hello` or `Probe` due? If so it counts as sent."""
        if not self.connected or now - self.asked_at < every:
            return False
        self.asked_at = now
        return True

    def pull(self, request: int, incarnation: int, now: float) -> Pull:
        """The read as a message to the shard's incarnation of now."""
        read = self.reads[request]
        if read.shard != self.shard:
            read.parts.clear()
            read.shard, read.after = self.shard, self.outbox.last
            read.into = read.region if self.shares(read.region) else 0
        read.sent_at = now
        since = read.held[1] if read.held[0] == self.shard else 0
        head = (incarnation, self.shard, request, read.clock, read.after, since, read.into, read.codec)
        return Pull(*head, read.blocks)

    def left_early(self, blocks: Iterable[int]) -> None:
        """These blocks of the step that is being made were sent."""
        self.early_twice |= not self.early.isdisjoint(blocks)
        self.early.update(blocks)

    def end_step(self, parts: list[Part], unchanged: bool) -> tuple[list[Part], bool]:
        """What of a step's parts is still to be sent, and whether what left early counts.

        Args:
            unchanged: it is what these parts say.
        """
        counts = bool(self.early) and unchanged and not self.early_twice and not any(part.ranges for part in parts)
        if counts:
            parts = [left for part in parts if (left := without(part, self.early)) is not None]
        self.early.clear()
        self.early_twice = False
        return parts, counts

    def has_read(self, blocks: tuple[int, ...], version: int) -> None:
        """A pull has brought these blocks (none: all) as of `version`."""
        if blocks:
            self._read |= dict.fromkeys(blocks, version)
        else:
            self._read_all, self._read = version, {}

    def seen(self, blocks: tuple[int, ...]) -> int:
        """The least version that one of these blocks was read at; 0: not from this life of the shard (SPEC §13.1)."""
        if not self._read:
            return self._read_all
        return min((self._read.get(block, self._read_all) for block in blocks), default=self._read_all)

    def shares(self, region: int) -> bool:
        """Has this life of the shard taken the region?"""
        return self.shared.get(region) == ""

    def may_offer(self, region: int, now: float, every: float) -> bool:
        """Is an offer of the region due? If so it counts as sent."""
        if not self.open or region in self.shared or now - self.offered.get(region, -inf) < every:
            return False
        self.offered[region] = now
        return True

    def rewind(self, now: float, received: int = 0, at_most_every: float = 0.0) -> int:
        """Send the stream again after `received`. Returns how many operations that are."""
        if now - self.rewound_at < at_most_every:
            return 0
        self.rewound_at = now
        return self.outbox.rewind(received)

    def alive(self, message: Alive) -> None:
        self._slowest = message

    @property
    def holdup(self) -> str:
        """Whom the shard waits for, as it said last; "" if it did not say."""
        alive = self._slowest
        if alive is None or not self.reads:
            return ""
        if not alive.filled:
            return f"shard {self.place.index} has no weights yet"
        return f"{alive.slowest} is at clock {alive.slowest_clock}" if alive.slowest else ""

    def heard(self, now: float) -> None:
        self.heard_at = now
        self._awaiting_since = now if self.busy else None

    def owed(self, now: float) -> float:
        """Seconds for which the shard owes us an answer."""
        if not self.busy:
            self._awaiting_since = None
            return 0.0
        if self._awaiting_since is None:
            self._awaiting_since = now
        return now - self._awaiting_since

    def forgive(self, seconds: float) -> None:
        """This process was stopped for so long: the shard is not to blame."""
        self.heard_at += seconds
        if self._awaiting_since is not None:
            self._awaiting_since += seconds

    def given_up(self) -> None:
        """Those who waited were told; whoever waits next is not told at once."""
        self.reads.clear()
        self._awaiting_since = None
