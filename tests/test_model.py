"""Model descriptions: canonical, checked whole, and told apart in words (rung T0, SPEC §4.1)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError, ProtocolError
from shoal.protocol.model import (
    ITEMSIZE,
    MAX_DESCRIPTION,
    MAX_GROUPS,
    MAX_TENSORS,
    ModelSpec,
    Tensor,
    read_model,
)
from shoal.protocol.rules import SGD, Adagrad, Adam, AdamW, Delta, RMSprop, Rule

RULES = (SGD(), SGD(lr=0.5, momentum=0.9, nesterov=True), Adam(), AdamW(), Adagrad(), RMSprop(), Delta(), Rule("mean"))


@st.composite
def specs(draw: Any) -> ModelSpec:
    groups = draw(st.lists(st.sampled_from(RULES), min_size=1, max_size=3))
    shapes = st.lists(st.integers(0, 2**10), max_size=3).map(tuple)
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), unique=True))
    tensors = [
        Tensor(name, draw(st.sampled_from(tuple(ITEMSIZE))), draw(shapes), draw(st.integers(0, len(groups) - 1)))
        for name in names or ["w"]
    ]
    return ModelSpec(tuple(tensors), tuple(groups))


@settings(deadline=None, max_examples=60)
@given(specs())
def test_a_description_says_it_all(spec: ModelSpec) -> None:
    """What a description is read to equals the model that wrote it, has its digest, and writes the same bytes."""
    found = read_model(memoryview(spec.description))

    assert spec == found
    assert spec.description == found.description
    assert hashlib.sha256(spec.description).hexdigest() == found.digest
    assert sum(tensor.elements * ITEMSIZE[tensor.dtype] for tensor in spec.tensors) == found.total_bytes


@settings(deadline=None, max_examples=60)
@given(specs(), specs(), st.booleans())
def test_equal_models_and_no_others_have_one_digest(one: ModelSpec, other: ModelSpec, same: bool) -> None:
    """Two models have the same digest, and no difference in words, exactly when they are equal; whoever asks."""
    other = read_model(one.description) if same else other

    assert (one == other) == (one.digest == other.digest)
    assert (one == other) == (one.difference(other) == "") == (other.difference(one) == "")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_model_or_refused(description: bytes) -> None:
    """Whatever bytes come as a description, they are one that we would write, or a `ProtocolError`."""
    check_canonical(description)


@settings(deadline=None, max_examples=150)
@given(specs(), st.data())
def test_a_damaged_description_is_a_model_or_refused(spec: ModelSpec, data: st.DataObject) -> None:
    """A description with bytes changed, added or removed is one that we would write, or refused."""
    good = spec.description
    at, length = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 2))
    check_canonical(good[:at] + data.draw(st.binary(max_size=2)) + good[at + length :])


def check_canonical(description: bytes) -> None:
    try:
        found = read_model(description)
    except ProtocolError as error:
        found, reason = None, error.reason
    assert reason == "malformed" if found is None else found.description == description


GOOD = Tensor("w", "float32", (2, 3))


@pytest.mark.parametrize(
    ("tensors", "groups", "told"),
    [
        ((), (SGD(),), "without tensors"),
        ((GOOD,), (), "group 0 of 0"),
        ((GOOD, GOOD), (SGD(),), "two tensors are named 'w'"),
        ((replace(GOOD, name=""),), (SGD(),), "1 to 1024 characters, not 0"),
        ((replace(GOOD, name="x" * 1025),), (SGD(),), "not 1025"),
        ((replace(GOOD, dtype="int64"),), (SGD(),), "w has dtype int64.*float32, float64, float16, bfloat16"),
        ((replace(GOOD, shape=(2, -1)),), (SGD(),), r"w has shape \(2, -1\)"),
        ((replace(GOOD, shape=(1,) * 9),), (SGD(),), "w has shape"),
        ((replace(GOOD, group=1),), (SGD(),), "w is in group 1 of 1"),
        ((replace(GOOD, group=-1),), (SGD(),), "w is in group -1 of 1"),
        ((replace(GOOD, shape=(2**40,)),), (SGD(),), f"the model has {2**42} bytes"),
        ((GOOD,) * (MAX_TENSORS + 1), (SGD(),), "over 1000000 tensors or 4096 groups"),
        ((GOOD,), (SGD(),) * (MAX_GROUPS + 1), "over 1000000 tensors or 4096 groups"),
    ],
)
def test_a_wrong_model_says_what_is_wrong(tensors: tuple[Tensor, ...], groups: tuple[Rule, ...], told: str) -> None:
    """A model that cannot be is a `ConfigError` that names the tensor and the limit."""
    with pytest.raises(ConfigError, match=told):
        ModelSpec(tensors, groups)


def test_the_largest_model_is_let_in() -> None:
    """The limits themselves are allowed: 1 TiB, eight dimensions, a name of 1024 characters, 4096 groups."""
    spec = ModelSpec((Tensor("x" * 1024, "float32", (2**38, *(1,) * 7), MAX_GROUPS - 1),), (Delta(),) * MAX_GROUPS)

    assert spec == read_model(spec.description)
    assert 2**40 == spec.total_bytes


def test_a_description_has_a_limit() -> None:
    """A description over 16 MiB is refused where it would be written, and where it would be read."""
    spec = ModelSpec(tuple(Tensor(f"{i:01024}", "float32", ()) for i in range(MAX_DESCRIPTION // 1024)), (SGD(),))

    with pytest.raises(ConfigError, match="the model's description has .* bytes, over 16777216"):
        _ = spec.description
    with pytest.raises(ProtocolError, match="over the limit"):
        read_model(bytes(MAX_DESCRIPTION + 1))


SGD_ = ["sgd", [0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]
W = ["w", "float32", [2], 0]
NONE = ["none", []]


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        [[W]],
        [[W], [SGD_]],
        [[W], [SGD_], []],
        [[W], [SGD_], NONE, []],
        [[W], [SGD_], "none"],
        [[W], [SGD_], ["none", [1.0]]],
        [[W], [SGD_], ["os.system", []]],
        [[W], [SGD_], ["compensate", [0.04]]],
        [[W], [SGD_], ["compensate", [0.04, 0.5]]],
        [[W], [SGD_], ["compensate", [1, 0.0]]],
        [[W], [SGD_], ["compensate", [0.0, 0.0]]],
        [[W], [SGD_], ["compensate", [-0.04, 0.0]]],
        [[W], [SGD_], ["compensate", [1000.5, 0.0]]],
        [[W], [SGD_], ["compensate", [float("nan"), 0.0]]],
        [[W], [SGD_], ["compensate", [float("inf"), 0.0]]],
        [[W], [["delta", []]], ["scale", []]],
        [[], [SGD_], NONE],
        [[W, W], [SGD_], NONE],
        [[["w", "float32", [2]]], [SGD_], NONE],
        [[[b"w", "float32", [2], 0]], [SGD_], NONE],
        [[["w", "int8", [2], 0]], [SGD_], NONE],
        [[["w", 32, [2], 0]], [SGD_], NONE],
        [[["w", "float32", 2, 0]], [SGD_], NONE],
        [[["w", "float32", [2.0], 0]], [SGD_], NONE],
        [[["w", "float32", [True], 0]], [SGD_], NONE],
        [[["w", "float32", [-2], 0]], [SGD_], NONE],
        [[["w", "float32", [2], False]], [SGD_], NONE],
        [[["w", "float32", [2], 1]], [SGD_], NONE],
        [[["w", "float32", [2**40], 0]], [SGD_], NONE],
        [[["w", "float32", [2**63] * 8, 0]], [SGD_], NONE],
        [[W], [["sgd", [0.1]]], NONE],
        [[W], [["sgd", [1, 0, 0, 0, 0, 0]]], NONE],
        [[W], [["sgd", [float("nan"), 0.0, 0.0, 0.0, 0.0, 0.0]]], NONE],
        [[W], [["sgd", [0.1, 0.0, 0.0, 0.0, 0.5, 0.0]]], NONE],
        [[W], [["sgd", [-0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]], NONE],
        [[W], [["os.system", []]], NONE],
        [[W], [[b"sgd", SGD_[1]]], NONE],
        [[W], ["delta"], NONE],
    ],
)
def test_a_hostile_description_is_refused(body: Any) -> None:
    """A description whose parts are of other types, counts or ranges is refused before anything is made of it."""
    assert ModelSpec((Tensor("w", "float32", (2,)),), (SGD(lr=0.1),)) == read_model(msgpack.packb([[W], [SGD_], NONE]))

    with pytest.raises(ProtocolError, match="model description"):
        read_model(msgpack.packb(body))


@pytest.mark.parametrize("depth", [900, 1000, 1020, 100_000])
def test_a_deeply_nested_description_is_refused(depth: int) -> None:
    """Lists within lists, to any depth, are refused as anything else is."""
    for head in (b"", b"\x92\x91", b"\x92\x91\x94"):
        with pytest.raises(ProtocolError):
            read_model(head + b"\x91" * depth + b"\xc0")


A, B, C = Tensor("a", "float32", (2,)), Tensor("b", "float32", (3,)), Tensor("c", "float64", ())


@pytest.mark.parametrize(
    ("tensors", "groups", "told"),
    [
        ((A, B), (SGD(), Delta()), "2 tensors against 3|3 tensors against 2"),
        ((A, B, C, Tensor("d", "float16", (4,))), (SGD(), Delta()), r"the first that differs is d float16\[4\]"),
        (
            (A, replace(B, shape=(4,)), replace(C, dtype="float32")),
            (SGD(), Delta()),
            r"is b float32\[3\] against b float32\[4\]$",
        ),
        ((A, B, replace(C, name="z")), (SGD(), Delta()), r"c float64\[\] against z float64\[\]"),
        ((B, A, C), (SGD(), Delta()), r"a float32\[2\] against b float32\[3\]"),
        ((A, replace(B, group=1), C), (SGD(), Delta()), "groups 0 and 1"),
        ((A, B, C), (SGD(), Adam()), "group 1 has optimizer delta .* against adam .*'beta2': 0.999"),
        ((A, B, C), (SGD(lr=0.5), Delta()), "group 0 has optimizer sgd .*'lr': 0.001.* against sgd .*'lr': 0.5"),
        ((A, B, C), (SGD(), Delta(), Delta()), "2 parameter groups against 3"),
    ],
)
def test_a_difference_names_what_differs_first(
    tensors: tuple[Tensor, ...], groups: tuple[Rule, ...], told: str
) -> None:
    """The first tensor, or else the first optimizer, that two models do not share is named with both its sides."""
    mine = ModelSpec((A, B, C), (SGD(), Delta()))

    found = mine.difference(ModelSpec(tensors, groups))
    assert re.search(told, found), found


def test_a_tensor_is_counted_and_named() -> None:
    """A scalar has one element, a shape with a zero none; a tensor is shown with its dtype and shape."""
    assert [1, 0, 24] == [Tensor("t", "float32", shape).elements for shape in ((), (3, 0), (2, 3, 4))]
    assert "w float32[2, 3]" == str(GOOD)
