"""The kinds of value that may stand in a header, and how each is checked (SPEC §2.2, §7).

Rules
- A kind is a type for the checker and a function for the decoder, joined by `Annotated`.
- A check returns the value or raises `Malformed`; it never coerces.
- Lists are bounded; msgpack hands them over as tuples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeAlias, get_args, get_origin, get_type_hints

from .codecs import INT8, RAW, TOPK

Check = Callable[[Any], Any]
Buffer: TypeAlias = bytes | bytearray | memoryview
Buffers: TypeAlias = tuple[Buffer, ...]


class Malformed(Exception):
    """A value breaks its kind. Only `frames` sees this; it becomes a `ProtocolError`."""


def _shown(value: Any) -> str:
    """A value for an error's text; a container only by its type, for its repr is as deep as the sender likes."""
    return f"{value!r:.40}" if isinstance(value, int | float | str | bytes) else f"a {type(value).__name__}"


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise Malformed(f"{_shown(value)} is not an integer in [{low}, {high}]")

    return check


def _real(value: Any) -> float:
    if type(value) is float and not math.isnan(value):
        return value
    raise Malformed(f"{_shown(value)} is not a real")


def _any_real(value: Any) -> float:
    if type(value) is float:
        return value
    raise Malformed(f"{_shown(value)} is not a real")


def _flag(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise Malformed(f"{_shown(value)} is not a flag")


def string(most: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is str and len(value) <= most:
            return value
        raise Malformed(f"not a text of at most {most} characters")

    return check


def listing(item: Check, most: int) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > most:
            raise Malformed(f"not a list of at most {most}")
        for entry in value:
            item(entry)
        return value

    return check


def pairing(*items: Check) -> Check:
    """A plain tuple of fixed length."""

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) != len(items):
            raise Malformed(f"not a list of {len(items)}")
        for one, entry in zip(items, value, strict=True):
            one(entry)
        return value

    return check


def marks(most: int) -> Check:
    """A list of pairs of 64-bit numbers. A shard reports one for each worker each second, so this is one loop and no calls."""
    top = 2**64 - 1

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > most:
            raise Malformed(f"not a list of at most {most}")
        for pair in value:
            if type(pair) is not tuple or len(pair) != 2:
                raise Malformed("not a list of 2")
            first, second = pair
            if not (type(first) is int and type(second) is int and 0 <= first <= top and 0 <= second <= top):
                raise Malformed(f"{_shown(first)} or {_shown(second)} is not an integer in [0, {top}]")
        return value

    return check


U32 = Annotated[int, integer(0, 2**32 - 1)]
U63 = Annotated[int, integer(0, 2**63 - 1)]
U64 = Annotated[int, integer(0, 2**64 - 1)]
I64 = Annotated[int, integer(-(2**63), 2**63 - 1)]
PushCodec = Annotated[int, integer(RAW, TOPK)]
PullCodec = Annotated[int, integer(RAW, INT8)]
Real = Annotated[float, _real]
Flag = Annotated[bool, _flag]
Text = Annotated[str, string(256)]
LongText = Annotated[str, string(4096)]

_text, _u64 = string(256), integer(0, 2**64 - 1)
Indices = Annotated[tuple[int, ...], listing(integer(0, 2**32 - 1), 65_536)]
Numbers = Annotated[tuple[tuple[str, float], ...], listing(pairing(_text, _any_real), 1024)]
"""Named numbers for people to read: these may be NaN."""

Marks = Annotated[tuple[tuple[int, int], ...], marks(4096)]
Hyper = Annotated[tuple[tuple[float, ...], ...], listing(listing(_real, 16), 4096)]
Requests = Annotated[tuple[int, ...], listing(_u64, 64)]
Refusals = Annotated[tuple[tuple[int, str, str], ...], listing(pairing(_u64, _text, _text), 8)]


def records(kind: type[Any], most: int) -> Check:
    """A list of records; each becomes a `kind`."""
    checks = checks_of(kind)

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > most:
            raise Malformed(f"not a list of at most {most}")
        made = []
        for entry in value:
            if type(entry) is not tuple or len(entry) != len(checks):
                raise Malformed(f"not a {kind.__name__}")
            made.append(kind(*[one(part) for one, part in zip(checks, entry, strict=True)]))
        return tuple(made)

    return check


def checks_of(kind: type[Any]) -> tuple[Check, ...]:
    """The checks of a dataclass's header fields, in order; `buffers` is no header field."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        if field.name == "buffers":
            continue
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            raise TypeError(f"{kind.__name__}.{field.name} has no kind")
        found.append(get_args(hint)[1])
    return tuple(found)
