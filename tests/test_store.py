"""The store: values, versions and copies of a shard's blocks, and what a payload must be (rung T0, SPEC §4.2, §6.4)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.codecs import BF16, INT8, RAW
from shoal.protocol.coding import decode
from shoal.protocol.layout import lay_out
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import Delta
from shoal.ps.store import DTYPES, Misfit, Shot, Store

KINDS = ModelSpec(tuple(Tensor(dtype, dtype, (4,)) for dtype in DTYPES), (Delta(),))


def store_of(*elements: int) -> Store:
    """A store with float32 blocks of so many elements."""
    tensors = tuple(Tensor(f"t{i}", "float32", (count,), i) for i, count in enumerate(elements))
    return Store(lay_out(ModelSpec(tensors, (Delta(),) * len(elements)), 1), 0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(("fill", "apply", "read", "promise", "keep")), st.integers(0, 2)), max_size=20)
)
def test_versions_and_copies(moves: list[tuple[str, int]]) -> None:
    """The version rises with every change; what changed since one is known; a copy is made once a version and never changes.

    What was promised to a reader is of that moment, whenever he reads it.
    """
    store, changed, value = store_of(3, 1, 2), [0, 0, 0], [0.0, 0.0, 0.0]
    kept: list[tuple[memoryview, bytes]] = []
    promised: list[tuple[Shot, bytes]] = []
    for kind, block in moves:
        size = store.nbytes_of(block) // 4
        if kind == "read":
            copy = store.snapshot(block)
            assert np.full(size, value[block], np.float32).tobytes() == copy
            assert copy.obj is store.snapshot(block).obj
            kept.append((copy, bytes(copy)))
            continue
        if kind == "promise":
            promised.append((store.shot(block), np.full(size, value[block], np.float32).tobytes()))
            continue
        if kind == "keep":
            if promised:
                shot, then = promised.pop(0)
                assert then == shot.values()
            continue
        if kind == "fill":
            value[block] = 5.0
            store.fill(block, np.full(size, 5.0, np.float32).tobytes())
        else:
            value[block] += 1.0
            store.apply(block, torch.ones(size), None, (), 1)
        changed[block] = max(changed) + 1
        assert max(changed) == store.version
    assert all(frozen == copy for copy, frozen in kept)
    assert all(then == shot.values() for shot, then in promised)
    for since in range(store.version + 1):
        assert [b for b in range(3) if changed[b] > since] == store.changed_since(since)
        assert [b for b in (2, 0) if changed[b] > since] == store.changed_since(since, (2, 0))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from((RAW, BF16, INT8, None)), st.integers(0, 1)), max_size=20))
def test_a_version_is_encoded_once(moves: list[tuple[int | None, int]]) -> None:
    """For all who ask for it in that codec; what was given out never changes, and the next version is another's."""
    store, value = store_of(3, 1), [0.0, 0.0]
    kept: list[tuple[memoryview, bytes]] = []
    for codec, block in moves:
        elements = store.nbytes_of(block) // 4
        if codec is None:
            value[block] += 1.0
            store.apply(block, torch.ones(elements), None, (), 1)
            continue
        found = store.snapshot(block, codec)
        assert found.obj is store.snapshot(block, codec).obj
        assert [value[block]] * elements == pytest.approx(decode(codec, found, elements).tolist())
        kept.append((found, bytes(found)))
    assert all(frozen == copy for copy, frozen in kept)


@pytest.mark.parametrize("codec", [RAW, INT8])
def test_memory_that_nobody_reads_is_used_again(codec: int) -> None:
    """For the next version; what somebody still holds is left alone."""
    store = store_of(3)

    def address(view: memoryview) -> int:
        return np.frombuffer(view, np.uint8).ctypes.data

    first = address(store.snapshot(0, codec))
    store.apply(0, torch.ones(3), None, (), 1)
    held = store.snapshot(0, codec)
    assert first == address(held)
    store.apply(0, torch.ones(3), None, (), 1)
    assert first != address(store.snapshot(0, codec))


def test_no_codec_for_what_is_not_for_one() -> None:
    """Of another dtype a reader gets the values as they are."""
    store = Store(lay_out(KINDS, 1), 0)

    assert [8, 32, 8, 8] == [len(store.snapshot(block, BF16)) for block in range(4)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_finite_gradients_get_in(dtype: str) -> None:
    """NaN and infinity are refused wherever they stand, and cancel nothing out; finite values get in though their sum is none."""
    store, block, kind = Store(lay_out(KINDS, 1), 0), list(DTYPES).index(dtype), DTYPES[dtype]

    def payload(*values: float) -> bytes:
        return torch.tensor(values, dtype=kind).view(torch.uint8).numpy().tobytes()

    inf, nan, most = float("inf"), float("nan"), torch.finfo(kind).max
    for bad in ((nan, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, inf), (inf, -inf, 1.0, 1.0), (1.0, -inf, most, most)):
        with pytest.raises(Misfit, match="NaN or infinity"):
            store.tensor(block, payload(*bad))
    assert [most] * 4 == store.tensor(block, payload(*[most] * 4)).tolist()
    part = store.tensor(block, payload(1.5, -2.0, 0.25), [(0, 1), (2, 4)])
    assert (kind, [1.5, -2.0, 0.25]) == (part.dtype, part.tolist())
    store.fill(block, payload(nan, inf, -inf, 1.0))
    assert payload(nan, inf, -inf, 1.0) == store.snapshot(block)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_ranges_ascend_and_do_not_touch(ranges: list[tuple[int, int]]) -> None:
    """Ranges are let in exactly when each has elements, begins after the one before has ended, and the last is in the block."""
    store = store_of(5)
    good = all(a < b <= 5 for a, b in ranges) and all(x[1] < y[0] for x, y in pairwise(ranges))

    if good:
        store.check_ranges(0, ranges)
    else:
        with pytest.raises(Misfit):
            store.check_ranges(0, ranges)
    with pytest.raises(Misfit):
        store.check_ranges(1, ranges)


def test_a_copy_is_made_for_those_who_have_not_read() -> None:
    """A change copies a block that somebody was promised and has not read; not one that was read, or that nobody waits for."""
    store = store_of(2, 2, 2)
    waiting, done = store.shot(0), store.shot(1)
    kept = bytes(done.values())
    store.shot(2)  # nobody holds it
    for block in range(3):
        store.apply(block, torch.ones(2), None, (), 1)

    assert [[0], [0], []] == [[copy.version for copy in held.copies.values()] for held in store._held.values()]
    assert bytes(8) == waiting.values() == kept
    assert np.ones(2, np.float32).tobytes() == store.shot(0).values()
