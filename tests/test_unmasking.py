"""From shares to the keys of masks (rung T0, SPEC §14.4)."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from shoal.protocol.errors import ProtocolError
from shoal.protocol.secure.graph import neighbours, sides
from shoal.protocol.secure.keys import Pair, commitment, pair_key, self_key
from shoal.protocol.secure.masks import Masks
from shoal.protocol.secure.shares import SHARE_BYTES, split
from shoal.protocol.session import (
    Advert,
)
from shoal.ps.unmasking import Dealt, Unmasking

SID = bytes(range(32))
MODEL = bytes([9]) * 32


class Deck:
    """Clients who have dealt to their neighbours, and the keys that they masked with."""

    def __init__(
        self, count: int, threshold: int, degree: int | None = None, dealt: tuple[int, ...] | None = None
    ) -> None:
        self.count = count
        self.near = neighbours(SID, count, count - 1 if degree is None else degree)
        self.dealt = tuple(range(count)) if dealt is None else dealt
        self.pairs = [Pair.fresh() for _ in range(count)]
        self.b = [bytes([rank]) * 32 for rank in range(count)]
        adverts = [
            Advert(bytes(32), f"c{rank}", Pair.fresh().public, pair.public, b"") for rank, pair in enumerate(self.pairs)
        ]
        self.shares: dict[int, dict[int, tuple[bytes, bytes]]] = {rank: {} for rank in range(count)}
        for owner in self.dealt:
            holders = sorted((*self.near[owner], owner))
            places = [holder + 1 for holder in holders]
            both = zip(
                split(self.b[owner], threshold, places),
                split(self.pairs[owner].private_bytes, threshold, places),
                strict=True,
            )
            for holder, pair in zip(holders, both, strict=True):
                self.shares[holder][owner] = pair
        commitments = {rank: commitment(SID, self.b[rank]) for rank in self.dealt}
        self.about = Dealt(SID, threshold, MODEL, adverts, self.near, commitments)

    def give(self, unmasking: Unmasking, holder: int) -> None:
        mine = self.shares[holder]
        ranks = tuple(sorted(mine))
        unmasking.take(holder, ranks, b"".join(mine[rank][rank not in unmasking.survivors] for rank in ranks))

    def sum(self, survivors: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """What is left in a sum of zeros."""
        total = np.zeros(50, np.uint32)
        for rank in survivors:
            add, subtract = sides(rank, [other for other in self.near[rank] if other in self.dealt])

            def key(other: int, rank: int = rank) -> bytes:
                return pair_key(self.pairs[rank], self.pairs[other].public, SID, MODEL)

            Masks([self_key(self.b[rank], SID, f"c{rank}"), *map(key, add)], list(map(key, subtract))).apply(total)
        return total


def cleared(deck: Deck, unmasking: Unmasking) -> bool:
    total = deck.sum(unmasking.survivors)
    keys = [[part[at : at + 32] for at in range(0, len(part), 32)] for part in unmasking.masks()]
    Masks(*keys).apply(total)
    return not total.any()


@pytest.mark.parametrize(
    ("count", "threshold", "degree"), [(3, 2, None), (5, 3, None), (6, 4, None), (9, 3, 4), (12, 4, 6)]
)
def test_any_survivors_and_any_shares_give_the_masks(count: int, threshold: int, degree: int | None) -> None:
    """Whoever has dropped out before, after, or at the end; on the complete graph and on a ring."""
    for gone in (0, 1, 2):
        for lost in list(combinations(range(count), gone))[:12]:
            deck = Deck(count, threshold, degree, tuple(rank for rank in range(count) if rank not in lost[:1]))
            survivors = tuple(rank for rank in deck.dealt if rank not in lost)
            if len(survivors) < threshold:
                continue
            unmasking = Unmasking(deck.about, survivors)
            solved = False
            for holder in survivors:
                assert not solved or degree is None
                deck.give(unmasking, holder)
                solved = unmasking.solve()
                if degree is None:
                    assert solved == (len(unmasking.heard) >= threshold)
                if solved:
                    break
            assert cleared(deck, unmasking)
            assert not unmasking.wrong


def test_fewer_shares_than_the_threshold_give_nothing() -> None:
    """And somebody who may give more is waited for."""
    deck = Deck(5, 4)
    unmasking = Unmasking(deck.about, (0, 1, 2, 3))
    for holder in (0, 1, 2):
        deck.give(unmasking, holder)
        assert not unmasking.solve()
    assert unmasking.missing((0, 1, 2, 3)) and not unmasking.missing((0, 1, 2, 4))


@pytest.mark.parametrize("liars", [(0,), (5,), (0, 3)])
def test_wrong_shares_are_passed_over(liars: tuple[int, ...]) -> None:
    """As long as there are enough right ones; the others are noticed, and no wrong secret is used."""
    deck = Deck(7, 4)
    for liar in liars:
        deck.shares[liar] = {owner: (bytes(SHARE_BYTES), b"\xff" * SHARE_BYTES) for owner in deck.shares[liar]}
    unmasking = Unmasking(deck.about, (0, 1, 2, 3, 4, 5))
    for holder in unmasking.survivors:
        deck.give(unmasking, holder)
    assert unmasking.solve() and cleared(deck, unmasking)
    assert unmasking.wrong or liars == (5,)


def test_shares_that_were_not_asked_for_are_refused() -> None:
    """Of others, of fewer, of more, or of another length."""
    deck = Deck(4, 3, dealt=(0, 1, 2))
    unmasking = Unmasking(deck.about, (0, 1))
    assert [0, 1, 2] == unmasking.expected(0)
    for ranks, length in (((0, 1), 2), ((0, 1, 2, 3), 4), ((0, 1, 3), 3), ((2, 1, 0), 3), ((0, 1, 2), 2)):
        with pytest.raises(ProtocolError):
            unmasking.take(0, ranks, bytes(SHARE_BYTES * length))
    assert not unmasking.heard


def test_nothing_of_it_shows() -> None:
    """In a `repr`."""
    deck = Deck(3, 2)
    unmasking = Unmasking(deck.about, (0, 1, 2))
    deck.give(unmasking, 0)
    text = repr(unmasking) + repr(deck.about)
    assert not any(repr(part)[2:-1] in text for pair in deck.shares[0].values() for part in pair)
    assert repr(MODEL) not in text
