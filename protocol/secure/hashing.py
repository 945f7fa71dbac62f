"""Hashes, derived keys and the canonical bytes that are hashed and signed (SPEC §14). The one definition of these formats.

Rules
- Every hash says what it is of: a label, and the length before each part, so that no two different inputs make the same bytes.
- What is hashed or signed is an array, never a map: one value, one encoding.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import ProtocolError

PREFIX = b"ps-secagg/1\0"
SIZE = 32
"""Bytes of a digest, and of a derived key."""
_PLAIN = frozenset({int, bytes, str, float})


def digest(label: str, *parts: bytes) -> bytes:
    """SHA-256 of the prefix, the label, a zero byte, and each part behind its length in 8 bytes, big-endian. 32 bytes."""
    hashed = hashlib.sha256(PREFIX + label.encode() + b"\0")
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return hashed.digest()


def derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """A key of 32 bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), SIZE, salt, info).derive(secret)


def pack(value: Any) -> bytes:
    """The canonical msgpack of a list or tuple of integers, bytes, texts, floats, and more of these.

    Raises:
        TypeError: it holds anything else. ValueError: an integer does not fit 64 bits, or a text is not UTF-8.
    """
    _packable(value)
    try:
        packed: bytes = msgpack.packb(value)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return packed


def unpack(data: bytes) -> Any:
    """What `pack` made the bytes of; arrays are tuples.

    Raises:
        ProtocolError: `malformed`: `pack` would not have written this.
    """
    try:
        value = msgpack.unpackb(data, use_list=False)
        if pack(value) == data:
            return value
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        pass
    raise ProtocolError("malformed", f"{len(data)} bytes that are no canonical array")


def _packable(value: Any) -> None:
    if type(value) in (list, tuple):
        for each in value:
            if type(each) not in _PLAIN:
                _packable(each)
    elif type(value) not in _PLAIN:
        raise TypeError(f"{type(value).__name__} has no canonical form")
