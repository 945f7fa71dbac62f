"""What is hashed, derived and packed in a secure round, against the standards' own vectors (rung T0, SPEC §14)."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.secure.hashing import derive, digest, pack, unpack

PLAIN = st.recursive(
    st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=40) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


def test_a_digest_by_hand() -> None:
    """The prefix, the label, and every part behind its length."""
    by_hand = b"ps-secagg/1\0plan\0" + struct.pack(">Q", 2) + b"ab" + struct.pack(">Q", 0)

    assert hashlib.sha256(by_hand).digest() == digest("plan", b"ab", b"")


def test_no_two_inputs_run_into_each_other() -> None:
    """Moving a byte from one part to the next, or into the label, is another input."""
    inputs = [("a", b"bc"), ("a", b"b", b"c"), ("a", b"", b"bc"), ("a", b"bc", b""), ("ab", b"c"), ("a",)]

    assert len(inputs) == len({digest(*each) for each in inputs})


def test_hkdf_as_in_its_rfc() -> None:
    """RFC 5869 A.1: the first 32 bytes of its output."""
    found = derive(bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)))

    assert "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf" == found.hex()


@given(PLAIN)
def test_packed_and_back(value: object) -> None:
    """Every value has one form, and comes back as it was."""
    assert value == unpack(pack(value))


def test_a_list_is_packed_as_a_tuple_is() -> None:
    assert (
        pack([1, b"x", ["y", 0.5]])
        == pack((1, b"x", ("y", 0.5)))
        == bytes.fromhex("9301c4017892a179cb3fe0000000000000")
    )


@pytest.mark.parametrize("value", [None, True, {1: 2}, {1}, bytearray(b"x"), [1, None], 1j])
def test_what_has_no_canonical_form(value: object) -> None:
    """A map above all: it has as many encodings as orders."""
    with pytest.raises(TypeError, match="has no canonical form"):
        pack(value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800"])
def test_what_is_out_of_range(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        pack(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x01",
        b"\xc0",
        b"\xc3",
        b"\x81\x01\x02",
        b"\xcc\x01",
        b"\xd9\x01a",
        b"\xca\0\0\0\0",
        b"\xd4\1\0",
        b"\xa1\xff",
        b"\x91" * 3000 + b"\1",
        b"\xdd\xff\xff\xff\xff",
        b"\xc1",
    ],
)
def test_what_pack_would_not_write(data: bytes) -> None:
    """Nothing, two values, nil, a flag, a map, long forms, a short float, an extension, no UTF-8, too deep, too long, no type."""
    with pytest.raises(ProtocolError) as refused:
        unpack(data)
    assert "malformed" == refused.value.reason


@given(st.binary(max_size=60))
def test_any_bytes_are_canonical_or_refused(data: bytes) -> None:
    try:
        value = unpack(data)
    except ProtocolError:
        return
    assert data == pack(value)
