"""The memory that values and gradients travel in, for callers who want no copy (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .arrays import Array

if TYPE_CHECKING:
    from .exchange import Exchange


class Buffers:
    """A worker's own arrays: where pulls arrive, and where pushes leave from. Made by `Worker.buffers`.

    To give other arrays to `pull(out=…)` and `push` is as right, and costs one copy more.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @property
    def weights(self) -> Mapping[str, Array]:
        """By name, what the last pull brought: `worker.pull(out=worker.buffers.weights)`. To be read, and only between pulls.

        After a pull that has failed this is other memory: ask again.
        """
        cache = self._exchange.cache
        assert cache is not None
        return cache.views(self._exchange.templates)

    @property
    def gradients(self) -> Mapping[str, Array]:
        """By name, arrays to write the next gradients to, all of them: `worker.push(worker.buffers.gradients)`.

        They hold anything. From the push on they are the shards'; ask again for the next ones. There are two sets or more; this
        waits when too many bytes are not acknowledged.
        """
        return self._exchange.lend(None)
