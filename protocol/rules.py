"""Update rules by name and numbers (SPEC §8). Nothing here runs one: that is `ps/rules`.

Rules
- A rule travels as `(name, numbers)` and is refused unless the table has it.
- Defaults are torch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ConfigError

FLAGS = frozenset({"nesterov", "maximize", "centered", "amsgrad", "decoupled_weight_decay"})

RULES: dict[str, tuple[str, ...]] = {
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    "adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize"),
    "rmsprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    "adam": ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    "adamw": ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"),
    "delta": (),
    "fedbuff": ("rate", "buffer"),
    "mean": (),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """An update rule: its name and its numbers in the order of `RULES[name]`.

    Raises:
        ConfigError: unknown name, wrong count, a number that is not finite, a flag that is neither 0 nor 1, or what torch's
            optimizer of that name would not begin with.
    """

    name: str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"there is no update rule {self.name!r}", hint=f"one of {', '.join(RULES)}")
        names = RULES[self.name]
        if len(self.numbers) != len(names):
            raise ConfigError(f"rule {self.name} takes {len(names)} numbers, not {len(self.numbers)}")
        for name, number in zip(names, self.numbers, strict=True):
            if not math.isfinite(number):
                raise ConfigError(f"{self.name}: {name} is {number}")
            if name in FLAGS and number not in (0.0, 1.0):
                raise ConfigError(f"{self.name}: {name} is a flag, not {number}")
            if (number < 0 and name != "dampening") or (number >= 1 and name in ("beta1", "beta2")):
                raise ConfigError(f"{self.name}: {name} is {number}")
        if self.name == "fedbuff" and (self.numbers[1] < 1 or self.numbers[1] != int(self.numbers[1])):
            raise ConfigError(f"FedBuff: a buffer of {self.numbers[1]:g} updates", hint="1, 2, 3, …")
        if self.name == "sgd" and self.numbers[4] and (self.numbers[1] <= 0 or self.numbers[2] != 0):
            raise ConfigError("SGD: nesterov needs a momentum above 0 and a dampening of 0")

    def named(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(RULES[self.name], self.numbers, strict=True))

    def accepts(self, numbers: tuple[float, ...]) -> bool:
        """May a push carry `numbers` for this rule? Flags must be as registered; in a step torch takes any finite number."""
        if len(numbers) != len(self.numbers) or not all(map(math.isfinite, numbers)):
            return False
        return all(
            new == old for name, new, old in zip(RULES[self.name], numbers, self.numbers, strict=True) if name in FLAGS
        )


def SGD(  # noqa: N802 - named as torch names it
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Rule:
    """Stochastic gradient descent on the shards, as `torch.optim.SGD`."""
    return _rule("sgd", lr, momentum, dampening, weight_decay, nesterov, maximize)


def Adagrad(  # noqa: N802
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    maximize: bool = False,
) -> Rule:
    """Adagrad on the shards, as `torch.optim.Adagrad` (Duchi et al. 2011)."""
    return _rule("adagrad", lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize)


def RMSprop(  # noqa: N802
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Rule:
    """RMSprop on the shards, as `torch.optim.RMSprop`."""
    return _rule("rmsprop", lr, alpha, eps, weight_decay, momentum, centered, maximize)


def Adam(  # noqa: N802
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Rule:
    """Adam on the shards, as `torch.optim.Adam` (Kingma and Ba 2015)."""
    return _rule("adam", lr, *betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay)


def AdamW(  # noqa: N802
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Rule:
    """AdamW on the shards, as `torch.optim.AdamW` (Loshchilov and Hutter 2019)."""
    return _rule("adamw", lr, *betas, eps, weight_decay, amsgrad, maximize)


def Delta() -> Rule:  # noqa: N802
    """What is pushed is added to the weights."""
    return Rule("delta")


def FedBuff(buffer: int = 10, lr: float = 1.0) -> Rule:  # noqa: N802
    """Buffered asynchronous federation (Nguyen et al. 2022): what is pushed is what a client's local steps have changed.

    Each is weighed by `1 / sqrt(1 + staleness)`, staleness in changes of the weights since the client pulled them; when `buffer` of
    them have come, `lr` times their sum divided by `buffer` is added to the weights. What is in the buffer at the end is not.
    """
    return _rule("fedbuff", lr, buffer)


def _rule(name: str, *numbers: float) -> Rule:
    try:
        return Rule(name, tuple(float(number) for number in numbers))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
