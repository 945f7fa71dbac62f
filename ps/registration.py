"""The model that is trained, as a coordinator knows it, and who gives a shard its first weights (SPEC §4.3).

Rules
- The first worker's model is the model; every other must be the same.
- One worker at a time fills; another takes its place only when it is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.layout import Layout, lay_out
from ..protocol.messages import Model
from ..protocol.model import ModelSpec, read_model
from .members import Life
from .shards import Held, Shards


class Registration:
    """Of one run.

    Attributes:
        spec: None before a worker has registered. message: what tells shards of it. filler: an incarnation, or 0.
    """

    def __init__(self, run: int) -> None:
        self.run = run
        self.spec: ModelSpec | None = None
        self.message: Model | None = None
        self.filler = 0
        self._count = 0

    def read(self, description: bytes) -> ModelSpec:
        """What a worker has sent.

        Raises:
            ProtocolError: it is no model.
        """
        if self.spec is not None and self.spec.description == description:
            return self.spec
        return read_model(description)

    def lay_out(self, spec: ModelSpec, shards: Shards, block_bytes: int) -> Layout:
        """This is the model. The shards that are here have it from now on."""
        layout = lay_out(spec, len(shards), block_bytes)
        self.spec = spec
        shards.fixed, shards.digest = layout.shards, layout.digest
        shards.idle = frozenset(i for i, blocks in enumerate(layout.by_shard) if not blocks)
        self.message = Model(self.run, layout.shards, layout.block_bytes, layout.digest, (spec.description,))
        return layout

    def count(self, life: Life) -> bool:
        """A worker has registered this model. True if it had not before."""
        if life.registered:
            return False
        self._count += 1
        life.registered = self._count
        return True

    def choose_filler(self, shards: Shards, lives: Iterable[Life], alive: bool) -> bool:
        """True if somebody else fills now, or nobody any more.

        Args:
            alive: is the one before still here?
        """
        before, unfilled = self.filler, shards.unfilled if self.message else ()
        if not unfilled:
            self.filler = 0
        elif not alive:
            ready = [life for life in lives if life.registered]
            best = max(ready, key=lambda life: (life.entered, life.clock, life.round, -life.registered), default=None)
            self.filler = best.incarnation if best else 0
        return self.filler != before

    def lacked_by(self, held: Held, shards: Shards) -> bool:
        """Has this shard of the layout not taken in the model?"""
        return self.message is not None and held.place.index < shards.fixed and held.digest != self.message.digest
