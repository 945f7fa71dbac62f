"""Workers who say hello to a shard before the view that admits them has come (SPEC §3.1.3)."""

from __future__ import annotations

from ..protocol.effects import Peer
from ..protocol.messages import Hello, View

MOST = 16_384


class Early:
    """Their words, by incarnation. Of too many the oldest is forgotten: it is said again."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Peer, Hello]] = {}

    def wait(self, peer: Peer, hello: Hello) -> None:
        """Until the view of that run and epoch, or a later one."""
        if len(self._waiting) >= MOST and hello.incarnation not in self._waiting:
            del self._waiting[next(iter(self._waiting))]
        self._waiting[hello.incarnation] = (peer, hello)

    def admit(self, view: View) -> list[tuple[Peer, int]]:
        """Those who have waited for this view: peer and incarnation. They wait no more."""
        found = [(p, h) for p, h in self._waiting.values() if h.run == view.run and h.epoch <= view.epoch]
        for _, hello in found:
            del self._waiting[hello.incarnation]
        return [(peer, hello.incarnation) for peer, hello in found]
