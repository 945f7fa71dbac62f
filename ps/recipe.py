"""What an operator decides about federated rounds, and the plan of one that follows from it (SPEC §14.4).

Rules
- Everything that a plan says is checked when it is made: by the plan itself, and by what a secure round of so many needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.errors import ConfigError
from ..protocol.secure.parameters import CORRUPT, DROPOUT, resolve
from ..protocol.secure.plan import SECAGG, Plan, Setting
from ..protocol.secure.privacy import Skellam
from ..protocol.session import STAGES, ranges
from .round import TURNS

DEADLINES = (20.0, 600.0, 60.0, 600.0, 20.0, 60.0, 120.0)
"""Seconds, by stage: advertise, deal, turn, masked, consent, unmask, finish."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rounds as an operator wants them.

    Attributes:
        protection: SECAGG or CLEAR. active: may the servers lie?
        clients: wanted in a round, or None for all that are here. over: so many more are invited, as a share of them.
        least: with fewer workers than these no round begins.
        minimum, threshold, corrupt, dropout: as `parameters.resolve`; in the clear the first alone counts.
        bits, clip, cap, reference: how updates become integers, as in a plan. training, metrics, deadlines, noise: as in a plan.
        rounds: after so many there are no more, or None. room: slices that a shard has room for.
    """

    protection: str = SECAGG
    active: bool = False
    clients: int | None = None
    over: float = 0.0
    least: int = 1
    minimum: int | None = None
    threshold: int | None = None
    corrupt: float = CORRUPT
    dropout: float = DROPOUT
    bits: int = 32
    clip: float = 1.0
    cap: float = 1.0
    reference: float = 1.0
    training: tuple[tuple[str, Setting], ...] = ()
    metrics: tuple[str, ...] = ()
    deadlines: tuple[float, ...] = DEADLINES
    noise: Skellam | None = None
    rounds: int | None = None
    room: int = TURNS

    def cohort(self, here: int) -> int:
        """How many of those who are here are invited; 0: no round can begin."""
        if here < self.least:
            return 0
        return here if self.clients is None else min(here, round(self.clients * (1 + self.over)))

    def plan(self, run: int, round_: int, cohort: int, sizes: Sequence[int], layout: bytes, model: bytes) -> Plan:
        """The plan of a round.

        Args:
            cohort: how many are invited. sizes: elements of each shard.
            layout: the layout's digest, 32 bytes. model: that of the weights.

        Raises:
            ConfigError: it cannot be done with so many; the text says which inequality does not hold.
        """
        if len(self.deadlines) != STAGES:
            raise ConfigError(f"{len(self.deadlines)} deadlines for {STAGES} stages")
        masked = self.protection == SECAGG
        degree = threshold = 0
        minimum = min(cohort, self.minimum or 1)
        if masked:
            found = resolve(
                cohort,
                active=self.active,
                corrupt=self.corrupt,
                dropout=self.dropout,
                threshold=self.threshold,
                minimum=self.minimum,
            )
            degree, threshold, minimum = found.degree, found.threshold, found.minimum
        return Plan(
            run=run,
            round=round_,
            protection=self.protection,
            cohort=cohort,
            minimum=minimum,
            threshold=threshold,
            degree=degree,
            active=self.active and masked,
            bits=self.bits,
            clip=self.clip,
            cap=self.cap,
            reference=self.reference,
            elements=sum(sizes),
            layout=layout,
            model=model,
            shards=ranges(sizes),
            training=self.training,
            metrics=self.metrics,
            deadlines=self.deadlines,
            noise=self.noise,
        )
