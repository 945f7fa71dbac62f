"""Who has a mask with whom, as a pure function of the session (SPEC §14). Every party computes the same.

Rules
- Ranks are the places of members in the sorted list of a session's members, from 0.
- Up to `count - 1` neighbours, all; fewer, those within half the degree on a ring in an order that nobody knew before the session
  (Bell et al. 2020, with Harary's graph).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_WORD = 16
"""Bytes a draw: what is left over in them shifts a probability by less than 2^-100."""


def neighbours(sid: bytes, count: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """The neighbours of each rank, ascending.

    Args:
        sid: of the session. count: how many members, at least 2.
        degree: `count - 1` for the complete graph, or even and from 2.

    Raises:
        ValueError: there is no such graph.
    """
    ring = _ring(sid, count, degree)
    found: list[tuple[int, ...]] = [()] * count
    for place, rank in enumerate(ring):
        found[rank] = _beside(ring, place, degree)
    return tuple(found)


def neighbours_of(rank: int, sid: bytes, count: int, degree: int) -> tuple[int, ...]:
    """Those of one rank, ascending: what a member needs, in time that grows with `count` alone.

    Raises:
        ValueError: there is no such graph.
    """
    ring = _ring(sid, count, degree)
    return _beside(ring, ring.index(rank), degree)


def sides(rank: int, others: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """With which of its neighbours a member adds the mask they share, and with which it subtracts it: each mask is in the sum once
    with either sign."""
    return tuple(other for other in others if other > rank), tuple(other for other in others if other < rank)


def _beside(ring: Sequence[int], place: int, degree: int) -> tuple[int, ...]:
    if degree == len(ring) - 1:
        return tuple(sorted((*ring[:place], *ring[place + 1 :])))
    half = degree // 2
    return tuple(sorted(ring[(place + step) % len(ring)] for step in range(-half, half + 1) if step))


def _ring(sid: bytes, count: int, degree: int) -> Sequence[int]:
    """The ranks in the session's order: Fisher and Yates' shuffle, drawn from SHAKE-256 of `sid`. Any order will do if the graph is
    complete."""
    if count >= 2 and degree == count - 1:
        return range(count)
    if not 2 <= degree < count or degree % 2:
        raise ValueError(f"{count} members with {degree} neighbours each")
    words = hashlib.shake_256(sid).digest(_WORD * count)
    ring = list(range(count))
    for last in range(count - 1, 0, -1):
        drawn = int.from_bytes(words[_WORD * last : _WORD * (last + 1)], "big") % (last + 1)
        ring[last], ring[drawn] = ring[drawn], ring[last]
    return ring
