"""Message <-> frames (SPEC §2).

Rules
- `encode` writes one canonical header; buffers are handed on as they are, never copied.
- `decode` checks everything that can be checked without the layout, and raises `ProtocolError` and nothing else.
- `decode(encode(m)) == m`, and `encode(decode(f)) == f`: what no encoder of ours would write is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, get_args

import msgpack

from .asking import Answer, Echo, Echoed
from .cuts import Piece
from .errors import ProtocolError
from .evaluating import Evaluated
from .messages import Fill, Message, Model, Push, Refused, Register, Share, Values
from .records import Member, Phase, Place
from .rounds import ONE_BUFFER, TWO_BUFFERS
from .schema import Buffer, Check, Malformed, checks_of
from .tasking import COUNTED, Asked, Recalled, Told, Valued
from .tasking import ONE_BUFFER as OF_TASKS

VERSION = 1
MAX_HEADER = 3 * 1024 * 1024
MAX_BUFFER = 16 * 1024 * 1024 + 64 * 1024
MAX_BUFFERS = 1026

_ONE_BUFFER = (Register, Model, Share, Answer, Echo, Echoed, *ONE_BUFFER, *OF_TASKS)
_A_BUFFER_A_BLOCK = (Fill, Values, Push, Piece)


def _getter(kind: type[Any]) -> Any:
    names = [field.name for field in fields(kind) if field.name != "buffers"]
    if len(names) == 1:
        only = attrgetter(names[0])
        return lambda message: (only(message),)
    return attrgetter(*names)


_KINDS: dict[int, tuple[type[Any], tuple[Check, ...]]] = {
    kind.TYPE: (kind, checks_of(kind)) for kind in get_args(Message)
}
_FIELDS = {kind: _getter(kind) for kind in get_args(Message)}
_RECORDS = {kind: _getter(kind) for kind in (Place, Member, Phase, Evaluated, Asked, Told, Valued, Recalled)}
_FIXED = dict.fromkeys(_ONE_BUFFER, 1) | dict.fromkeys(TWO_BUFFERS, 2)
_HAS_BUFFERS = frozenset((*_FIXED, *_A_BUFFER_A_BLOCK, *COUNTED))


def _plain(value: Any) -> Any:
    """Records inside a header become arrays."""
    return _RECORDS[type(value)](value)


def encode(message: Message) -> list[Buffer]:
    """The frames of a message: header first. Buffers are not copied."""
    kind = type(message)
    header = msgpack.packb((VERSION, kind.TYPE, *_FIELDS[kind](message)), default=_plain)
    if kind in _HAS_BUFFERS:
        return [header, *message.buffers]  # type: ignore[union-attr]
    return [header]


def decode(frames: Sequence[Buffer]) -> Message:
    """The message that `frames` hold.

    Raises:
        ProtocolError: with the reason of SPEC §2.2.4.
    """
    if not frames:
        raise ProtocolError("garbage", "a message without frames")
    header = frames[0]
    if len(header) > MAX_HEADER:
        raise ProtocolError("garbage", "a header over the limit")
    try:
        fields_ = msgpack.unpackb(header, use_list=False, raw=False, strict_map_key=True)
    except (
        Exception
    ) as error:  # msgpack raises many types, ValueError to RecursionError: all of them are the peer's fault
        raise ProtocolError("garbage", f"the header is not msgpack: {type(error).__name__}") from None
    if type(fields_) is not tuple or len(fields_) < 2:
        raise ProtocolError("garbage", "the header is not a list of two or more")
    version, number = fields_[0], fields_[1]
    if type(version) is not int or type(number) is not int:
        raise ProtocolError("garbage", "version and type are not integers")
    if version != VERSION and number != Refused.TYPE:
        raise ProtocolError("version", f"the peer speaks version {version}, this side {VERSION}")
    if number not in _KINDS:
        raise ProtocolError("malformed", f"there is no message type {number}")
    kind, checks = _KINDS[number]
    if len(fields_) != len(checks) + 2:
        raise ProtocolError("malformed", f"{kind.__name__} has {len(checks)} fields, not {len(fields_) - 2}")
    try:
        values = [check(value) for check, value in zip(checks, fields_[2:], strict=True)]
    except Malformed as error:
        raise ProtocolError("malformed", f"{kind.__name__}: {error}") from None
    if msgpack.packb(fields_) != header:
        raise ProtocolError("malformed", f"{kind.__name__}: not in canonical form")
    if kind not in _HAS_BUFFERS:
        if len(frames) != 1:
            raise ProtocolError("frames", f"{kind.__name__} has no buffers, {len(frames) - 1} came")
        return kind(*values)  # type: ignore[no-any-return]
    buffers = tuple(frames[1:])
    message = kind(*values, buffers)
    wanted = _FIXED.get(kind) or buffer_count(message)
    if len(buffers) != wanted or wanted > MAX_BUFFERS:
        raise ProtocolError("frames", f"{kind.__name__} has {wanted} buffers, {len(buffers)} came")
    if buffers and max(map(len, buffers)) > MAX_BUFFER:
        raise ProtocolError("frames", f"{kind.__name__}: a buffer over the limit")
    return message  # type: ignore[no-any-return]


def buffer_count(message: Any) -> int:
    """How many buffers the header of this message implies.

    Raises:
        ProtocolError: `ranges` does not fit `blocks`, or what lies in a region is said to be encoded.
    """
    kind = type(message)
    if kind in _FIXED:
        return _FIXED[kind]
    if kind in COUNTED:
        return len(getattr(message, COUNTED[kind]))
    if kind in (Push, Values) and message.region and message.codec:
        raise ProtocolError("malformed", f"{kind.__name__}: a codec in a region")
    if kind is Push:
        if message.ranges and (len(message.ranges) != len(message.blocks) or not any(message.ranges)):
            raise ProtocolError("malformed", "Push: ranges and blocks do not fit")
        return bool(message.ranges) + (0 if message.region else len(message.blocks))
    if kind not in _A_BUFFER_A_BLOCK or (kind is Values and message.region):
        return 0
    return len(message.blocks)


def payload_bytes(message: Message) -> int:
    """Bytes in the buffers of a message."""
    buffers = getattr(message, "buffers", ())
    return sum(map(_length, buffers)) if buffers else 0


def _length(buffer: Buffer) -> int:
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
