"""What servers and workers do in a federated round beside averaging, by name and numbers, as it travels in a plan (SPEC §14.10).

Rules
- A name is looked up in a table, never run. What is not in the table is refused.
- Numbers that are not given are those of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

Setting = int | float | str

SERVER = "server"
PROX = "prox"
"""Names of settings in a plan; the numbers of the server's rule are behind `server.`."""

RULES: dict[str, dict[str, float]] = {
    "fedavg": {"lr": 1.0},
    "fedavgm": {"lr": 1.0, "momentum": 0.9},
    "fedadagrad": {"lr": 0.1, "beta1": 0.0, "tau": 1e-3},
    "fedadam": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
    "fedyogi": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
}
"""Server optimizers with their numbers: McMahan et al. 2017, Hsu et al. 2019, Reddi et al. 2021 (algorithm 2, defaults of §5)."""


@dataclass(frozen=True, slots=True)
class ServerRule:
    """How the average of a round's updates changes the weights.

    Raises:
        ConfigError: there is no such rule, it has no such number, or the number cannot be.
    """

    name: str = "fedavg"
    numbers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"there is no server optimizer {self.name!r}", hint=f"one of {', '.join(RULES)}")
        for name, value in self.numbers:
            if name not in RULES[self.name]:
                known = ", ".join(RULES[self.name])
                raise ConfigError(f"{self.name} has no {name}", hint=f"it has {known}")
            below_one = name in ("beta1", "beta2", "momentum")
            if not 0 <= value < (1 if below_one else math.inf) or (value == 0 and name in ("lr", "tau")):
                raise ConfigError(f"{self.name}: {name} is {value:g}")

    @property
    def named(self) -> dict[str, float]:
        """All numbers by name."""
        return RULES[self.name] | dict(self.numbers)

    @property
    def settings(self) -> tuple[tuple[str, Setting], ...]:
        """As they stand in a plan."""
        return ((SERVER, self.name), *((f"{SERVER}.{name}", value) for name, value in self.named.items()))

    @classmethod
    def parse(cls, text: str) -> ServerRule:
        """As an operator types it: `fedadam`, `fedadam:lr=0.03,tau=0.01`.

        Raises:
            ConfigError: as the class, or a number that is none.
        """
        name, _, numbers = text.partition(":")
        pairs = [pair.partition("=") for pair in numbers.split(",") if pair]
        try:
            return cls(name, tuple((key, float(number)) for key, _, number in pairs))
        except ValueError:
            raise ConfigError(f"{numbers!r} is no list of numbers by name", hint="lr=0.03,tau=0.01") from None

    @classmethod
    def read(cls, settings: Mapping[str, Setting]) -> ServerRule:
        """What a plan says.

        Raises:
            ConfigError: as the class.
        """
        numbers = tuple(
            (name.removeprefix(f"{SERVER}."), float(value))
            for name, value in settings.items()
            if name.startswith(f"{SERVER}.")
        )
        return cls(str(settings.get(SERVER, "fedavg")), numbers)
