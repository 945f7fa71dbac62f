"""A client's secrets in one session, and what it checks before it uses them (SPEC §14.4, §14.5).

Rules
- They are in memory only, show in no `repr` and no error, and are gone after `drop`.
- What does not fit raises `ProtectionError` or `ProtocolError`, before anything is given away. The text names the rule.
- Of each member one secret is opened, once: which one follows from the survivors.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from ..protocol.errors import ProtectionError
from ..protocol.join import SECAGG
from ..protocol.schema import Buffer
from ..protocol.secure.checks import Standing, refusal
from ..protocol.secure.graph import neighbours_of, sides
from ..protocol.secure.keys import SIGNATURE_BYTES, Identity, Pair, commitment, pair_key, seal, self_key, unseal, verify
from ..protocol.secure.plan import Plan, Policy
from ..protocol.secure.shares import SHARE_BYTES, split
from ..protocol.session import MAX_COMPLETE, SEALED_BYTES, Advert, Members, by_rank, consent

_SECRET_BYTES = 32


def refuse(what: str) -> ProtectionError:
    """A round that this worker takes no more part in."""
    return ProtectionError(
        f"this worker has left a federated round: {what}",
        cause="a server or another worker that does not keep to the protocol",
        hint="shoal status; if it happens again, do not trust this cluster",
    )


class Hand:
    """A client in a session.

    Args:
        name: the client's. identity: what it signs with, if the plan is active.

    Attributes:
        advert: what it tells the others.
        rank, count: its own, and of how many, once it has a seat.
    """

    def __init__(self, plan: Plan, name: str, identity: Identity | None) -> None:
        self.masked = plan.protection == SECAGG
        self._plan, self._identity = plan, identity if plan.active else None
        self._sealing = Pair.fresh() if self.masked else None
        self._masking = Pair.fresh() if self.masked else None
        self.advert = self._advertise(name)
        self.rank = -1
        self.count = 0
        self._names: dict[int, str] = {}
        """By rank, of its neighbours and its own: of the others a client keeps nothing."""
        self._sid = b""
        self._near: tuple[int, ...] = ()
        self._adverts: dict[int, Advert] = {}
        self._b = b""
        self._shares: dict[int, bytes] = {}
        """Of each member that dealt, and of this one, its share of b and of s."""
        self._spent = False

    def __repr__(self) -> str:
        return f"Hand({self.advert.name!r}, rank {self.rank})"

    def _advertise(self, name: str) -> Advert:
        if self._sealing is None or self._masking is None:
            return Advert(self._plan.context, name, b"", b"", b"")
        keys = self._sealing.public, self._masking.public
        bare = Advert(self._plan.context, name, *keys, b"")
        return Advert(bare.context, name, *keys, self._identity.sign(bare.signed)) if self._identity else bare

    # --- the roster

    def seat(
        self, members: Members, adverts: Sequence[Advert], policy: Policy, peers: Mapping[str, bytes] | None
    ) -> None:
        """Take a place among the members.

        Args:
            adverts: of the neighbours, by rank. peers: pinned public keys by name; needed if the plan is active.

        Raises:
            ProtectionError: a rule of SPEC §14.5.3 is broken.
        """
        plan, name, count = self._plan, self.advert.name, len(members.names)
        if count < plan.minimum or count > plan.cohort:
            raise refuse(f"{count} members, where {plan.minimum} to {plan.cohort} are planned")
        if name not in members.names:
            raise refuse("this worker is not among the members")
        rank = members.names.index(name)
        if members.leaves[rank] != self.advert.leaf:
            raise refuse("the roster has another advert of this worker than its own")
        if self.masked:
            policy.check_count(plan, count)
            degree = plan.degree_of(count)
            if degree == count - 1 and count > MAX_COMPLETE:
                raise refuse(f"{count} members that are all neighbours, and {MAX_COMPLETE} are the most")
            self._sid = members.sid(plan.context)
            self._near = neighbours_of(rank, self._sid, count, degree)
            self._meet(members, adverts, peers)
        elif adverts:
            raise refuse("adverts in the clear")
        self.count, self.rank = count, rank
        self._names = {each: members.names[each] for each in (*self._near, rank)}

    def _meet(self, members: Members, adverts: Sequence[Advert], peers: Mapping[str, bytes] | None) -> None:
        if len(adverts) != len(self._near):
            raise refuse(f"{len(adverts)} adverts of {len(self._near)} neighbours")
        seen = {self.advert.sealing, self.advert.masking}
        for rank, advert in zip(self._near, adverts, strict=True):
            who = f"the advert of {members.names[rank]!r}"
            if advert.name != members.names[rank] or advert.leaf != members.leaves[rank]:
                raise refuse(f"{who} is not the one that was counted")
            if advert.context != self._plan.context:
                raise refuse(f"{who} is of another plan")
            if self._plan.active and not verify((peers or {}).get(advert.name, b""), advert.signature, advert.signed):
                raise refuse(f"{who} is not signed by the identity that is pinned here")
            if {advert.sealing, advert.masking} & seen or advert.sealing == advert.masking:
                raise refuse(f"{who} has a key that occurs twice")
            seen |= {advert.sealing, advert.masking}
        self._adverts = dict(zip(self._near, adverts, strict=True))

    # --- shares

    def deal(self) -> bytes:
        """The commitment and the sealed shares, for `Deal`. To be called once: it draws new secrets."""
        if self._sealing is None or self._masking is None:
            return b""
        self._b = secrets.token_bytes(_SECRET_BYTES)
        holders = sorted((*self._near, self.rank))
        places = [rank + 1 for rank in holders]
        threshold = self._plan.threshold
        ours = [split(secret, threshold, places) for secret in (self._b, self._masking.private_bytes)]
        shares = {rank: b + s for rank, b, s in zip(holders, *ours, strict=True)}
        self._shares = {self.rank: shares[self.rank]}
        sealed = [
            seal(
                self._sealing,
                self._adverts[rank].sealing,
                self._sid,
                self._names[self.rank],
                self._names[rank],
                shares[rank],
            )
            for rank in self._near
        ]
        return commitment(self._sid, self._b) + b"".join(sealed)

    def take(self, ranks: Sequence[int], buffer: Buffer) -> None:
        """Open what neighbours have dealt.

        Raises:
            ProtectionError, ProtocolError: a rule of SPEC §14.5.4 is broken.
        """
        sealed = by_rank(ranks, buffer, SEALED_BYTES, "sealed shares")
        if self._sealing is None:
            if sealed:
                raise refuse("shares in the clear")
            return
        if not sealed.keys() <= set(self._near):
            raise refuse("shares of somebody who is no neighbour")
        if len(sealed) + 1 < self._plan.threshold:
            raise refuse(f"{len(sealed)} neighbours dealt, and {self._plan.threshold - 1} are the fewest")
        for rank, text in sealed.items():
            pair = self._names[rank], self._names[self.rank]
            self._shares[rank] = unseal(self._sealing, self._adverts[rank].sealing, self._sid, *pair, text)

    # --- masks

    def keys(self, model: bytes) -> tuple[list[bytes], list[bytes]]:
        """The keys of the masks to add and of those to subtract.

        Args:
            model: the digest of the weights that this client was given, as it computed it.
        """
        if self._masking is None:
            return [], []
        dealt = [rank for rank in self._near if rank in self._shares]

        def pair(rank: int) -> bytes:
            assert self._masking is not None
            return pair_key(self._masking, self._adverts[rank].masking, self._sid, model)

        add, subtract = sides(self.rank, dealt)
        own = self_key(self._b, self._sid, self.advert.name)
        return [own, *map(pair, add)], [pair(rank) for rank in subtract]

    # --- survivors

    def check(self, survivors: tuple[int, ...], sent: bool, released: bool) -> None:
        """May this client help to unmask the sum of these?

        Args:
            sent: has it sent all of its input? released: has it given shares for this round before?

        Raises:
            ProtectionError: a rule of `checks` is broken.
        """
        standing = Standing(
            self.rank,
            set(range(self.count)),
            set(self._near),
            set(self._shares) - {self.rank},
            self._plan.minimum,
            self._plan.threshold,
            sent and not self._spent,
            released,
        )
        broken = refusal(standing, survivors)
        if broken:
            raise refuse(f"it was asked to open a sum that it must not: {broken}")

    def sign(self, survivors: Sequence[int]) -> bytes:
        """This client's consent to these survivors."""
        assert self._identity is not None, "a plan that is active is not accepted without an identity"
        return self._identity.sign(consent(self._sid, survivors))

    def agreed(
        self, survivors: Sequence[int], ranks: Sequence[int], buffer: Buffer, peers: Mapping[str, bytes] | None
    ) -> None:
        """Have enough of the others seen the same survivors?

        Raises:
            ProtectionError: no (SPEC §14.5.6). ProtocolError: these are no signatures.
        """
        signed = consent(self._sid, survivors)
        asked = {*self._near, self.rank} & set(survivors)
        good = sum(
            rank == self.rank or verify((peers or {}).get(self._names[rank], b""), signature, signed)
            for rank, signature in by_rank(ranks, buffer, SIGNATURE_BYTES, "signatures").items()
            if rank in asked
        )
        if good < self._plan.threshold:
            raise refuse(f"{good} have confirmed the same survivors, and {self._plan.threshold} are the fewest")

    def open(self, survivors: Sequence[int]) -> tuple[tuple[int, ...], bytes]:
        """Ranks and shares for `Unmask`: of a survivor's b, of another's s. Then nothing is left to be opened."""
        assert not self._spent, "a client unmasks once"
        self._spent = True
        alive, ranks = set(survivors), tuple(sorted(self._shares))
        shares = [
            self._shares[rank][:SHARE_BYTES] if rank in alive else self._shares[rank][SHARE_BYTES:] for rank in ranks
        ]
        self.drop()
        return ranks, b"".join(shares)

    def drop(self) -> None:
        """Forget every secret."""
        self._sealing = self._masking = None
        self._b = b""
        self._shares.clear()
