"""What servers and workers do in a federated round beside averaging, by name and numbers, as it travels in a plan (SPEC §14.10).

Rules
- A name is looked up in a table, never run. What is not in the table is refused.
- Numbers that are not given are those of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from .errors import ConfigError

Setting = int | float | str

SERVER = "server"
PROX = "prox"
"""Names of settings in a plan; the numbers of the server's rule are behind `server.`."""

SUM = "sum:"
"""A metric whose name begins so is summed over clients; any other is averaged by weight."""

RULES: dict[str, dict[str, float]] = {
    "fedavg": {"lr": 1.0},
    "fedavgm": {"lr": 1.0, "momentum": 0.9},
    "fedadagrad": {"lr": 0.1, "beta1": 0.0, "tau": 1e-3},
    "fedadam": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
}
"""Server optimizers with their numbers: McMahan et al. 2017, Hsu et al. 2019, Reddi et al. 2021 (algorithm 2, defaults of §5)."""


AGGREGATES: dict[str, dict[str, float]] = {
    "mean": {},
    "median": {},
    "trimmed": {"share": 0.1},
    "krum": {"faulty": 1.0},
    "multikrum": {"faulty": 1.0, "keep": 3.0},
}
"""What is made of the updates, with numbers: Yin et al. 2018, Blanchard et al. 2017. All but the mean need them in the clear."""
AGGREGATE = "aggregate"
NOISE, NORM = "noise", "norm"
"""In the clear: the standard deviation of the noise that servers add to a sum, by the L2 norm that each update is cut to."""


@dataclass(frozen=True, slots=True)
class _Named:
    """A name of a table, and numbers by name where they are not the usual ones.

    Raises:
        ConfigError: there is no such name, it has no such number, or the number cannot be.
    """

    name: str
    numbers: tuple[tuple[str, float], ...] = ()

    TABLE: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    KEY: ClassVar[str] = ""
    WHAT: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.name not in self.TABLE:
            raise ConfigError(f"there is no {self.WHAT} {self.name!r}", hint=f"one of {', '.join(self.TABLE)}")
        for name, value in self.numbers:
            if name not in self.TABLE[self.name]:
                known = ", ".join(self.TABLE[self.name]) or "no numbers"
                raise ConfigError(f"{self.name} has no {name}", hint=f"it has {known}")
            if not self._fits(name, value):
                raise ConfigError(f"{self.name}: {name} is {value:g}")

    @staticmethod
    def _fits(name: str, value: float) -> bool:
        return math.isfinite(value)

    @property
    def named(self) -> dict[str, float]:
        """All numbers by name."""
        return {**self.TABLE[self.name], **dict(self.numbers)}

    @property
    def settings(self) -> tuple[tuple[str, Setting], ...]:
        """As they stand in a plan."""
        return ((self.KEY, self.name), *((f"{self.KEY}.{name}", value) for name, value in self.named.items()))

    @classmethod
    def parse(cls, text: str) -> Self:
        """As an operator types it: `fedadam`, `fedadam:lr=0.03,tau=0.01`.

        Raises:
            ConfigError: as the class, or a number that is none.
        """
        name, _, numbers = text.partition(":")
        pairs = [pair.partition("=") for pair in numbers.split(",") if pair]
        try:
            return cls(name, tuple((key, float(number)) for key, _, number in pairs))
        except ValueError:
            raise ConfigError(f"{numbers!r} is no list of numbers by name", hint="NAME:X=1,Y=0.5") from None

    @classmethod
    def read(cls, settings: Mapping[str, Setting]) -> Self:
        """What a plan says; what it does not say is the usual.

        Raises:
            ConfigError: as the class.
        """
        numbers = tuple(
            (name.removeprefix(f"{cls.KEY}."), float(value))
            for name, value in settings.items()
            if name.startswith(f"{cls.KEY}.")
        )
        return cls(str(settings.get(cls.KEY, next(iter(cls.TABLE)))), numbers)


@dataclass(frozen=True, slots=True)
class ServerRule(_Named):
    """How the average of a round's updates changes the weights."""

    name: str = "fedavg"

    TABLE: ClassVar[Mapping[str, Mapping[str, float]]] = RULES
    KEY: ClassVar[str] = SERVER
    WHAT: ClassVar[str] = "server optimizer"

    @staticmethod
    def _fits(name: str, value: float) -> bool:
        below = 1.0 if name in ("beta1", "beta2", "momentum") else math.inf
        return 0 <= value < below and not (value == 0 and name in ("lr", "tau"))


@dataclass(frozen=True, slots=True)
class Aggregate(_Named):
    """What is made of the updates of a round."""

    name: str = "mean"

    TABLE: ClassVar[Mapping[str, Mapping[str, float]]] = AGGREGATES
    KEY: ClassVar[str] = AGGREGATE
    WHAT: ClassVar[str] = "aggregate"

    @staticmethod
    def _fits(name: str, value: float) -> bool:
        if name == "share":
            return 0 <= value < 0.5
        return value == int(value) and value >= (name == "keep") if math.isfinite(value) else False

    @property
    def chooses(self) -> bool:
        """Must all shards agree on whose updates count?"""
        return self.name in ("krum", "multikrum")

    @property
    def keep(self) -> int:
        """How many are chosen."""
        return int(self.named.get("keep", 1))

    @property
    def needed(self) -> int:
        """So many updates at least, or liars may be chosen: 2f + 3 and f + 2 + keep (Blanchard et al. 2017)."""
        faulty = int(self.named.get("faulty", 0))
        return max(2 * faulty + 3, faulty + 2 + self.keep) if self.chooses else 1
