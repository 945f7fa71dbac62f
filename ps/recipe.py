"""What an operator decides about federated rounds, and the plan of one that follows from it (SPEC §14.4).

Rules
- Everything that a plan says is checked when it is made: by the plan itself, and by what a secure round of so many needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.errors import ConfigError
from ..protocol.federated import NOISE, NORM, PROX, Aggregate, ServerRule
from ..protocol.join import SECAGG
from ..protocol.rounds import MAX_METRICS
from ..protocol.secure.parameters import CORRUPT, DROPOUT, LEAST, most, resolve
from ..protocol.secure.plan import Plan, Setting
from ..protocol.secure.privacy import FINE, Skellam
from ..protocol.session import DEAL, FINISH, STAGES, ranges
from .round import TURNS

DEADLINES = (20.0, 600.0, 60.0, 600.0, 20.0, 60.0, 120.0)
"""Seconds, by stage: advertise, deal, turn, masked, consent, unmask, finish."""


ROOM_BYTES = 1 << 27
"""Of the slices that a shard holds and has not added, beyond which clients send one at a time."""
MOST_MEASURED = 1024
"""Clients between whom distances are taken: they travel in one buffer."""
CAP, FIRST = 8.0, 256.0
"""The largest weight relative to the mean of the last round; in a first round, the largest relative to itself."""


def _near(mean: float) -> float:
    """A power of two: of the others' weights it says little more than what they are together."""
    return 2.0 ** round(math.log2(mean))


@dataclass(frozen=True, slots=True)
class Privacy:
    """Differential privacy, of clients.

    Attributes:
        multiplier: standard deviation of the noise in a sum, by `norm`. norm: L2 norm that every update is cut to.
        epsilon: the largest, over all rounds; 0: any. delta: for which.
    """

    multiplier: float
    norm: float
    epsilon: float
    delta: float

    def skellam(self, elements: int, honest: int) -> Skellam:
        """As clients add it, of whom so many are honest whoever drops out.

        Raises:
            ConfigError: there is none.
        """
        if honest < 1:
            raise ConfigError(
                "noise counts on honest survivors, and with so few clients there may be none", hint="more workers"
            )
        return Skellam(self.norm, self.multiplier, math.ceil(FINE * math.sqrt(elements)), honest)


def recipe(
    rounds: int = 0,
    round_timeout: float = 60.0,
    protection: str = SECAGG,
    cohort: int = 0,
    clip: float = 1.0,
    modulus: int = 32,
    over: float = 0.0,
    minimum: int = 0,
    threshold: int = 0,
    server_optimizer: str = "fedavg",
    aggregate: str = "mean",
    prox: float = 0.0,
    noise: float = 0.0,
    norm: float = 1.0,
    epsilon: float = 0.0,
    delta: float = 1e-5,
    active: bool = False,
) -> Recipe:
    """What an operator has typed. `round_timeout`: seconds to train in; nothing else takes longer."""
    deadlines = [min(seconds, round_timeout) for seconds in DEADLINES]
    deadlines[DEAL], deadlines[FINISH] = round_timeout, DEADLINES[FINISH]
    return Recipe(
        protection,
        active,
        cohort or None,
        over,
        minimum=minimum or None,
        threshold=threshold or None,
        bits=modulus,
        clip=clip,
        training=(*ServerRule.parse(server_optimizer).settings, *Aggregate.parse(aggregate).settings, (PROX, prox)),
        deadlines=tuple(deadlines),
        measured=True,
        privacy=Privacy(noise, norm, epsilon, delta) if noise else None,
        rounds=rounds or None,
    )


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rounds as an operator wants them.

    Attributes:
        protection: SECAGG or CLEAR. active: may the servers lie?
        clients: wanted in a round, or None for all that are here. over: so many more are invited, as a share of them.
        least: with fewer workers than these no round begins.
        minimum, threshold, corrupt, dropout: as `parameters.resolve`; in the clear the first alone counts.
        bits, clip, cap, reference: how updates become integers, as in a plan. training, deadlines, noise: as in a plan.
        measured: weights are numbers of examples, and `cap` and `reference` follow from the mean of the last round. Of the first
            nothing is known: it has room for any, and therefore 32 bits.
        privacy: noise for all rounds, and how much may be told; with it weights are uniform and there are no metrics.
        rounds: after so many there are no more, or None. room: slices that a shard has room for, at most.
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
    measured: bool = False
    metrics: tuple[str, ...] = ()
    deadlines: tuple[float, ...] = DEADLINES
    noise: Skellam | None = None
    privacy: Privacy | None = None
    rounds: int | None = None
    room: int = TURNS

    @property
    def fewest(self) -> int:
        """With fewer workers no round can be."""
        return max(self.least, LEAST if self.protection == SECAGG else 1)

    @property
    def group(self) -> int:
        """The size of standing groups, or 0: sums in the clear or with noise need none (SPEC §14.9)."""
        standing = self.protection == SECAGG and self.privacy is None and not self.over
        return self.clients if self.clients and standing else 0

    def cohort(self, here: int) -> int:
        """How many of those who are here are invited; 0: no round can begin."""
        if here < self.least:
            return 0
        return here if self.clients is None else min(here, round(self.clients * (1 + self.over)))

    def turns(self, plan: Plan) -> int:
        """How many clients may send at a time: fewer where their slices are large, of which one alone keeps a shard busy."""
        largest = max(stop - start for start, stop in plan.shards) * plan.bits // 8
        return max(1, min(self.room, ROOM_BYTES // largest))

    def plan(
        self,
        run: int,
        round_: int,
        cohort: int,
        sizes: Sequence[int],
        layout: bytes,
        model: bytes,
        metrics: tuple[str, ...] = (),
        mean: float | None = None,
    ) -> Plan:
        """The plan of a round.

        Args:
            cohort: how many are invited. sizes: elements of each shard.
            layout: the layout's digest, 32 bytes. model: that of the weights.
            metrics: names that all who are invited can say, beside the recipe's own.
            mean: the mean weight in the last round, if there was one.

        Raises:
            ConfigError: it cannot be done with so many; the text says which inequality does not hold.
        """
        if len(self.deadlines) != STAGES:
            raise ConfigError(f"{len(self.deadlines)} deadlines for {STAGES} stages")
        masked = self.protection == SECAGG
        aggregate = Aggregate.read(dict(self.training))
        if aggregate.name != "mean" and (masked or self.noise):
            raise ConfigError(
                f"{aggregate.name} needs every update as it is, and in {self.protection} there are only sums",
                hint="--protection clear, or --aggregate mean",
            )
        if aggregate.name != "mean" and self.privacy is not None:
            raise ConfigError(
                f"noise hides one client in a mean, and {aggregate.name} may show far more of one",
                hint="--aggregate mean, or no --noise",
            )
        needed = aggregate.needed
        if not needed <= cohort <= (MOST_MEASURED if aggregate.chooses else cohort):
            raise ConfigError(f"{aggregate.name} needs {needed} to {MOST_MEASURED} clients, and {cohort} are here")
        degree = threshold = 0
        minimum = min(cohort, max(self.minimum or 1, needed))
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
        bits, cap, reference = self.bits, self.cap, self.reference
        noise, training = self.noise, self.training
        if self.privacy is not None:
            cap = 1.0
            if masked:
                noise = self.privacy.skellam(sum(sizes), minimum - most(self.corrupt, cohort))
            else:
                training = (*training, (NOISE, self.privacy.multiplier), (NORM, self.privacy.norm))
        private = noise is not None or self.privacy is not None
        if self.measured and not private:
            bits, cap, reference = (bits, CAP, _near(mean)) if mean else (32, FIRST, FIRST)
        return Plan(
            run=run,
            round=round_,
            protection=self.protection,
            cohort=cohort,
            minimum=minimum,
            threshold=threshold,
            degree=degree,
            active=self.active and masked,
            bits=bits,
            clip=self.clip,
            cap=cap,
            reference=reference,
            elements=sum(sizes),
            layout=layout,
            model=model,
            shards=ranges(sizes),
            training=training,
            metrics=() if private else tuple(sorted({*self.metrics, *metrics}))[:MAX_METRICS],
            deadlines=self.deadlines,
            noise=noise,
        )
