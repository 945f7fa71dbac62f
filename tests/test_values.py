"""Values of tasks: what goes in comes out, and bytes that nobody wrote do no harm (SPEC §16.3)."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shoal.protocol.errors import ProtocolError, ShapeError
from shoal.tasks.values import DTYPES, alike, cut, join, pack, rows, unpack


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray | torch.Tensor):
        equal = np.array_equal(
            np.asarray(one.float() if isinstance(one, torch.Tensor) else one),
            np.asarray(other.float() if isinstance(other, torch.Tensor) else other),
            equal_nan=one.dtype in (np.float16, np.float32, np.float64),
        )
        return type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape and bool(equal)
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one == other or (isinstance(one, float) and math.isnan(one)))


arrays = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in DTYPES if name != "bfloat16"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | arrays
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200)
@given(values)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert same(value, unpack(pack(value)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_stay_tensors(dtype: str) -> None:
    tensor = (torch.arange(6).reshape(2, 3) % 2).to(getattr(torch, dtype))
    for found in (unpack(pack(tensor)), unpack(pack({"x": [tensor.t()]}))["x"][0].t()):
        assert isinstance(found, torch.Tensor) and found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_stay_tensors_where_torch_is_not_loaded(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut, joined and sent on."""
    tensor = torch.arange(6).reshape(3, 2).to(getattr(torch, dtype))
    packed = pack(tensor)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        value = unpack(packed)
        assert 3 == rows(value)
        packed = pack(join([cut(value, 2, 3), cut(value, 0, 2)]))
    found = unpack(packed)
    assert found.dtype == tensor.dtype and torch.equal(found, tensor[[2, 0, 1]])


def test_arrays_are_views_of_the_buffer() -> None:
    buffer = bytearray(pack(np.arange(4, dtype=np.float32)))
    found = unpack(buffer)
    buffer[-4:] = np.float32(9).tobytes()
    assert [0.0, 1.0, 2.0, 9.0] == found.tolist()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1: 2},
        {3},
        np.array(["a"]),
        np.array([1j]),
        np.zeros(2, [("a", int)]),
        2**64,
        "\ud800",
        torch.zeros(2).to_sparse(),
    ],
)
def test_what_cannot_be_sent_says_so(value: Any) -> None:
    with pytest.raises(ShapeError):
        pack(value)


def test_depth_is_bounded() -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    with pytest.raises(ShapeError, match="deeper"):
        pack(value)
    with pytest.raises(ProtocolError):
        unpack(b"\x01" + b"\x91" * 40 + b"\x01")


@settings(max_examples=400)
@given(values, st.data())
def test_bytes_that_nobody_wrote(value: Any, data: st.DataObject) -> None:
    """Cut short, lengthened, with a byte changed: a value, or a ProtocolError, and nothing else."""
    packed = bytearray(pack(value))
    match data.draw(st.sampled_from(("cut", "more", "change", "noise"))):
        case "cut":
            del packed[data.draw(st.integers(0, len(packed) - 1)) :]
        case "more":
            packed += data.draw(st.binary(min_size=1, max_size=9))
        case "change":
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
        case "noise":
            packed = bytearray(data.draw(st.binary(max_size=40)))
    with contextlib.suppress(ProtocolError):
        unpack(packed)


def test_a_shape_that_claims_more_than_is_there_allocates_nothing() -> None:
    head = bytes((0, 2, 10, 0, 0, 0, 0, 0)) + (2**39).to_bytes(8, "little") + (2**39).to_bytes(8, "little")
    with pytest.raises(ProtocolError):
        unpack(head)


def test_rows_are_cut_and_joined() -> None:
    one = {"x": np.arange(6.0).reshape(3, 2), "n": [torch.arange(3)]}
    assert (
        3 == rows(one) and rows({"x": np.zeros(3), "y": np.zeros(2)}) is None and rows(5) is rows(np.float64(1)) is None
    )
    parts = [cut(one, 0, 1), cut(one, 1, 3)]
    assert alike(*parts) and same(one, join(parts)) and [1, 2] == [rows(part) for part in parts]
    assert (
        not alike(np.zeros((1, 2)), np.zeros((1, 3)))
        and not alike(np.zeros(1), np.zeros(1, np.float32))
        and not alike(1, 1)
    )
    with pytest.raises(ShapeError):
        join([np.zeros((1, 2)), np.zeros((1, 3))])
