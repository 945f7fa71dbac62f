"""What everybody in a round agrees on before it begins (SPEC §14), and what a worker demands of it.

Rules
- A plan is the same for all: what a server might make different for one client is in it, and its digest is in every key.
- A plan that contradicts itself cannot be made. One that protects less than a worker's policy is refused by the worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

from ..errors import ConfigError, ProtectionError, ProtocolError
from ..join import CLEAR, SECAGG
from .hashing import SIZE, digest, pack, unpack
from .parameters import CORRUPT, most, violated
from .privacy import FINE, Skellam
from .scale import LANES, Scale

VERSION = 1
STREAM = 1
"""The number of the masks' stream: AES-256-CTR as in `masks`."""
MAX_BYTES = 1 << 18
"""Of a packed plan."""
MAX_CLIENTS = 16_384
MAX_SHARDS = 1024
MAX_SETTINGS = 1024
MAX_METRICS = 64
MAX_TEXT = 256
MAX_ELEMENTS = 1 << 40
MAX_DEADLINES = 8
MAX_CAP = 1 << 20

Setting: TypeAlias = int | float | str


@dataclass(frozen=True)
class Plan:
    """A round.

    Attributes:
        run, round: which. protection: SECAGG or CLEAR.
        cohort: clients that are invited. minimum: survivors without whom there is no sum.
        threshold, degree: as `parameters.Parameters`; 0 in the clear.
        active: may the servers lie? Then identities sign, and survivors confirm to each other who they are.
        bits, clip, cap: as `fixed.Scale`. reference: the weight that counts as 1. A cap of 1 makes weights uniform.
        elements: of an update. layout, model: digests of the model's layout, and of the weights that are given, 32 bytes each.
        shards: for each shard, from where to where the numbers of its elements go, ascending; there may be gaps.
        training: every setting of the local training, as (name, value). metrics: the names of those that are summed.
        deadlines: seconds for each stage. noise: what each client adds, if anything. stream: the number of the mask's.

    Raises:
        ConfigError: it contradicts itself; the text says where.
    """

    run: int
    round: int
    protection: str
    cohort: int
    minimum: int
    threshold: int
    degree: int
    active: bool
    bits: int
    clip: float
    cap: float
    reference: float
    elements: int
    layout: bytes
    model: bytes
    shards: tuple[tuple[int, int], ...]
    training: tuple[tuple[str, Setting], ...]
    metrics: tuple[str, ...]
    deadlines: tuple[float, ...]
    noise: Skellam | None = None
    stream: int = STREAM

    def __post_init__(self) -> None:
        for name, (holds, law) in _FIELDS.items():
            if not holds(getattr(self, name)):
                raise ConfigError(f"a plan whose {name} is not {law}")
        for holds_together, law in _LAWS:
            if not holds_together(self):
                raise ConfigError(f"a plan against the law: {law}")
        self.scale(self.cohort)

    @cached_property
    def packed(self) -> bytes:
        """Its canonical bytes."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain |= {"active": int(self.active), "noise": astuple(self.noise) if self.noise else ()}
        return pack([VERSION, *plain.values()])

    @cached_property
    def context(self) -> bytes:
        """By this everybody knows that all have the same plan: 32 bytes."""
        return digest("plan", self.packed)

    @property
    def uniform(self) -> bool:
        """Does everybody weigh the same?"""
        return self.cap == 1

    @property
    def lanes(self) -> int:
        """Of the auxiliary vector."""
        return LANES + len(self.metrics)

    def degree_of(self, count: int) -> int:
        """Neighbours of each, if so many take part: all others where they are fewer than planned."""
        return min(self.degree, count - 1) if self.degree < self.cohort - 1 else count - 1

    def scale(self, count: int) -> Scale:
        """How floats become integers, if so many take part."""
        return Scale(self.bits, self.clip, self.cap, count)

    @classmethod
    def unpack(cls, data: bytes) -> Plan:
        """The plan behind `packed`.

        Raises:
            ProtocolError: `malformed`: these are not the bytes of a plan, or it contradicts itself. `version`: of another version.
        """
        if len(data) > MAX_BYTES:
            raise ProtocolError("malformed", f"a plan of {len(data)} bytes")
        found = unpack(data)
        if type(found) is not tuple or not found:
            raise ProtocolError("malformed", "bytes that are no plan")
        if found[0] != VERSION or type(found[0]) is not int:
            raise ProtocolError("version", "a plan of another version")
        names = [field.name for field in fields(cls)]
        if len(found) != len(names) + 1:
            raise ProtocolError("malformed", f"a plan of {len(found)} fields")
        given = dict(zip(names, found[1:], strict=True))
        try:
            given |= {"active": _flag(given["active"]), "noise": _noise(given["noise"])}
            return cls(**given)
        except ConfigError as error:
            raise ProtocolError("malformed", error.what) from None


@dataclass(frozen=True, slots=True)
class Policy:
    """What a worker demands of every round, whatever the servers would like.

    Attributes:
        protection: SECAGG, or CLEAR for any.
        minimum: the fewest survivors. Two see each other's update in the sum.
        threshold: the least. corrupt: the share of clients that may work with the servers.
        clip: the largest. bits: the least of the modulus. active: may the servers lie?
        noise: at least so much, for at most so large a norm; None for any.
    """

    protection: str = SECAGG
    minimum: int = 3
    threshold: int = 2
    corrupt: float = CORRUPT
    clip: float = math.inf
    bits: int = 16
    active: bool = False
    noise: Skellam | None = None

    def check(self, plan: Plan, *, elements: int, layout: bytes, released: int = -1) -> None:
        """May this worker take part?

        Args:
            elements, layout: of its own model. released: the last round of this run for which it has given shares; -1: none.

        Raises:
            ProtectionError: the plan protects less than is demanded. The text names the first thing.
        """
        self._refuse(
            (plan.round > released, f"round {plan.round} comes after {released}, for which shares were given"),
            (plan.elements == elements and plan.layout == layout, "the model is the one that is trained here"),
            (plan.protection == SECAGG or self.protection == CLEAR, f"protection is {SECAGG}"),
            (plan.minimum >= self.minimum, f"survivors are at least {self.minimum}: {plan.minimum}"),
        )
        if plan.protection == CLEAR:
            return self._refuse((self.noise is None, "noise is added"))
        self._refuse(
            (plan.threshold >= self.threshold, f"the threshold is at least {self.threshold}: {plan.threshold}"),
            (plan.clip <= self.clip, f"the clip is at most {self.clip:g}: {plan.clip:g}"),
            (plan.bits >= self.bits, f"the modulus has at least {self.bits} bits: {plan.bits}"),
            (plan.active or not self.active, "identities sign and survivors are confirmed"),
            *self._noise(plan),
        )
        self.check_count(plan, plan.cohort)

    def check_count(self, plan: Plan, count: int) -> None:
        """Is a masked round of so many still private? To be asked again when it is known who takes part.

        Raises:
            ProtectionError: no. The text names the inequality that does not hold.
        """
        corrupt = most(self.corrupt, count)
        self._refuse(
            (
                count >= max(plan.minimum, plan.threshold),
                f"{count} take part, and {max(plan.minimum, plan.threshold)} are the fewest",
            ),
            (count <= plan.cohort, f"{count} take part, and {plan.cohort} were invited"),
            (plan.minimum >= corrupt + 2, f"minimum >= c + 2: {plan.minimum} >= {corrupt} + 2"),
        )
        broken = violated(count, plan.degree_of(count), plan.threshold, corrupt, count - plan.minimum, plan.active)
        self._refuse((not broken, broken))

    def _noise(self, plan: Plan) -> Sequence[tuple[bool, str]]:
        if plan.noise is None:
            return [(self.noise is None, "noise is added")]
        honest = plan.minimum - most(self.corrupt, plan.cohort)
        fine = FINE * math.sqrt(plan.elements)
        demanded = self.noise or replace(plan.noise)
        return [
            (plan.noise.honest <= honest, f"noise counts on at most {honest} survivors: {plan.noise.honest}"),
            (plan.noise.units >= fine, f"noise is in at least {fine:.0f} units: {plan.noise.units}"),
            (plan.noise.multiplier >= demanded.multiplier, f"the noise is at least {demanded.multiplier:g}"),
            (plan.noise.clip <= demanded.clip, f"the norm is clipped at {demanded.clip:g}"),
        ]

    def _refuse(self, *rules: tuple[bool, str]) -> None:
        for holds, law in rules:
            if not holds:
                raise ProtectionError(
                    f"this round does not protect as this worker demands: {law}",
                    cause="the server's settings are weaker, or it is another server",
                    hint="ask who runs it; or demand less",
                )


def _whole(least: int, largest: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and least <= value <= largest, f"a whole number from {least} to {largest}"


def _real(value: Any) -> bool:
    return type(value) is float and 0 < value < math.inf


def _tuple(each: Callable[[Any], bool], largest: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is tuple and len(value) <= largest and all(each(item) for item in value)


def _text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_TEXT and value.isprintable()


def _setting(pair: Any) -> bool:
    if type(pair) is not tuple or len(pair) != 2 or not _text(pair[0]):
        return False
    value = pair[1]
    if type(value) is str:
        return len(value) <= MAX_TEXT and value.isprintable()
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _range(pair: Any) -> bool:
    return (
        type(pair) is tuple
        and len(pair) == 2
        and all(type(end) is int for end in pair)
        and 0 <= pair[0] <= pair[1] <= 2 * MAX_ELEMENTS
    )


def _flag(value: Any) -> Any:
    return bool(value) if type(value) is int and value in (0, 1) else value


def _noise(value: Any) -> Any:
    if type(value) is tuple and [type(each) for each in value] == _AMOUNT:
        return Skellam(*value)
    return None if value == () else value


def _amount(value: Any) -> bool:
    return value is None or (type(value) is Skellam and [type(each) for each in astuple(value)] == _AMOUNT)


def _masked(plan: Plan) -> bool:
    """Do the numbers of a masked round fit each other?"""
    if plan.protection == CLEAR:
        return plan.threshold == plan.degree == 0 and not plan.active and plan.noise is None
    complete = plan.degree == plan.cohort - 1
    regular = 2 <= plan.degree < plan.cohort and plan.degree % 2 == 0 and not plan.active
    return (complete or regular) and 2 <= plan.threshold <= min(plan.minimum, plan.degree + 1)


def _noisy(plan: Plan) -> bool:
    if plan.noise is None:
        return True
    fits = plan.noise.honest <= plan.minimum and plan.noise.fits(plan.bits, plan.cohort)
    return fits and plan.uniform and not plan.metrics


def _shards(plan: Plan) -> bool:
    apart = all(before[1] <= after[0] for before, after in pairwise(plan.shards))
    return apart and sum(stop - start for start, stop in plan.shards) == plan.elements


_AMOUNT = [float, float, int, int]
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "run": _whole(0, (1 << 64) - 1),
    "round": _whole(0, (1 << 63) - 1),
    "protection": (lambda value: value in (SECAGG, CLEAR), f"{SECAGG} or {CLEAR}"),
    "cohort": _whole(1, MAX_CLIENTS),
    "minimum": _whole(1, MAX_CLIENTS),
    "threshold": _whole(0, MAX_CLIENTS),
    "degree": _whole(0, MAX_CLIENTS),
    "active": (lambda value: type(value) is bool, "a flag"),
    "bits": (lambda value: type(value) is int and value in (16, 32), "16 or 32"),
    "clip": (_real, "a float over 0 and finite"),
    "cap": (lambda value: _real(value) and 1 <= value <= MAX_CAP, f"a float from 1 to {MAX_CAP}"),
    "reference": (_real, "a float over 0 and finite"),
    "elements": _whole(1, MAX_ELEMENTS),
    "layout": (lambda value: type(value) is bytes and len(value) == SIZE, "32 bytes"),
    "model": (lambda value: type(value) is bytes and len(value) == SIZE, "32 bytes"),
    "shards": (_tuple(_range, MAX_SHARDS), "ranges"),
    "training": (_tuple(_setting, MAX_SETTINGS), "names and values"),
    "metrics": (_tuple(_text, MAX_METRICS), "names"),
    "deadlines": (_tuple(_real, MAX_DEADLINES), "seconds"),
    "noise": (_amount, "an amount of noise"),
    "stream": _whole(STREAM, STREAM),
}
_LAWS: tuple[tuple[Callable[[Plan], bool], str], ...] = (
    (lambda plan: plan.minimum <= plan.cohort, "minimum <= cohort"),
    (
        _masked,
        "2 <= threshold <= minimum, degree + 1; degree is cohort - 1, or even and not active; in the clear all are 0",
    ),
    (_shards, "the shards' ranges ascend, and have as many numbers as there are elements"),
    (_noisy, "with noise, honest <= minimum, weights are uniform, there are no metrics, and the sum fits the modulus"),
    (lambda plan: len(set(plan.metrics)) == len(plan.metrics), "no metric twice"),
    (lambda plan: len(dict(plan.training)) == len(plan.training), "no setting twice"),
)
