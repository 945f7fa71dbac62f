"""What is known of a version of a model: its card, as JSON that never changes.

Rules
- A card is its canonical JSON; the SHA-256 of that is the version's identity. Whoever changes a byte has another version.
- It is read strictly: what is not a card raises `ConfigError`, with the field that is wrong.
- The first metric of a kind is its quality, higher is better; how it is measured is the publisher's to know.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias

from ..protocol.errors import ConfigError

Metrics: TypeAlias = Mapping[str, float]
MAX_CARD = 1 << 16
"""Bytes of a card."""
HEX = 64
"""Characters of a SHA-256."""


@dataclass(frozen=True)
class Cost:
    """What one task costs, as measured where the model was published; 0 where nobody has.

    Attributes:
        latency: seconds for one input. memory: bytes while it is loaded. parameters: how many.
    """

    latency: float = 0.0
    memory: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from.

    Attributes:
        run: of the cluster, 0 outside one. mode: in which it was trained. clock: steps, or rounds, that had been made.
        parent: the identity of the version that it began with, or empty. data: what it was trained on, in words.
    """

    run: int = 0
    mode: str = ""
    clock: int = 0
    parent: str = ""
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """A version.

    Attributes:
        name: of the model. version: from 1, by name. weights: SHA-256 of the safetensors file, in hex. size: its bytes.
        quality: by kind of task, metrics in the order they were given in.
        data: labels of the data that this model may see; a task whose data has another label is not for it.
        published: seconds since 1970.
    """

    name: str
    version: int
    weights: str
    size: int
    quality: Mapping[str, Metrics] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    data: tuple[str, ...] = ()
    lineage: Lineage = field(default_factory=Lineage)
    published: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, law in _LAWS:
            if not holds(self):
                raise ConfigError(f"a card whose {name} is not {law}")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @cached_property
    def packed(self) -> bytes:
        """Its canonical JSON, UTF-8. Metrics keep their order; everything else is in the order of the fields."""
        found = asdict(self)
        found["quality"] = [[kind, [[*pair] for pair in metrics.items()]] for kind, metrics in self.quality.items()]
        return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    @cached_property
    def identity(self) -> str:
        """SHA-256 of `packed`, in hex."""
        return hashlib.sha256(self.packed).hexdigest()

    def quality_of(self, kind: str) -> float | None:
        """The first metric of a kind of task; None if it was never measured."""
        return next(iter(self.quality.get(kind, {}).values()), None)

    @classmethod
    def unpack(cls, data: bytes) -> Card:
        """The card behind `packed`.

        Raises:
            ConfigError: these are not the bytes of a card.
        """
        try:
            found = json.loads(data) if len(data) <= MAX_CARD else None
            if type(found) is not dict or set(found) != {each.name for each in fields(cls)}:
                raise ConfigError(f"{len(data)} bytes that are no card")
            found["quality"] = {kind: dict(metrics) for kind, metrics in found["quality"]}
            found["cost"], found["lineage"] = Cost(**found["cost"]), _lineage(found["lineage"])
            card = cls(**{**found, "data": tuple(found["data"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f"{len(data)} bytes that are no card: {error}") from None
        if card.packed != data:
            raise ConfigError("a card that is not in canonical form")
        return card


def _lineage(found: dict[str, Any]) -> Lineage:
    return Lineage(**{**found, "data": tuple(found["data"])})


def _is_hex(text: Any) -> bool:
    return type(text) is str and len(text) == HEX and all(each in "0123456789abcdef" for each in text)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 63


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_quality(found: Any) -> bool:
    return isinstance(found, Mapping) and all(
        is_label(kind) and isinstance(metrics, Mapping) and bool(metrics) and all(map(_is_metric, metrics.items()))
        for kind, metrics in found.items()
    )


def _is_metric(pair: tuple[Any, Any]) -> bool:
    return is_label(pair[0]) and type(pair[1]) in (int, float) and math.isfinite(pair[1])


def is_label(text: Any) -> bool:
    """Can this be the name of a model, a kind, a metric, or a label of data?"""
    return type(text) is str and 0 < len(text) <= 200 and text.isprintable()


def _is_lineage(found: Lineage) -> bool:
    return (
        type(found.run) is int
        and 0 <= found.run < 1 << 64
        and type(found.mode) is str
        and _is_count(found.clock)
        and (found.parent == "" or _is_hex(found.parent))
        and all(map(is_label, found.data))
    )


_LAWS: tuple[tuple[str, Callable[[Card], bool], str], ...] = (
    ("name", lambda c: is_label(c.name), "a name: up to 200 printable characters"),
    ("version", lambda c: _is_count(c.version, 1), "a number from 1"),
    ("weights", lambda c: _is_hex(c.weights), "a SHA-256 in hex"),
    ("size", lambda c: _is_count(c.size), "a number of bytes"),
    ("quality", lambda c: _is_quality(c.quality), "numbers by metric by kind of task"),
    (
        "cost",
        lambda c: _is_time(c.cost.latency) and _is_count(c.cost.memory) and _is_count(c.cost.parameters),
        "a cost",
    ),
    ("data", lambda c: type(c.data) is tuple and all(map(is_label, c.data)), "labels"),
    ("lineage", lambda c: _is_lineage(c.lineage), "a lineage"),
    ("published", lambda c: _is_time(c.published), "a time"),
)
