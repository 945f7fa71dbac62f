"""Masked rounds of more clients than any machine here could run: what each party would compute and say, simulated.

Rules
- All of it is said to be simulated: the halves are the real ones (`shoal.bench.arena`), the network and the
  clients' machines are not.
- The model is small, so that what is seen is what grows with clients; what grows with elements, `shoal bench federated` measures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from ..ps.recipe import Recipe
from .arena import SAID, Arena, Costs

CLIENTS = (10, 30, 100, 300, 1000, 3000, 10_000)
ELEMENTS = 1000
SHARDS = 2
ROUNDS, FEW = 1000, 20
"""How many rounds with drop-outs, of how few clients each: their own number would take days."""
DROPOUT = 0.1
"""The chance of a client to drop out in a round; at which stage, the dice say."""


def growth(clients: Sequence[int] = CLIENTS) -> list[dict[str, Any]]:
    """A round for each number of clients."""
    found = []
    for count in clients:
        arena = Arena(count, (ELEMENTS // SHARDS,) * SHARDS, Recipe(), update)
        found.append({"clients": count, **summary(arena.round(), count), "neighbours": arena.neighbours})
    return found


def update(number: int) -> Any:
    return np.random.default_rng(number).uniform(-0.5, 0.5, ELEMENTS).astype(np.float32)


def summary(costs: Costs, count: int) -> dict[str, Any]:
    """Per client: medians; of the servers: sums."""
    return {
        "client_seconds": median(costs.clients.values()),
        "client_bytes": median(costs.said.values()) + median(costs.heard.values()),
        "coordinator_seconds": costs.coordinator,
        "shard_seconds": max(costs.shards.values()),
        "messages": sum(costs.messages.values()),
        "messages_per_client": sum(costs.messages.values()) / count,
        "held_bytes": costs.held,
        "released": costs.released,
    }


def dropouts(rounds: int = ROUNDS, clients: int = FEW, seed: int = 0) -> dict[str, Any]:
    """So many rounds, in which every client drops out with `DROPOUT` at some stage; those that are there again take part again."""
    dice = random.Random(seed)  # noqa: S311 - a simulation
    arena = Arena(clients, (ELEMENTS // SHARDS,) * SHARDS, Recipe(), update, seed=seed)
    ends: Counter[str] = Counter()
    worst, messages, coordinator = 0.0, 0, 0.0
    for _ in range(rounds):
        silent = {number: dice.choice(SAID) for number in range(clients) if dice.random() < DROPOUT}
        costs = arena.round(silent)
        ends["released" if costs.released else "abandoned"] += 1
        messages, coordinator = messages + sum(costs.messages.values()), coordinator + costs.coordinator
        if costs.released:
            here = [number - 1 for number in costs.members]
            worst = max(worst, float(np.abs(costs.average - np.mean([update(i) for i in here], axis=0)).max()))
    return {
        "rounds": rounds,
        "clients": clients,
        "dropout": DROPOUT,
        "released": ends["released"],
        "abandoned": ends["abandoned"],
        "largest_error": worst,
        "messages_per_round": messages / rounds,
        "coordinator_seconds_per_round": coordinator / rounds,
    }
