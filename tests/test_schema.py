"""The kinds of value in a header: what each lets in, and that nothing is coerced (rung T0, SPEC §2.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import schema
from shoal.protocol.messages import Member
from shoal.protocol.schema import U32, Flag, Malformed, Text, checks_of, integer, listing, pairing, records, string

NAN, INF = math.nan, math.inf


def check_of(kind: Any) -> Callable[[Any], Any]:
    found: Callable[[Any], Any] = get_args(kind)[1]
    return found


LET_IN: list[tuple[str, Any]] = [
    ("U32", 0),
    ("U32", 2**32 - 1),
    ("U64", 2**64 - 1),
    ("I64", -(2**63)),
    ("I64", 2**63 - 1),
    ("Real", -0.0),
    ("Real", INF),
    ("Real", -INF),
    ("Flag", True),
    ("Flag", False),
    ("Text", ""),
    ("Text", "ß" * 256),
    ("LongText", "x" * 4096),
    ("Indices", ()),
    ("Indices", (0, 2**32 - 1)),
    ("Indices", (7,) * 65_536),
    ("Numbers", (("loss", NAN), ("lr", INF))),
    ("Numbers", (("n", 1.0),) * 1024),
    ("Marks", ((0, 2**64 - 1),) * 4096),
    ("Hyper", ((), (0.1,) * 16)),
    ("Hyper", ((),) * 4096),
    ("Requests", (2**64 - 1,) * 64),
    ("Refusals", ((1, "code", "text"),) * 8),
]

KEPT_OUT: list[tuple[str, Any]] = [
    ("U32", -1),
    ("U32", 2**32),
    ("U32", 1.0),
    ("U32", True),
    ("U32", "1"),
    ("U32", None),
    ("U64", -1),
    ("U64", 2**64),
    ("I64", 2**63),
    ("I64", -(2**63) - 1),
    ("Real", 1),
    ("Real", NAN),
    ("Real", True),
    ("Real", "1.0"),
    ("Flag", 0),
    ("Flag", 1),
    ("Flag", None),
    ("Text", "x" * 257),
    ("Text", b"x"),
    ("Text", None),
    ("LongText", "x" * 4097),
    ("Indices", [1]),
    ("Indices", (1, -1)),
    ("Indices", (2**32,)),
    ("Indices", (True,)),
    ("Indices", (7,) * 65_537),
    ("Indices", "abc"),
    ("Numbers", (("loss", 1),)),
    ("Numbers", (("loss",),)),
    ("Numbers", ((1.0, "loss"),)),
    ("Numbers", (["loss", 1.0],)),
    ("Numbers", (("n", 1.0),) * 1025),
    ("Marks", ((1, 2, 3),)),
    ("Marks", ((1, -2),)),
    ("Marks", ((2**64, 1),)),
    ("Marks", ((1, True),)),
    ("Marks", ((1.0, 1),)),
    ("Marks", ([1, 1],)),
    ("Marks", ((0, 0),) * 4097),
    ("Hyper", ((NAN,),)),
    ("Hyper", ((1,),)),
    ("Hyper", (0.1,)),
    ("Hyper", ((0.1,) * 17,)),
    ("Hyper", ((),) * 4097),
    ("Requests", (1,) * 65),
    ("Refusals", ((1, "code", "text"),) * 9),
    ("Refusals", ((1, "code", "x" * 257),)),
    ("Refusals", ((1, "code"),)),
]


@pytest.mark.parametrize("name", sorted({name for name, _ in LET_IN}))
def test_each_kind_has_its_bounds(name: str) -> None:
    """The extreme values of a kind are let in unchanged; one step beyond, or of another type, they are refused."""
    check = check_of(getattr(schema, name))
    for value in [value for of, value in LET_IN if of == name]:
        assert check(value) is value

    for value in [value for of, value in KEPT_OUT if of == name]:
        with pytest.raises(Malformed):
            check(value)


@settings(deadline=None, max_examples=100)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(-30, 30))
def test_an_integer_lies_within_its_bounds(one: int, other: int, value: int) -> None:
    """Exactly the integers from the least to the greatest are let in."""
    low, high = sorted((one, other))
    if low <= value <= high:
        assert value == integer(low, high)(value)
    else:
        with pytest.raises(Malformed):
            integer(low, high)(value)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from((0, 1, 2, 3, 3, 4, True, 1.0, "1", None)), max_size=6), st.integers(0, 5))
def test_a_list_is_as_good_as_its_worst_entry(entries: list[Any], most: int) -> None:
    """A list is let in when it is short enough and every entry is; a plain tuple when its length and every entry fit."""
    good = [type(entry) is int and entry <= 3 for entry in entries]
    for check, fits in (
        (listing(integer(0, 3), most), len(entries) <= most),
        (pairing(*[integer(0, 3)] * most), len(entries) == most),
    ):
        if fits and all(good):
            assert tuple(entries) == check(tuple(entries))
        else:
            with pytest.raises(Malformed):
                check(tuple(entries))


def test_a_text_is_counted_in_characters() -> None:
    """The length of a text is that of its characters, not of its bytes."""
    assert "åäö" == string(3)("åäö")

    with pytest.raises(Malformed):
        string(2)("åäö")


def test_records_become_what_they_are() -> None:
    """A list of arrays becomes a tuple of records; a field too few, too many or of another kind is refused."""
    check = records(Member, 2)

    assert (Member(1, "w", True), Member(2, "", False)) == check(((1, "w", True), (2, "", False)))
    assert () == check(())
    for wrong in (
        ((1, "w"),),
        ((1, "w", True, 5),),
        ((1, "w", 1),),
        ([1, "w", True],),
        [(1, "w", True)],
        (Member(1, "w", True),),
        ((1, "w", True),) * 3,
    ):
        with pytest.raises(Malformed):
            check(wrong)


@dataclass(frozen=True, slots=True)
class Sound:
    TYPE: ClassVar[int] = 0
    number: U32
    name: Text
    yes: Flag
    buffers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Unsound:
    number: U32
    plain: int


def test_a_message_has_a_check_for_every_field() -> None:
    """The checks come in the order of the fields, `buffers` and class variables left out; a field without a kind is an error."""
    number, name, yes = checks_of(Sound)

    assert (5, "w", True) == (number(5), name("w"), yes(True))
    for check, wrong in ((number, "w"), (name, 5), (yes, 5)):
        with pytest.raises(Malformed):
            check(wrong)
    with pytest.raises(TypeError, match=r"Unsound\.plain has no kind"):
        checks_of(Unsound)


def test_a_refusal_says_little_of_a_large_value() -> None:
    """The text of a refusal is short, whatever the value was."""
    nest: Any = ()
    for _ in range(5000):
        nest = (nest,)
    for value in ("x" * 100_000, 10**4000, nest, b"x" * 100_000, {"a": "x" * 100_000}):
        with pytest.raises(Malformed) as refused:
            integer(0, 1)(value)
        assert len(str(refused.value)) < 100
