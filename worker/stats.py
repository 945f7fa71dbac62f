"""What a worker has done, as `worker.stats` shows it and as it travels in `Renew`.

Rules
- Plain numbers, changed by the thread that drives the loop; a reader sees each number whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from ..protocol.schema import Numbers

MOST_STALENESS = 64
"""The histogram's last bin counts this staleness and all above."""


@dataclass(slots=True)
class Stats:
    """Counters of one worker.

    Attributes:
        clock: this worker's clock, in steps; min_clock: the least of all, as last heard.
        staleness: how many pulls saw which staleness (own clock minus least clock).
        bytes_pushed, bytes_pulled: payload, without headers; bytes_early: of those pushed, what left while backward ran.
        seconds: by phase: push (gathering, sending), pull (waiting for weights), apply (copying them), data (waiting for leases).
        retries: operations and requests sent again.
        skipped: steps whose gradient was not finite.
        lost: updates that were not acknowledged before an eviction or a shard's restart.
        evictions: how often this worker was declared dead and joined again.
    """

    clock: int = 0
    min_clock: int = 0
    steps: int = 0
    examples: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)
    bytes_pushed: int = 0
    bytes_pulled: int = 0
    bytes_early: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    retries: int = 0
    skipped: int = 0
    lost: int = 0
    evictions: int = 0

    def saw(self, staleness: int) -> None:
        self.staleness[min(max(staleness, 0), MOST_STALENESS)] += 1

    def numbers(self, since: Stats | None = None) -> Numbers:
        """The counters as they travel; with `since`, what was added after it."""
        flat = self._flat()
        before = since._flat() if since else {}
        return tuple((name, value - before.get(name, 0.0)) for name, value in sorted(flat.items()) if value)

    def _flat(self) -> dict[str, float]:
        flat = {name: float(getattr(self, name)) for name in _COUNTED}
        flat |= {f"staleness.{k}": float(v) for k, v in self.staleness.items()}
        return flat | {f"seconds.{k}": float(v) for k, v in self.seconds.items()}

    def copy(self) -> Stats:
        made = Stats(**{name: getattr(self, name) for name in (*_COUNTED, "clock", "min_clock")})
        made.staleness, made.seconds = Counter(self.staleness), self.seconds.copy()
        return made


_COUNTED = (
    "steps",
    "examples",
    "bytes_pushed",
    "bytes_pulled",
    "bytes_early",
    "retries",
    "skipped",
    "lost",
    "evictions",
)
