"""Shares come in, keys of masks come out: the coordinator's part of unmasking a sum (SPEC §14.4, stages 5 and 6).

Rules
- What is reconstructed is compared with what its owner committed to; if it does not fit, other shares are tried.
- Of each member one secret is asked for: b of a survivor, s of one that dropped out.
- Nothing of it shows in a `repr`; all of it is dropped when the session ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, islice

from ..protocol.errors import ProtocolError
from ..protocol.schema import Buffer
from ..protocol.secure.keys import Pair, commitment, pair_key, self_key
from ..protocol.secure.shares import SHARE_BYTES, Combiner
from ..protocol.session import Advert, by_rank

TRIES = 256
"""Sets of shares that are tried for one secret."""


@dataclass(frozen=True)
class Dealt:
    """What is known of a session when its input is in.

    Attributes:
        sid, threshold, model: of the session and its plan.
        adverts: by rank. near: the neighbours of each rank. commitments: of those who dealt, by rank.
    """

    sid: bytes = field(repr=False)
    threshold: int
    model: bytes = field(repr=False)
    adverts: Sequence[Advert] = field(repr=False)
    near: Sequence[Sequence[int]] = field(repr=False)
    commitments: Mapping[int, bytes] = field(repr=False)


class Unmasking:
    """One sum.

    Args:
        survivors: ranks, ascending.
    """

    def __init__(self, dealt: Dealt, survivors: Sequence[int]) -> None:
        self._dealt, self.survivors = dealt, tuple(survivors)
        self._given: dict[int, dict[int, bytes]] = {}
        """By holder, then by owner."""
        self._found: dict[int, bytes] = {}
        self._combiners: dict[tuple[int, ...], Combiner] = {}
        self._suspects: set[int] = set()
        """Holders without whose share one that was wrong became right."""
        self.wrong: set[int] = set()
        """Owners of whom a set of shares was wrong."""

    def __repr__(self) -> str:
        return f"Unmasking({len(self._given)} of {len(self.survivors)})"

    def expected(self, holder: int) -> list[int]:
        """Whose shares a survivor has, in the order in which it gives them."""
        return sorted([*(rank for rank in self._dealt.near[holder] if rank in self._dealt.commitments), holder])

    def take(self, holder: int, ranks: Sequence[int], buffer: Buffer) -> None:
        """A survivor's shares.

        Raises:
            ProtocolError: `malformed`: not those that it has.
        """
        shares = by_rank(ranks, buffer, SHARE_BYTES, "shares")
        if list(shares) != self.expected(holder):
            raise ProtocolError("malformed", "shares of others than were asked for")
        self._given[holder] = shares

    @property
    def heard(self) -> set[int]:
        return set(self._given)

    def solve(self) -> bool:
        """Reconstruct what can be; is it everything?"""
        return all(self._solve(owner) for owner in self._dealt.commitments)

    def _solve(self, owner: int) -> bool:
        if owner in self._found:
            return True
        threshold = self._dealt.threshold
        holders = [holder for holder in sorted({*self._dealt.near[owner], owner}) if holder in self._given]
        holders.sort(key=self._suspects.__contains__)  # stable: who gave a wrong share comes last
        for skipped in islice(_skips(holders), TRIES):
            chosen = tuple(sorted([holder for holder in holders if holder not in skipped][:threshold]))
            if len(chosen) < threshold:
                return False
            if self._try(owner, chosen):
                self._suspects.update(skipped)
                return True
            self.wrong.add(owner)
        return False

    def _try(self, owner: int, chosen: tuple[int, ...]) -> bool:
        combiner = self._combiners.get(chosen)
        if combiner is None:
            combiner = self._combiners[chosen] = Combiner([holder + 1 for holder in chosen])
        try:
            secret = combiner.combine([self._given[holder][owner] for holder in chosen])
            if not self._fits(owner, secret):
                return False
        except ProtocolError:
            return False
        self._found[owner] = secret
        return True

    def _fits(self, owner: int, secret: bytes) -> bool:
        if owner in self.survivors:
            return commitment(self._dealt.sid, secret) == self._dealt.commitments[owner]
        return Pair.of(secret).public == self._dealt.adverts[owner].masking

    def masks(self) -> tuple[bytes, bytes]:
        """The keys of the masks to add to the sum, and of those to subtract, end to end; `solve` has found everything."""
        alive = set(self.survivors)
        add: list[bytes] = []
        subtract = [
            self_key(self._found[rank], self._dealt.sid, self._dealt.adverts[rank].name) for rank in self.survivors
        ]
        for gone in self._dealt.commitments.keys() - alive:
            pair = Pair.of(self._found[gone])
            for other in alive.intersection(self._dealt.near[gone]):
                key = pair_key(pair, self._dealt.adverts[other].masking, self._dealt.sid, self._dealt.model)
                # the survivor added it if it has the lower rank
                (subtract if other < gone else add).append(key)
        return b"".join(add), b"".join(subtract)

    def missing(self, alive: Iterable[int]) -> bool:
        """May somebody who is still here give more?"""
        return bool(set(self.survivors).intersection(alive) - self._given.keys())


def _skips(holders: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """Whose shares to do without: nobody's, one's, two's, three's."""
    return chain.from_iterable(combinations(holders, count) for count in range(4))
