"""Messages and frames: what is written can be read, and nothing else can (rung T0, SPEC §2)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol import evaluating, frames, rounds, schema, tasking
from shoal.protocol import messages as m
from shoal.protocol.errors import ProtocolError
from shoal.protocol.frames import MAX_BUFFER, MAX_BUFFERS, MAX_HEADER, buffer_count, decode, encode, payload_bytes

KINDS: tuple[type[Any], ...] = get_args(m.Message)
HAVE_BUFFERS = {kind for kind in KINDS if any(field.name == "buffers" for field in fields(kind))}
ONE_BUFFER = (m.Register, m.Model, m.Share, m.Answer, m.Echo, m.Echoed, *rounds.ONE_BUFFER, *tasking.ONE_BUFFER)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False)
payload = st.binary(max_size=24)


def rows(*columns: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[Any]:
    return st.lists(st.tuples(*columns), max_size=most).map(tuple)


def several(item: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[Any]:
    return st.lists(item, max_size=most).map(tuple)


OF_KIND: dict[Any, st.SearchStrategy[Any]] = {
    schema.U32: u32,
    schema.U63: st.integers(0, 2**63 - 1),
    schema.U64: u64,
    schema.I64: st.integers(-(2**63), 2**63 - 1),
    schema.PushCodec: st.integers(0, 4),
    schema.PullCodec: st.integers(0, 3),
    schema.Real: real,
    schema.Flag: st.booleans(),
    schema.Text: text,
    schema.LongText: text,
    schema.Indices: several(u32),
    schema.Numbers: rows(text, real),
    schema.Marks: rows(u64, u64),
    schema.Hyper: several(several(real)),
    schema.Requests: several(u64),
    schema.Refusals: rows(u64, text, text),
    m.Places: several(st.builds(m.Place, u32, u64, text, u32, text)),
    rounds.Incarnations: several(u64),
    rounds.State: st.integers(0, 2),
    rounds.Names: several(text),
    evaluating.Results: several(
        st.builds(
            evaluating.Evaluated, u32, text, text, st.integers(0, 2**63 - 1), u64, u32, u32, real, rows(text, real)
        )
    ),
    m.Members: several(st.builds(m.Member, u64, text, st.booleans())),
    tasking.Texts: several(text),
    tasking.LongTexts: several(text),
    tasking.TaskNumbers: several(u64),
    tasking.Items: several(u32),
    tasking.Failures: rows(text, text),
    tasking.Recalleds: several(st.builds(tasking.Recalled, u64, u64, u64, text, real, st.booleans())),
    tasking.Askeds: several(st.builds(tasking.Asked, u64, text, text, u32, real, real, text, real, real)),
    tasking.Tolds: several(st.builds(tasking.Told, u64, text, text, text, u32, text, text, real)),
    tasking.Valueds: several(st.builds(tasking.Valued, u64, u64, real)),
    m.Phases: several(st.builds(m.Phase, st.integers(0, 2**63 - 1), text, real), most=2),
}


@st.composite
def instances(draw: Callable[[Any], Any], kind: type[Any]) -> Any:
    """Any message of a type that our encoders may write."""
    hints = get_type_hints(kind, include_extras=True)
    values = {
        field.name: draw(OF_KIND[hints[field.name]])
        for field in fields(kind)
        if field.name not in ("buffers", "ranges")
    }
    if kind is m.Push:
        count = len(values["blocks"])
        ranges = draw(st.just(()) | st.lists(st.integers(0, 9), min_size=count, max_size=count).map(tuple))
        values["ranges"] = ranges if any(ranges) else ()
        values["codec"] = 0 if values["region"] else values["codec"]
        count = bool(values["ranges"]) + (0 if values["region"] else count)
    elif kind in HAVE_BUFFERS:
        if kind is m.Values and values["region"]:
            values["codec"] = 0
        fixed = 1 if kind in ONE_BUFFER else 2 if kind in rounds.TWO_BUFFERS else 0
        counted = tasking.COUNTED.get(kind, "blocks")
        count = fixed or (0 if values.get("region") else len(values[counted]))
    if kind in HAVE_BUFFERS:
        values["buffers"] = tuple(draw(payload) for _ in range(count))
    return kind(**values)


any_message = st.sampled_from(KINDS).flatmap(instances)


def check_readable_only_as_written(parts: list[bytes]) -> None:
    """These frames are a message that encodes to them, or a `ProtocolError` is raised; anything else fails the test."""
    try:
        found = decode(parts)
    except ProtocolError as error:
        reason = error.reason
    else:
        reason = ""
        if isinstance(found, m.Refused):  # of any version: only the version may differ
            assert msgpack.unpackb(bytes(encode(found)[0]))[1:] == msgpack.unpackb(parts[0])[1:]
        else:
            assert encode(found) == parts
    assert reason in {"", "garbage", "version", "malformed", "frames"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Any]) -> None:
    """What is encoded decodes to an equal message, and encodes to the same bytes again."""

    @settings(deadline=None, max_examples=25, derandomize=True)
    @given(instances(kind))
    def check(message: Any) -> None:
        written = encode(message)
        assert message == decode(written)
        assert written == encode(decode(written))

    check()


@settings(deadline=None, max_examples=150)
@given(st.lists(st.binary(max_size=64), max_size=4))
def test_any_bytes_are_read_or_refused(parts: list[bytes]) -> None:
    """Whatever bytes come in, decoding gives a message that encodes to them, or a `ProtocolError`."""
    check_readable_only_as_written(parts)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | text | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from((1, 1, 1, 0, 2, 2**40, True, "1")),
    st.sampled_from([kind.TYPE for kind in KINDS]) | st.integers(0, 70),
    st.lists(values, max_size=10),
    st.lists(payload, max_size=3),
)
def test_any_values_are_read_or_refused(version: Any, number: int, body: list[Any], buffers: list[bytes]) -> None:
    """A header with any values in it gives a message that encodes to it, or a `ProtocolError`."""
    check_readable_only_as_written([msgpack.packb([version, number, *body]), *buffers])


@settings(deadline=None, max_examples=300)
@given(any_message, st.data())
def test_a_damaged_message_is_read_or_refused(message: m.Message, data: st.DataObject) -> None:
    """A valid message with bytes changed, added or cut, or buffers added or lost, is another valid message or refused."""
    header, *buffers = map(bytes, encode(message))
    at = data.draw(st.integers(0, len(header) - 1))
    match data.draw(st.sampled_from(("change", "insert", "remove", "cut", "append", "more buffers", "fewer buffers"))):
        case "change":
            header = header[:at] + data.draw(st.binary(min_size=1, max_size=1)) + header[at + 1 :]
        case "insert":
            header = header[:at] + data.draw(st.binary(min_size=1, max_size=3)) + header[at:]
        case "remove":
            header = header[:at] + header[at + 1 :]
        case "cut":
            header = header[:at]
        case "append":
            header += data.draw(st.binary(min_size=1, max_size=3))
        case "more buffers":
            buffers.append(b"more")
        case _:
            buffers = buffers[:-1]

    check_readable_only_as_written([header, *buffers])


def packed(*body: Any) -> bytes:
    return bytes(msgpack.packb(body))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "garbage"),
        ([b""], "garbage"),
        ([b"\xc1"], "garbage"),
        ([b"\x92\x01"], "garbage"),
        ([packed(1, 13, 5, 6) + b"\x00"], "garbage"),
        ([msgpack.packb({"version": 1})], "garbage"),
        ([msgpack.packb("hello")], "garbage"),
        ([packed(1)], "garbage"),
        ([packed(1.0, 13, 5, 6)], "garbage"),
        ([packed(True, 13, 5, 6)], "garbage"),
        ([packed(1, "13", 5, 6)], "garbage"),
        ([packed(1, 60, 5, "x" * MAX_HEADER)], "garbage"),
        ([b"\x94\x01\x0d\x05\x91" * 100_000], "garbage"),
        ([b"\x94\x01\x0d\x05\xa2\xff\xfe"], "garbage"),
        ([packed(2, 13, 5, 6)], "version"),
        ([packed(0, 13)], "version"),
        ([packed(1, 44, 5, 6)], "malformed"),
        ([packed(1, 13, 5)], "malformed"),
        ([packed(1, 13, 5, 6, 7)], "malformed"),
        ([packed(1, 13, 5, -1)], "malformed"),
        ([packed(1, 13, 5, True)], "malformed"),
        ([packed(1, 13, 5, 6.0)], "malformed"),
        ([packed(1, 13, 5, None)], "malformed"),
        ([packed(1, 13, 5, {"a": 1})], "malformed"),
        ([packed(1, 13, 5, b"6")], "malformed"),
        ([packed(1, 13, 5, msgpack.ExtType(1, b"6"))], "malformed"),
        ([packed(1, 13, 5, msgpack.Timestamp(6))], "malformed"),
        ([packed(1, 60, 5, "x" * 257)], "malformed"),
        ([packed(1, 13, 5, 6), b""], "frames"),
        ([packed(1, 62, 5)], "frames"),
        ([packed(1, 62, 5), b"", b""], "frames"),
        ([packed(1, 45, 1, 2, 3, 4, [0, 1]), b""], "frames"),
    ],
)
def test_what_is_wrong_has_its_reason(parts: list[bytes], reason: str) -> None:
    """Each kind of bad message is refused under its own reason, so that it is counted where it belongs."""
    with pytest.raises(ProtocolError) as refused:
        decode(parts)

    assert reason == refused.value.reason


@pytest.mark.parametrize("depth", [10, 500, 990, 1000, 1020, 1024, 5000])
@pytest.mark.parametrize("place", [13, 26, 34, 47])
def test_a_deeply_nested_header_is_refused(depth: int, place: int) -> None:
    """Lists within lists, to any depth, are refused as anything else is: no interpreter limit gets out."""
    nest = b"\x91" * depth + b"\xc0"
    count = len(fields(next(kind for kind in KINDS if place == kind.TYPE))) - (place == 47)
    for at in range(count):
        header = bytes([0x90 + count + 2, 1, place]) + b"\x00" * at + nest + b"\x00" * (count - at - 1)
        with pytest.raises(ProtocolError):
            decode([header])


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"\x94\x01\x0d\x05\xcc\x06", "an integer in two bytes"),
        (b"\x94\x01\x0d\x05\xcf" + bytes(7) + b"\x06", "an integer in nine bytes"),
        (b"\x94\xd0\x01\x0d\x05\x06", "a version in two bytes"),
        (b"\xdc\x00\x04\x01\x0d\x05\x06", "a list with a long head"),
        (b"\x94\x01\x3c\x05\xd9\x01a", "a text with a long head"),
        (b"\x95\x01\x0d\x05\x06", "a list that promises more"),
    ],
)
def test_only_the_shortest_form_is_read(header: bytes, what: str) -> None:
    """A header that says the right thing in a form that no encoder of ours writes is refused."""
    assert m.Renewed(5, 6) == decode([b"\x94\x01\x0d\x05\x06"])

    with pytest.raises(ProtocolError):
        decode([header])


def test_a_real_in_four_bytes_is_refused() -> None:
    """Reals are float64 and nothing shorter."""
    good = packed(1, 31, 1, 2, 3, 1.5)
    assert m.ShardWelcome(1, 2, 3, 1.5) == decode([good])

    with pytest.raises(ProtocolError) as refused:
        decode([bytes(msgpack.packb((1, 31, 1, 2, 3, 1.5), use_single_float=True))])
    assert "malformed" == refused.value.reason


@pytest.mark.parametrize("version", [0, 2, 99, 2**63])
def test_a_refusal_of_any_version_is_read(version: int) -> None:
    """`Refused` has one shape in all versions, so that two versions can tell each other what is wrong."""
    assert m.Refused(0, "version", "no") == decode([packed(version, 1, 0, "version", "no")])


def test_a_number_that_is_for_people_may_be_nan() -> None:
    """A logged NaN travels; a NaN anywhere else is refused."""
    logged = m.Leave(1, 2, (("loss", math.nan),), (("loss", math.inf),), ())
    found = decode(encode(logged))

    assert isinstance(found, m.Leave)
    assert math.isnan(found.stats[0][1])
    for message in (
        m.ShardWelcome(1, 2, 3, math.nan),
        m.Push(1, 2, 3, 4, True, math.nan, (), 0, 0, (), (), False, 0, ()),
        m.Push(1, 2, 3, 4, True, 1.0, ((math.nan,),), 0, 0, (), (), False, 0, ()),
    ):
        with pytest.raises(ProtocolError):
            decode(encode(message))


@pytest.mark.parametrize("ranges", [(1,), (1, 1, 1), (0, 0)])
def test_ranges_that_do_not_fit_the_blocks_are_refused(ranges: tuple[int, ...]) -> None:
    """`ranges` is empty, or has an entry a block of which at least one is not 0."""
    buffers = tuple(bytes(8) for _ in range(3))

    with pytest.raises(ProtocolError) as refused:
        decode(encode(m.Push(1, 2, 3, 4, True, 1.0, (), 0, 0, (7, 8), ranges, False, 0, buffers)))
    assert "malformed" == refused.value.reason


@pytest.mark.parametrize(
    "message",
    [
        m.Push(1, 2, 3, 4, True, 1.0, (), 5, 1, (7,), (), False, 0, ()),
        m.Values(1, 2, 3, 0, 1, 4, 5, 6, 1, (7,), ()),
        m.Push(1, 2, 3, 4, True, 1.0, (), 0, 5, (), (), False, 0, ()),
        m.Values(1, 2, 3, 0, 1, 4, 5, 0, 4, (), ()),
        m.Pull(1, 2, 3, 4, 5, 6, 0, 4, ()),
    ],
)
def test_a_codec_that_cannot_be_is_refused(message: m.Message) -> None:
    """In a region, where everything is raw; one that there is not; one that leaves out numbers, for a reader (SPEC §12)."""
    with pytest.raises(ProtocolError) as refused:
        decode(encode(message))
    assert "malformed" == refused.value.reason


def test_buffers_have_limits() -> None:
    """The largest buffer and the largest number of buffers are let in, one more is refused."""

    def reason(message: m.Message) -> str:
        with pytest.raises(ProtocolError) as refused:
            decode(encode(message))
        return refused.value.reason

    largest = bytes(MAX_BUFFER)
    blocks = tuple(range(MAX_BUFFERS))

    assert MAX_BUFFER == payload_bytes(decode(encode(m.Echo(1, (largest,)))))
    assert "frames" == reason(m.Echo(1, (largest + b"1",)))
    assert MAX_BUFFERS == buffer_count(decode(encode(m.Fill(1, 2, 3, 4, blocks, (b"",) * MAX_BUFFERS))))
    assert "frames" == reason(m.Fill(1, 2, 3, 4, (*blocks, 1), (b"",) * (MAX_BUFFERS + 1)))


def test_buffers_are_not_copied() -> None:
    """Encoding and decoding hand the very buffers on, of whatever kind they are."""
    buffers = (b"bytes", bytearray(b"array"), memoryview(b"view"))
    written = encode(m.Fill(1, 2, 3, 4, (0, 1, 2), buffers))
    found = decode([memoryview(bytes(written[0])), *written[1:]])

    assert isinstance(found, m.Fill)
    assert all(mine is theirs for mine, theirs in zip(buffers, written[1:], strict=True))
    assert all(mine is theirs for mine, theirs in zip(buffers, found.buffers, strict=True))


def test_payload_is_counted_in_bytes() -> None:
    """A view of wider items counts its bytes, and a message without buffers has none."""
    assert 3 + 8 == payload_bytes(m.Fill(1, 2, 3, 4, (0, 1), (b"abc", memoryview(bytes(8)).cast("I"))))
    assert 0 == payload_bytes(m.Renewed(1, 2))


def split(listed: str) -> list[str]:
    """The fields of a row of SPEC §7: commas within brackets do not part them."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", listed) if part.strip()]


def spec_rows() -> dict[str, tuple[int, list[str], bool]]:
    found = {}
    for line in (Path(frames.__file__).parent / "SPEC.md").read_text().splitlines():
        row = re.match(r"\| (\d+) \| (\w+) \| [^|]+ \| ([^|]+) \|", line)
        if row:
            header, buffers, _ = row[3].partition("·")
            found[row[2]] = (int(row[1]), split(header), bool(buffers))
    return found


def test_the_specification_lists_these_messages() -> None:
    """SPEC §7 and the code agree on every message's number, its fields in order, their kinds, and whether it has buffers."""
    kinds = {"inc": schema.U64, "u32": schema.U32, "u63": schema.U63, "u64": schema.U64, "i64": schema.I64}
    kinds |= {"f": schema.Real, "flag": schema.Flag, "[u32]": schema.Indices}
    kinds |= {"[[text,": schema.Numbers, "incs": rounds.Incarnations, "s2": rounds.State, "[text]": rounds.Names}
    kinds |= {"[name]": tasking.Texts, "[u64]": tasking.TaskNumbers, "[asked]": tasking.Askeds, "[told]": tasking.Tolds}
    kinds |= {"[valued]": tasking.Valueds, "[recalled]": tasking.Recalleds}
    requests = {"Alive"}  # their lists of requests are shorter
    kinds |= {"c3": schema.PullCodec, "c4": schema.PushCodec}
    rows_ = spec_rows()

    assert {kind.__name__ for kind in KINDS} == set(rows_)
    for kind in KINDS:
        number, listed, has_buffers = rows_[kind.__name__]
        hints = get_type_hints(kind, include_extras=True)
        names = [field.name for field in fields(kind) if field.name != "buffers"]
        assert (number, has_buffers) == (kind.TYPE, kind in HAVE_BUFFERS), kind
        assert [words.split()[0] for words in listed] == names, kind
        for name, words in zip(names, listed, strict=True):
            kind_word = words.split()[1] if " " in words else ""
            if kind_word in kinds and kind.__name__ not in requests and name != "failed":
                assert kinds[kind_word] == hints[name], (kind, name)


def test_limits_are_those_of_the_specification() -> None:
    """SPEC §2.3 and the code agree on the limits of frames."""
    text_ = (Path(frames.__file__).parent / "SPEC.md").read_text()

    assert f"| header frame | {MAX_HEADER // 1024:,} KiB |" in text_
    assert f"| buffer frames in a message | {MAX_BUFFERS:,} |" in text_
    assert 16 * 1024 * 1024 + 64 * 1024 == MAX_BUFFER
    assert "| buffer frame | 16 MiB + 64 KiB" in text_
