"""What is trained: tensors, their groups, each group's update rule, what stale gradients are met with (SPEC §4.1).

Rules
- A description is canonical bytes; its digest is its identity.
- It arrives from a worker, so reading it checks everything and raises `ProtocolError` only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack

from .errors import ConfigError, ProtocolError
from .rules import Rule
from .schema import Buffer
from .stale import NONE, Stale

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
MAX_DESCRIPTION = 16 * 1024 * 1024
MAX_TENSORS = 1_000_000
MAX_GROUPS = 4096
MAX_DIMENSIONS = 8
MAX_NAME = 1024
MAX_BYTES = 2**40
"""A model over 1 TiB is a mistake or an attack."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named parameter array as the user knows it; `group` indexes `ModelSpec.groups`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class ModelSpec:
    """The tensors in order, the update rule of each group, and what is done about stale gradients.

    Raises:
        ConfigError: a duplicate or empty name, an unknown dtype, a group without a rule, a remedy that does not fit the rules, or a
            limit of SPEC §2.3.
    """

    tensors: tuple[Tensor, ...]
    groups: tuple[Rule, ...]
    stale: Stale = NONE

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ConfigError("a model without tensors")
        if len(self.tensors) > MAX_TENSORS or len(self.groups) > MAX_GROUPS:
            raise ConfigError(f"over {MAX_TENSORS} tensors or {MAX_GROUPS} groups")
        names: set[str] = set()
        total = 0
        for tensor in self.tensors:
            if not tensor.name or len(tensor.name) > MAX_NAME:
                raise ConfigError(f"a tensor's name must have 1 to {MAX_NAME} characters, not {len(tensor.name)}")
            if tensor.name in names:
                raise ConfigError(f"two tensors are named {tensor.name!r}")
            names.add(tensor.name)
            if tensor.dtype not in ITEMSIZE:
                raise ConfigError(f"{tensor.name} has dtype {tensor.dtype}", hint=f"one of {', '.join(ITEMSIZE)}")
            if len(tensor.shape) > MAX_DIMENSIONS or any(size < 0 for size in tensor.shape):
                raise ConfigError(f"{tensor.name} has shape {tensor.shape}")
            if not 0 <= tensor.group < len(self.groups):
                raise ConfigError(f"{tensor.name} is in group {tensor.group} of {len(self.groups)}")
            total += tensor.elements * ITEMSIZE[tensor.dtype]
        if total > MAX_BYTES:
            raise ConfigError(f"the model has {total} bytes")
        self.stale.check(self.groups)

    @cached_property
    def description(self) -> bytes:
        """The canonical bytes."""
        tensors = [[t.name, t.dtype, t.shape, t.group] for t in self.tensors]
        groups = [[rule.name, rule.numbers] for rule in self.groups]
        packed = bytes(msgpack.packb([tensors, groups, [self.stale.name, self.stale.numbers]]))
        if len(packed) > MAX_DESCRIPTION:
            raise ConfigError(f"the model's description has {len(packed)} bytes, over {MAX_DESCRIPTION}")
        return packed

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.description).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(t.elements * ITEMSIZE[t.dtype] for t in self.tensors)

    def difference(self, other: ModelSpec) -> str:
        """The first difference, for a user's eyes; "" if there is none."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=False):
            if mine != theirs:
                what = f"{mine} against {theirs}"
                if mine.group != theirs.group:
                    what += f", groups {mine.group} and {theirs.group}"
                return f"the first tensor that differs is {what}"
        if len(self.tensors) != len(other.tensors):
            longer = max(self, other, key=lambda spec: len(spec.tensors))
            first = longer.tensors[min(len(self.tensors), len(other.tensors))]
            return f"{len(self.tensors)} tensors against {len(other.tensors)}; the first that differs is {first}"
        for index, (a, b) in enumerate(zip(self.groups, other.groups, strict=False)):
            if a != b:
                return f"group {index} has optimizer {a.name} {a.named()} against {b.name} {b.named()}"
        if len(self.groups) != len(other.groups):
            return f"{len(self.groups)} parameter groups against {len(other.groups)}"
        if self.stale != other.stale:
            return f"stale gradients are met with {self.stale} against {other.stale}"
        return ""


def read_model(description: Buffer) -> ModelSpec:
    """The model that canonical bytes describe.

    Raises:
        ProtocolError: they are not what `ModelSpec.description` writes.
    """
    if len(description) > MAX_DESCRIPTION:
        raise ProtocolError("malformed", "a model description over the limit")
    try:
        body = msgpack.unpackb(description, use_list=False, raw=False, strict_map_key=True)
        tensors, groups, stale = body
        spec = ModelSpec(tuple(map(_tensor, tensors)), tuple(map(_rule, groups)), Stale(*_named(stale)))
        if spec.description != bytes(description):
            raise ValueError("not canonical")
    except Exception as error:  # whatever the bytes do to msgpack or to us is the sender's fault
        raise ProtocolError("malformed", f"model description: {error}") from None
    return spec


def _tensor(entry: Any) -> Tensor:
    name, dtype, shape, group = entry
    if type(name) is not str or type(dtype) is not str or type(shape) is not tuple or type(group) is not int:
        raise TypeError("a tensor is [text, text, list, integer]")
    if any(type(size) is not int for size in shape):
        raise TypeError("a shape holds integers")
    return Tensor(name, dtype, shape, group)


def _rule(entry: Any) -> Rule:
    return Rule(*_named(entry))


def _named(entry: Any) -> tuple[str, tuple[float, ...]]:
    name, numbers = entry
    if type(name) is not str or type(numbers) is not tuple or any(type(n) is not float for n in numbers):
        raise TypeError("a rule or remedy is [text, list of reals]")
    return name, numbers
