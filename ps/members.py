"""Who is here: the lives of workers, their leases, names and numbers (SPEC §3.1, §3.3).

Rules
- An incarnation lives once. What has ended stays ended.
- A name has one live worker; a supervisor's restart (a higher attempt) takes the name over.
- What is asked with every message costs the same however many there are: all leases are of one length, so they end in the order
  in which they were renewed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf

from ..protocol.effects import Peer
from ..protocol.messages import Join

REMEMBERED = 65_536
"""Ended incarnations kept, so that a late message of theirs is known for what it is."""

SHOWN = 256
"""Ended lives that status shows."""

MAX_LIVE = 16_384


@dataclass(slots=True)
class Life:
    """One incarnation of a worker. `clock` is a lower bound, from its last renewal or a shard's report."""

    incarnation: int
    number: int
    name: str
    attempt: int
    host: str
    pid: int
    peer: Peer
    joined_at: float
    renewed_at: float
    clock: int = 0
    entered: bool = False
    round: int = -1
    """The last federated round whose weights it has had."""
    registered: int = 0
    """Its place in the order of registration, from 1; 0 before."""
    state: str = "live"
    """`live`, then `lost` (its lease ended), `left` or `replaced`."""
    stats: dict[str, float] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Totals:
    """What ended lives have done."""

    lost: int = 0
    left: int = 0
    stats: Counter[str] = field(default_factory=Counter)


class Refusal(Exception):
    """A join that is refused. `code` is the refusal's."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Members:
    """The membership table. `lease` is in seconds."""

    def __init__(self, lease: float) -> None:
        self._lease = lease
        self._live: dict[int, Life] = {}
        """In the order of joining."""
        self._by_name: dict[str, Life] = {}
        self._renewed: OrderedDict[int, Life] = OrderedDict()
        """The same, the lease that ends next first."""
        self._numbers: dict[str, int] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._recent: deque[Life] = deque(maxlen=SHOWN)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._live.values())

    def get(self, incarnation: int) -> Life | None:
        return self._live.get(incarnation)

    def has_ended(self, incarnation: int) -> bool:
        return incarnation in self._ended

    @property
    def ended(self) -> list[Life]:
        """The last to end, with all that was known of them."""
        return list(self._recent)

    def named(self, name: str) -> Life | None:
        return self._by_name.get(name)

    @property
    def next_expiry(self) -> float:
        return next((life.renewed_at for life in self._renewed.values()), inf) + self._lease

    def holder(self, join: Join) -> Life | None:
        """The live worker whose name this join takes over.

        Raises:
            Refusal: `name` if the holder is not to be replaced, `full` if there is no room, `ended` for a past incarnation.
        """
        if self.has_ended(join.incarnation):
            raise Refusal("ended", "this incarnation has ended")
        held = self.named(join.name)
        if held is not None and join.attempt <= held.attempt:
            raise Refusal("name", f"a live worker on {held.host} (pid {held.pid}) is named {join.name!r} already")
        if held is None and len(self._live) >= MAX_LIVE:
            raise Refusal("full", f"{MAX_LIVE} workers are here already")
        return held

    def admit(self, join: Join, peer: Peer, now: float) -> Life:
        """A new life begins. `holder` must have been asked, and its answer ended, before."""
        number = self._numbers.setdefault(join.name, len(self._numbers))
        life = Life(join.incarnation, number, join.name, join.attempt, join.host, join.pid, peer, now, now)
        self._live[join.incarnation] = self._by_name[join.name] = self._renewed[join.incarnation] = life
        return life

    def renew(self, life: Life, now: float) -> None:
        """A live worker's lease begins anew."""
        life.renewed_at = now
        self._renewed.move_to_end(life.incarnation)

    def expired(self, now: float) -> list[Life]:
        """Those whose lease has ended."""
        return list(takewhile(lambda life: now - life.renewed_at >= self._lease, self._renewed.values()))

    def end(self, life: Life, state: str) -> None:
        """A life ends, as `lost`, `left` or `replaced`."""
        life.state, life.entered = state, False
        for held in (self._live, self._renewed):
            del held[life.incarnation]
        del self._by_name[life.name]
        self._ended[life.incarnation] = None
        self._recent.append(life)
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
