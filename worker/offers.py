"""Regions that are offered to the shards of this machine (SPEC §11).

Rules
- An offer is repeated until it is answered, and made anew to each life of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..protocol.messages import Share, Shared, Unshare
from .calls import ShareCalled
from .link import Link
from .outgoing import Outgoing

RETRY = 1.0


class Offers:
    """What is on offer. What became of an offer is kept with the link."""

    def __init__(self, out: Outgoing) -> None:
        self._out = out
        self._regions: dict[int, ShareCalled] = {}
        self._waiting: dict[int, int] = {}
        """Tickets that wait for all shards' word on a region."""

    def share(self, call: ShareCalled) -> None:
        """From now on."""
        self._regions[call.region] = call
        self._waiting[call.ticket] = call.region

    def unshare(self, incarnation: int, region: int, links: Sequence[Link]) -> None:
        """No more. Those who have it are told once: if that is lost, they have it until this life ends."""
        self._regions.pop(region, None)
        for link in links:
            if link.shared.pop(region, None) == "" and link.open:
                self._out.send(link.place.index, Unshare(incarnation, link.shard, region))

    def answered(self, link: Link, message: Shared) -> None:
        """A shard has taken a region, or has said why not."""
        if message.region in self._regions:
            link.shared[message.region] = "" if message.accepted else message.why or "no reason was given"

    def answered_by(self, link: Link) -> bool:
        """Has this shard said its word on everything?"""
        return link.shared.keys() >= self._regions.keys()

    def pursue(self, incarnation: int, links: Sequence[Link], now: float) -> None:
        """Offer what is not answered. `links` are those to the shards that own blocks."""
        for region, call in self._regions.items():
            for link in links:
                if link.may_offer(region, now, RETRY):
                    offer = Share(incarnation, link.shard, region, call.pid, call.fd, call.size, (call.token,))
                    self._out.send(link.place.index, offer)
        for ticket, region in list(self._waiting.items()):
            if all(region in link.shared for link in links):
                del self._waiting[ticket]
                self._out.resolve(ticket, {link.place.index: link.shared[region] for link in links})

    def cancel(self, ticket: int) -> None:
        self._waiting.pop(ticket, None)

    def fail(self, error: Exception) -> None:
        """Whoever waits is told."""
        while self._waiting:
            self._out.fail(self._waiting.popitem()[0], error)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)
