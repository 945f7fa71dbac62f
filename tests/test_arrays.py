"""Named arrays <-> flat vectors <-> blocks: what goes in comes out, in place, whatever its kind and cut (rung T0, SPEC §4.2)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import NonFiniteError, ShapeError
from shoal.protocol.layout import MIN_BLOCK_BYTES, Layout, lay_out
from shoal.protocol.model import ITEMSIZE, ModelSpec, Tensor
from shoal.protocol.rules import SGD
from shoal.worker import arrays
from shoal.worker.arrays import Cache, Gather, Template, bits, describe, merged, write

DTYPES = tuple(ITEMSIZE)


def array(name: str, dtype: str, elements: int, seed: int = 0) -> Any:
    """Values that differ everywhere: bfloat16 as a torch tensor, the rest in numpy."""
    values = np.random.default_rng([seed, *name.encode()]).standard_normal(elements)
    return torch.tensor(values, dtype=torch.bfloat16) if dtype == "bfloat16" else values.astype(dtype)


@st.composite
def models(draw: Any) -> tuple[Layout, list[str]]:
    """A layout with blocks of 4 KiB, and some of its names."""
    one = st.tuples(st.sampled_from(DTYPES[2:]), st.integers(0, 20) | st.integers(0, 3000), st.integers(0, 1))
    found = draw(st.lists(one, min_size=1, max_size=12))
    tensors = tuple(Tensor(f"t{i}", dtype, (elements,), group) for i, (dtype, elements, group) in enumerate(found))
    layout = lay_out(ModelSpec(tensors, (SGD(), SGD())), draw(st.integers(1, 3)), MIN_BLOCK_BYTES)
    return layout, draw(st.lists(st.sampled_from([tensor.name for tensor in tensors]), unique=True))


def pushed(layout: Layout, parts: Any) -> dict[int, list[tuple[int, bytes]]]:
    """By block, the runs that a push says: (first byte, bytes), as a shard reads them (SPEC §7)."""
    found: dict[int, list[tuple[int, bytes]]] = {}
    for part in parts:
        buffers, pairs = list(part.buffers), np.empty((0, 2), np.uint32)
        if part.ranges:
            pairs = np.frombuffer(buffers.pop(0), "<u4").reshape(-1, 2)
            assert sum(part.ranges) == len(pairs)
        at = 0
        for block, count, buffer in zip(part.blocks, part.ranges or (0,) * len(part.blocks), buffers, strict=True):
            layouted = layout.blocks[block]
            assert layouted.shard == part.shard
            assert block not in found
            runs = pairs[at : at + count].tolist() if count else [[0, layouted.elements]]
            at += count
            size, data, found[block] = layouted.itemsize, bytes(buffer), []
            for start, stop in runs:
                assert 0 <= start < stop <= layouted.elements
                found[block].append((start * size, data[: (stop - start) * size]))
                data = data[(stop - start) * size :]
            assert b"" == data
            assert all(a[0] + len(a[1]) < b[0] for a, b in pairwise(found[block]))
    return found


@settings(deadline=None, max_examples=150)
@given(models())
def test_a_push_carries_what_was_given_and_nothing_else(model: tuple[Layout, list[str]]) -> None:
    """For any model, cut and choice of names: laid into a copy of the weights, a push changes those tensors and no byte beside."""
    layout, names = model
    before, after = Cache(layout), Cache(layout)
    for tensor in layout.spec.tensors:
        before.set(tensor.name, array(tensor.name, tensor.dtype, tensor.elements))
        after.set(tensor.name, array(tensor.name, tensor.dtype, tensor.elements, int(tensor.name in names)))
    gather = Gather(before)
    gather.put(
        {name: array(name, before.tensor(name).dtype, before.tensor(name).elements, 1) for name in names}, check=True
    )

    for _ in range(2):  # the same again: what was worked out once must still be right
        found = pushed(layout, gather.parts())
        for block in layout.blocks:
            data = bytearray(before.block(block.index))
            for start, run in found.get(block.index, []):
                data[start : start + len(run)] = run
            assert bytes(after.block(block.index)) == data


@settings(deadline=None, max_examples=100)
@given(models())
def test_blocks_rebuild_the_model(model: tuple[Layout, list[str]]) -> None:
    """All blocks of a cache loaded into another give the same tensors; the blocks of some names give those names."""
    layout, names = model
    source, whole, some = Cache(layout), Cache(layout), Cache(layout)
    for tensor in layout.spec.tensors:
        source.set(tensor.name, array(tensor.name, tensor.dtype, tensor.elements))
    for block in layout.blocks:
        whole.load(block.index, source.block(block.index))
    wanted = source.shards(names)
    for index in (index for blocks in wanted.values() for index in blocks):
        some.load(index, source.block(index))

    for tensor in layout.spec.tensors:
        assert source.values(tensor.name).tobytes() == whole.values(tensor.name).tobytes()
    for name in names:
        assert source.values(name).tobytes() == some.values(name).tobytes()
    assert all(layout.blocks[block].shard == shard for shard, blocks in wanted.items() for block in blocks)
    assert {shard: () for shard, owned in enumerate(layout.by_shard) if owned} == source.shards()


def test_no_block_is_asked_for_in_vain() -> None:
    """The blocks of a name are those that it lies in, to the element; a block is a copy."""
    layout = lay_out(
        ModelSpec(tuple(Tensor(f"t{i}", "float32", (1024,)) for i in range(4)), (SGD(),)), 4, MIN_BLOCK_BYTES
    )
    cache = Cache(layout)

    assert [[i] for i in range(4)] == [
        [b for blocks in cache.shards([f"t{i}"]).values() for b in blocks] for i in range(4)
    ]
    assert {} == cache.shards([])
    before = bytes(block := cache.block(0))
    cache.set("t0", np.ones(1024, np.float32))
    assert before == bytes(block)  # what was given out for sending does not change on the way


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (min(pair), max(pair)))))
def test_merged_ranges_cover_the_same(spans: list[tuple[int, int]]) -> None:
    """Ascending, not touching, and the same elements as before."""
    runs = merged(spans)

    assert {i for span in spans for i in range(*span)} == {i for run in runs for i in range(*run)}
    assert all(a[1] < b[0] for a, b in pairwise(runs))
    assert all(start < stop for start, stop in runs)


@pytest.mark.parametrize(("limit", "sizes"), [(2**30, {1024, 76}), (3 * MIN_BLOCK_BYTES, {3, 2}), (1, {1})])
def test_a_message_holds_no_more_than_its_limit(limit: int, sizes: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks go together up to the limit of SPEC §2.3, 1,024 at most; a larger block goes alone."""
    elements = 1024 * 1100
    gather = Gather(Cache(lay_out(ModelSpec((Tensor("w", "float32", (elements,)),), (SGD(),)), 1, MIN_BLOCK_BYTES)))
    assert 4 * 1024 * 1024 == arrays.PART_BYTES
    monkeypatch.setattr(arrays, "PART_BYTES", limit)
    gather.put({"w": np.ones(elements, np.float32)}, check=False)

    assert sizes == {len(part.blocks) for part in gather.parts()}


def test_a_gather_is_used_again() -> None:
    """After another choice of names, and after a put that failed half-way, it carries what was put last."""
    layout = lay_out(ModelSpec(tuple(Tensor(name, "float32", (1,)) for name in "abc"), (SGD(),)), 1)
    gather = Gather(Cache(layout))

    def put(**values: float) -> list[Any]:
        gather.put({name: np.full(1, value, np.float32) for name, value in values.items()}, check=True)
        ((_, runs),) = pushed(layout, gather.parts()).items()
        return [(start, np.frombuffer(run, np.float32).tolist()) for start, run in runs]

    assert [(0, [1.0, 2.0, 3.0])] == put(a=1, b=2, c=3)
    with pytest.raises(NonFiniteError, match="gradient of 'b'"):
        put(a=3, b=np.inf, c=1)
    assert [(0, [4.0, 5.0, 6.0])] == put(c=6, a=4, b=5)
    for value in (7.0, 8.0):
        assert [(0, [value]), (8, [value])] == put(a=value, c=value)
    with pytest.raises(ShapeError, match="no tensor 'd'.*one of a, b, c"):
        put(a=7, d=8)
    assert [(4, [9.0])] == put(b=9)


@pytest.mark.parametrize(("library", "dtype"), [*(("torch", d) for d in DTYPES), *(("numpy", d) for d in DTYPES[:3])])
def test_an_array_comes_back_as_it_was(library: str, dtype: str) -> None:
    """By a template, and into an array that is there: kind, dtype, shape and every bit; and it is the caller's own."""
    made = torch.arange(6, dtype=getattr(torch, dtype)).reshape(2, 3) * 0.3
    first: Any = made if library == "torch" else made.numpy()
    flat = bits(first).copy()
    back = Template(first).make(flat)
    out = first * 0
    write(out, flat)
    flat[:] = 0

    for found in (back, out):
        assert (type(first), first.dtype, first.shape) == (type(found), found.dtype, found.shape)
        assert bits(first).tobytes() == bits(found).tobytes()


def test_any_memory_order_is_read() -> None:
    """Transposed, strided, scalar, empty, sparse, and a parameter that requires a gradient."""
    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    wanted = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]

    assert wanted == bits(grid.T).tolist() == bits(torch.from_numpy(grid).T).tolist()
    assert [0.0, 2.0] == bits(np.arange(4.0)[::2]).tolist() == bits(torch.arange(4.0)[::2]).tolist()
    assert [7.0] == bits(np.float64(7)).tolist() == bits(torch.tensor(7.0)).tolist()
    assert [] == bits(np.zeros((0, 3))).tolist() == bits(torch.zeros(0, 3)).tolist()
    assert [0.0, 5.0, 0.0] == bits(torch.sparse_coo_tensor([[1]], [5.0], (3,), check_invariants=True)).tolist()
    assert [1.0, 1.0] == bits(torch.nn.Parameter(torch.ones(2))).tolist()


def test_writing_leaves_the_graph_alone() -> None:
    """Weights are written into a parameter in place; it stays a leaf that requires a gradient."""
    leaf = torch.nn.Parameter(torch.zeros(2, 2))
    write(leaf, np.arange(4, dtype=np.float32))
    leaf.sum().backward()

    assert [[0.0, 1.0], [2.0, 3.0]] == leaf.tolist()
    assert leaf.is_leaf and leaf.grad is not None


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ([1.0], "'w' is a list"),
        (1.0, "'w' is a float"),
        (np.zeros(2, np.int32), "dtype int32.*one of float32, float64"),
        (np.zeros(2, np.complex64), "dtype complex64"),
        (np.zeros(2, ">f4"), "dtype >f4"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([None]), "dtype object"),
        (torch.zeros(2, dtype=torch.int64), "dtype int64"),
    ],
)
def test_what_is_no_array_of_ours_is_refused(given_: Any, told: str) -> None:
    """The name and what it is, before anything is sent."""
    with pytest.raises(ShapeError, match=told):
        describe("w", given_)


def test_a_wrong_shape_or_dtype_changes_nothing() -> None:
    """Every array is looked at before the first is copied."""
    layout = lay_out(ModelSpec((Tensor("a", "float32", (2,)), Tensor("b", "float16", (2, 1))), (SGD(),)), 1)
    gather = Gather(Cache(layout))
    gather.put({"a": np.ones(2, np.float32)}, check=True)
    kept = gather._flats[0].copy()

    for wrong, told in (
        (np.zeros(2, np.float16), r"float16\[2\], registered as float16\[2, 1\]"),
        (np.zeros((2, 1)), "float64"),
    ):
        with pytest.raises(ShapeError, match=told):
            gather.put({"a": np.zeros(2, np.float32), "b": wrong}, check=True)
    assert kept.tolist() == gather._flats[0].tolist()
