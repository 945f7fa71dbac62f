"""Krum (Blanchard et al. 2017): of all updates, those that have the most near neighbours. Distances come from the shards.

Rules
- Plain numbers: a coordinator touches no array.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import inf, isnan

from ..protocol.errors import ProtocolError


def total(parts: Sequence[bytes | bytearray | memoryview], count: int) -> list[list[float]]:
    """The squares of distances over all shards, from each shard's own.

    Raises:
        ProtocolError: `malformed`: not so many numbers, or one that is no distance.
    """
    found = [0.0] * (count * count)
    for part in parts:
        if len(part) != 8 * count * count:
            raise ProtocolError("malformed", f"{len(part)} bytes of distances between {count}")
        for place, number in enumerate(struct.unpack(f"<{count * count}d", part)):
            if isnan(number) or number < 0:
                raise ProtocolError("malformed", "a distance that cannot be")
            found[place] += number
    return [found[row * count : (row + 1) * count] for row in range(count)]


def choose(squares: Sequence[Sequence[float]], faulty: int, keep: int) -> tuple[int, ...]:
    """The rows to be averaged, ascending: the `keep` of the lowest scores (multi-Krum; with 1, Krum).

    A score is the sum of the squares to the nearest n - faulty - 2 others.
    """
    count = len(squares)
    near = max(1, count - faulty - 2)
    scores = []
    for row in range(count):
        others = sorted(squares[row][other] for other in range(count) if other != row)
        scores.append((sum(others[:near]) if others else 0.0, row))
    ranked = sorted(scores)
    chosen = [row for score, row in ranked[:keep] if score < inf]
    return tuple(sorted(chosen or [ranked[0][1]]))
