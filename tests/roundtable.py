"""Clients at a table, and a server whose every word the test says: for tests of servers that lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from roundnet import LAYOUT

from shoal.protocol.effects import COORDINATOR, Received, Send
from shoal.protocol.errors import ProtectionError
from shoal.protocol.rounds import (
    Advertise,
    Consent,
    Deal,
    Invite,
    Relay,
    Roster,
    Survivors,
    Unmask,
    Withdraw,
)
from shoal.protocol.secure.keys import Identity
from shoal.protocol.secure.plan import Plan, Policy
from shoal.protocol.session import SEALED_BYTES, Advert, Members, pack_adverts, pack_leaves, read_advert
from shoal.ps.recipe import Recipe
from shoal.worker.parley import Input, Over, Shards, Trained
from shoal.worker.round import Phase, RoundClient

MODEL = bytes([7]) * 32
ELEMENTS = 6
SHARD = 900
SESSION = 50


def plan_for(count: int, round_: int = 0, **settings: Any) -> Plan:
    recipe = Recipe(
        **{"active": True, "corrupt": 0.0, "dropout": 0.0, "threshold": count - 1, "minimum": count - 1, **settings}
    )
    if not recipe.active:
        recipe = replace(recipe, threshold=settings.get("threshold", 2), minimum=settings.get("minimum", 2))
    return recipe.plan(9, round_, count, (ELEMENTS,), LAYOUT, MODEL)


class Table:
    """Clients, and a server whose every word the test says."""

    def __init__(self, count: int = 4, policy: Policy | None = None, **settings: Any) -> None:
        self.count, self.plan = count, plan_for(count, **settings)
        self.names = [f"c{number}" for number in range(count)]
        self.identities = [Identity.fresh() for _ in range(count)]
        self.peers = {name: each.public for name, each in zip(self.names, self.identities, strict=True)}
        self.policy = policy or Policy(minimum=2, corrupt=0.0)
        self.clients = [
            RoundClient(number + 1, name, self.policy, ELEMENTS, LAYOUT, identity, self.peers)
            for number, (name, identity) in enumerate(zip(self.names, self.identities, strict=True))
        ]
        self.said: list[list[Any]] = [[] for _ in range(count)]
        self.session = SESSION
        self.adverts: list[Advert] = []

    def tell(self, number: int, kind: type[Any], *fields: Any) -> list[Any]:
        """A message of the coordinator's to one client; what it does then."""
        return self.give(number, Received(COORDINATOR, kind(number + 1, self.session, *fields)))

    def give(self, number: int, event: Any, now: float = 0.0) -> list[Any]:
        effects = self.clients[number].handle(event, now)
        self.said[number] += effects
        return effects

    def heard(self, number: int, kind: type[Any]) -> list[Any]:
        """What a client has said of this kind."""
        return [each.message for each in self.said[number] if isinstance(each, Send) and isinstance(each.message, kind)]

    def over(self, number: int) -> Over:
        (end,) = [each for each in self.said[number] if isinstance(each, Over)]
        return end

    def refused(self, number: int, error: type[Exception] = ProtectionError) -> str:
        """This client has left, told the server no more than the error's name, and has opened nothing."""
        end = self.over(number)
        assert isinstance(end.error, error) and end.result is None
        assert [error.__name__] == [each.code for each in self.heard(number, Withdraw)]
        assert not end.released and not self.heard(number, Unmask)
        assert Phase.IDLE == self.clients[number].phase
        return str(end.error)

    # --- an honest server, stage by stage

    def invite(self) -> None:
        for number in range(self.count):
            self.give(number, Shards((SHARD,)))
            self.tell(number, Invite, (self.plan.packed,))
        self.adverts = [read_advert(self.heard(number, Advertise)[-1].buffers[0], True) for number in range(self.count)]

    def rosters(self) -> list[tuple[bytes, bytes]]:
        members = Members(tuple(self.names), tuple(advert.leaf for advert in self.adverts))
        leaves = pack_leaves(members)
        return [(leaves, pack_adverts(a for a in self.adverts if a.name != name)) for name in self.names]

    def seat(self) -> None:
        self.invite()
        for number, roster in enumerate(self.rosters()):
            self.tell(number, Roster, roster)

    def train(self, number: int, **other: Any) -> None:
        given = Input(np.full(ELEMENTS, 0.1 * (number + 1), np.float32), 1.0, {}, MODEL)
        self.give(number, Trained(self.session, replace(given, **other)))

    def deal(self) -> None:
        self.seat()
        for number in range(self.count):
            self.train(number)

    def sealed_for(self, number: int) -> dict[int, bytes]:
        """What the others have dealt to a client, by rank."""
        found = {}
        for other in range(self.count):
            if other != number:
                place = number - (number > other)
                deal = bytes(self.heard(other, Deal)[-1].buffers[0])[32:]
                found[other] = deal[place * SEALED_BYTES : (place + 1) * SEALED_BYTES]
        return found

    def relay(self, dealt: Sequence[int] | None = None) -> None:
        self.deal()
        for number in range(self.count):
            sealed = {rank: text for rank, text in self.sealed_for(number).items() if dealt is None or rank in dealt}
            self.tell(number, Relay, tuple(sealed), (b"".join(sealed.values()),))

    def survive(self, number: int, *ranks: int) -> list[Any]:
        return self.tell(number, Survivors, ranks)

    def consents(self, ranks: Sequence[int]) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        return tuple(ranks), (b"".join(bytes(self.heard(each, Consent)[-1].buffers[0]) for each in ranks),)


def opened(table: Table, number: int) -> list[bytes]:
    """The shares that a client has given, all of them."""
    return [bytes(each.buffers[0]) for each in table.heard(number, Unmask)]
