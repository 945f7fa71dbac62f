"""What is done about gradients that were computed on older weights: by name and numbers (SPEC §13). `ps/stale` does it.

Rules
- A remedy travels in the model description, so that all workers agree, and is refused unless the table has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from .errors import ConfigError
from .rules import Rule

REMEDIES: dict[str, tuple[str, ...]] = {"none": (), "scale": (), "compensate": ("lam", "adaptive")}
MAX_LAM = 1000.0


@dataclass(frozen=True, slots=True)
class Stale:
    """A remedy: its name and its numbers in the order of `REMEDIES[name]`.

    Raises:
        ConfigError: an unknown name, a wrong count, a number out of range.
    """

    name: str = "none"
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in REMEDIES:
            known = ", ".join(name for name in REMEDIES if name != "none")
            raise ConfigError(f"there is no remedy {self.name!r} for stale gradients", hint=f"one of {known}, or None")
        if len(self.numbers) != len(REMEDIES[self.name]):
            raise ConfigError(f"{self.name} takes {len(REMEDIES[self.name])} numbers, not {len(self.numbers)}")
        if self.name == "compensate":
            lam, adaptive = self.numbers
            if not (math.isfinite(lam) and 0 < lam <= MAX_LAM):
                raise ConfigError(f"compensate: lam is {lam}", hint=f"above 0, up to {MAX_LAM:g}; the paper has 0.04")
            if adaptive not in (0.0, 1.0):
                raise ConfigError(f"compensate: adaptive is a flag, not {adaptive}")

    def __bool__(self) -> bool:
        return self.name != "none"

    def __str__(self) -> str:
        numbers = ", ".join(f"{name}={n:g}" for name, n in zip(REMEDIES[self.name], self.numbers, strict=True))
        return f"{self.name}({numbers})" if numbers else self.name

    def check(self, groups: tuple[Rule, ...]) -> None:
        """
        Raises:
            ConfigError: these rules take no gradient that could be stale.
        """
        without = next((rule.name for rule in groups if rule.name == "delta"), None)
        if not any("lr" in rule.named() for rule in groups):
            without = groups[0].name if groups else "none"
        if self and without:
            raise ConfigError(
                f"stale is {self}, and the rule {without} has neither a gradient nor a learning rate",
                cause="this optimizer runs in the worker, or shoal.Delta() was registered",
                hint="an optimizer that runs on the servers, or stale=None",
            )


def Compensate(lam: float = 0.04, adaptive: bool = False) -> Stale:  # noqa: N802 - as the rules are named
    """Delay compensation: the gradient `g + lam · g ⊙ g ⊙ (w_now - w_then)` instead of `g`.

    Zheng et al., *Asynchronous Stochastic Gradient Descent with Delay Compensation*, ICML 2017 (DC-ASGD), algorithm 2. A shard
    keeps for each worker a copy of the weights that this worker pulled last.

    Args:
        lam: λ, above 0, up to 1000. The paper took 0.04, and 2 with `adaptive`.
        adaptive: λ is divided, element by element, by the root of a running mean of g² (DC-ASGD-a; mean over about 20
            gradients). Costs one more copy of the model.

    Raises:
        ConfigError: `lam` is out of range.
    """
    try:
        return Stale("compensate", (float(lam), float(bool(adaptive))))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"compensate: {error}") from None


NONE = Stale()

Option: TypeAlias = "str | Stale | None"
"""How users say it: None, "scale", "compensate", or `Compensate(…)`."""


def read_option(option: Option) -> Stale:
    """What a user has said.

    Raises:
        ConfigError: it is not one of the options.
    """
    if option is None:
        return NONE
    if option == "compensate":
        return Compensate()
    if isinstance(option, Stale):
        return option
    if isinstance(option, str):
        return Stale(option)
    raise ConfigError(f"stale is a {type(option).__name__}", hint='None, "scale", "compensate" or shoal.Compensate(…)')
