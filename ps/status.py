"""The state of a cluster, for people and scripts: what `shoal status --json` prints.

Rules
- Plain JSON: no NaN, no infinity (an infinite staleness is "inf").
- An insecure cluster says so, every time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..protocol.evaluating import Evaluated
    from .coordinator import Coordinator
    from .members import Life


_HISTOGRAM = re.compile(r"staleness\.[0-9]{1,18}")


def status(coordinator: Coordinator) -> dict[str, Any]:
    """Everything that the coordinator knows, as JSON values. Seconds are seconds, bytes bytes."""
    c = coordinator
    shards = list(c.shards)
    totals = totals_of(c)
    return {
        "run": f"{c.run:016x}",
        "mode": c.modes.now.mode,
        "staleness": plain(c.modes.now.staleness),
        "mode_since": c.modes.now.clock,
        "lease": c.settings.lease,
        "security": "none" if c.settings.insecure else ("curve" if any(s.place.key for s in shards) else "loopback"),
        "insecure": c.settings.insecure,
        "epoch": c.epoch,
        "rounds": _rounds(c),
        "seconds": round(c.now - c.opened_at, 3) if c.opened_at is not None else 0.0,
        "waiting_for": _waiting_for(c),
        "model": _model(c),
        "min_clock": min(
            (life.clock for life in c.members if life.entered), default=max((s.floor for s in shards), default=0)
        ),
        "max_clock": max((life.clock for life in c.members), default=0),
        "workers": [_worker(life, c.now) for life in [*c.members, *c.members.ended]],
        "shards": [
            {
                "index": s.place.index,
                "address": f"{s.place.host}:{s.place.port}",
                "key": s.place.key,
                "state": "lost" if c.shards.is_lost(s, c.now) else "live",
                "filled": s.filled,
                "min_clock": s.floor,
                "heard_seconds_ago": round(c.now - s.heard_at, 3),
                "counters": {name: plain(value) for name, value in s.counters.items()},
            }
            for s in shards
        ],
        "data": [
            {
                "name": job.name,
                "examples": job.length,
                "epoch": job.epoch,
                "leased": len(job.leased),
                "completed": job.completed,
                "lost": job.lost,
                "re_leased": job.released,
            }
            for job in c.partitions.jobs.values()
        ],
        "evaluations": [_evaluated(each) for each in c.evaluations.results],
        "evaluating": c.evaluations.under_way,
        "totals": totals,
        "rejected": _rejected(c),
        "logged": {name: plain(value) for name, value in (c.logged | c.federation.said).items()},
    }


def _rounds(c: Coordinator) -> dict[str, Any]:
    f, session = c.federation, c.federation.rounds.session
    last = f.last
    return {
        "protection": c.settings.recipe.protection,
        "identities": c.settings.recipe.active,
        "epsilon": round(f.rounds.ledger.epsilon, 6) if f.rounds.ledger else None,
        "epsilon_budget": f.rounds.ledger.budget if f.rounds.ledger else None,
        "delta": f.rounds.ledger.delta if f.rounds.ledger else None,
        "completed": f.rounds.completed,
        "wanted": c.settings.recipe.rounds or 0,
        "abandoned": f.abandoned,
        "workers": f.workers,
        "stage": session.stage.name.lower() if session else "",
        "waiting_for": f.why if c.modes.now.mode == "federated" and not f.rounds.done else "",
        "last": None
        if last is None
        else {
            "round": last.round,
            "clients": len(last.released.survivors) if last.released else 0,
            "capped": last.released.capped if last.released else 0,
            "clipped": last.released.clipped if last.released else 0,
            "abandoned_because": last.why,
        },
    }


def _evaluated(e: Evaluated) -> dict[str, Any]:
    return {
        "number": e.number,
        "name": e.name,
        "mode": e.mode,
        "clock": e.clock,
        "examples": e.examples,
        "sums": {name: plain(total) for name, total in e.sums},
        "means": {name: plain(total / e.examples) for name, total in e.sums},
        "workers": e.workers,
        "parts_lost": e.lost,
        "seconds": e.seconds,
    }


def totals_of(c: Coordinator) -> dict[str, Any]:
    """What all lives, ended and live, have done together."""
    stats = Counter(c.totals.stats)
    for life in c.members:
        stats.update(life.stats)
    histogram = {
        name.removeprefix("staleness."): whole(count) for name, count in stats.items() if _HISTOGRAM.fullmatch(name)
    }
    return {
        "steps": whole(stats["steps"]),
        "bytes_pushed": whole(stats["bytes_pushed"]),
        "bytes_pulled": whole(stats["bytes_pulled"]),
        "retries": whole(stats["retries"]),
        "skipped": whole(stats["skipped"]),
        "staleness": dict(sorted(histogram.items(), key=lambda item: int(item[0]))),
        "seconds": {
            n.removeprefix("seconds."): plain(round(v, 4)) for n, v in sorted(stats.items()) if n.startswith("seconds.")
        },
        "workers_lost": c.totals.lost,
        "workers_left": c.totals.left,
    }


def whole(value: float) -> int:
    """A count off the wire, where a NaN may travel."""
    return int(value) if math.isfinite(value) else 0


def plain(value: float) -> float | str | None:
    """A number as JSON has it."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _worker(life: Life, now: float) -> dict[str, Any]:
    return {
        "name": life.name,
        "number": life.number,
        "state": life.state if life.state != "live" or life.entered else "idle",
        "host": life.host,
        "pid": life.pid,
        "attempt": life.attempt,
        "clock": life.clock,
        "renewed_seconds_ago": round(now - life.renewed_at, 3),
        "stats": {name: plain(value) for name, value in life.stats.items()},
        "logged": {name: plain(value) for name, value in life.logged.items()},
    }


def _model(c: Coordinator) -> dict[str, Any] | None:
    if c.registration.spec is None:
        return None
    return {
        "tensors": len(c.registration.spec.tensors),
        "bytes": c.registration.spec.total_bytes,
        "shards": c.shards.fixed,
        "layout": c.shards.digest,
        "filled": not c.shards.unfilled,
    }


def _waiting_for(c: Coordinator) -> str:
    if not c.shards.ready:
        return f"shards: {len(c.shards)} of {max(c.shards.fixed, c.shards.wanted)} are here"
    if c.opened_at is None:
        return f"workers: {len(c.members)} of {c.settings.min_workers} have joined"
    return ""


def _rejected(c: Coordinator) -> dict[str, int]:
    """Refused messages and connections by reason, over all processes."""
    found: Counter[str] = Counter()
    for counters in [c.counters, *(s.counters for s in c.shards)]:
        for name, value in counters.items():
            kind, _, reason = name.partition(".")
            if kind in ("rejected", "refused"):
                found[reason] += whole(value)
    return dict(found)
