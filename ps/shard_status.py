"""What a shard says of itself: its report, its answers to workers that wait and to whoever inquires (SPEC §3.2, §6.4)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..protocol.messages import Alive, Report

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


def alive(shard: Shard, worker: int, received: int, parked: Iterable[int]) -> Alive:
    """For a worker that waits: how far its stream was received, which of its pulls are parked, and whom they wait for."""
    clocks, slowest = shard.clocks, shard.clocks.slowest()
    name, clock = (shard.roster.name(slowest), clocks.get(slowest) or 0) if slowest is not None else ("", 0)
    return Alive(worker, shard.incarnation, received, clocks.min, name, clock, shard.filled, tuple(parked))


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
