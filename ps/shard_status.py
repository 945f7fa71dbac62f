"""What a shard says of itself: its report to the coordinator, and its answer to whoever inquires (SPEC §3.2, §10.4)."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from ..protocol.messages import Report

if TYPE_CHECKING:
    from .shard import Shard


def report(shard: Shard) -> Report:
    """For the coordinator."""
    weights, clocks = shard.weights, shard.clocks
    return Report(
        shard.incarnation,
        shard.run,
        shard.epoch,
        weights.layout.digest if weights else "",
        shard.filled,
        shard.opened or (weights is not None and not len(weights.store)),
        clocks.min,
        shard.held_at is not None,
        clocks.highest,
        clocks.items(),
        tuple((name, float(value)) for name, value in sorted(counters(shard).items())),
    )


def counters(shard: Shard) -> Counter[str]:
    """Of its parts, too."""
    found = Counter(shard.counters)
    if shard.weights:
        found |= shard.weights.counters
    if shard.accumulator:
        found += shard.accumulator.counters
    return found


def answer(shard: Shard) -> bytes:
    """For people, as JSON."""
    store = shard.weights.store if shard.weights else None
    state = {
        "role": "shard",
        "index": shard.index,
        "epoch": shard.epoch,
        "filled": shard.filled,
        "min_clock": shard.clocks.min,
        "blocks": len(store) if store else 0,
        "bytes": store.nbytes if store else 0,
        "rounds": shard.accumulator.rounds if shard.accumulator else 0,
        "counters": dict(counters(shard)),
    }
    return json.dumps(state).encode()
