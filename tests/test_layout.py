"""The layout: every element in one block, every block on one shard, and everybody computes the same (rung T0, SPEC §4.2)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.layout import BLOCK_BYTES, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, Layout, lay_out
from shoal.protocol.model import ITEMSIZE, ModelSpec, Tensor
from shoal.protocol.rules import SGD, Adam

DTYPES = tuple(ITEMSIZE)
shapes = st.lists(st.integers(0, 40), max_size=3) | st.lists(st.integers(0, 50_000), max_size=1)
tensors = st.lists(
    st.tuples(st.sampled_from(DTYPES), shapes.map(tuple), st.integers(0, 1)), min_size=1, max_size=12
).map(lambda found: tuple(Tensor(f"t{i}", *entry) for i, entry in enumerate(found)))
specs = tensors.map(lambda found: ModelSpec(found, (SGD(), Adam())))
counts = st.integers(1, 9)
sizes = st.sampled_from((MIN_BLOCK_BYTES, MIN_BLOCK_BYTES + 1, 10_000, 65_536, BLOCK_BYTES, MAX_BLOCK_BYTES))


def check_layout(layout: Layout) -> None:
    """What holds for every layout."""
    spec = layout.spec
    # Every tensor lies once in the flat of its group and dtype, in order, and the flat holds nothing else.
    placed = []
    for flat in layout.flats:
        at = 0
        for piece in flat.pieces:
            tensor = spec.tensors[piece.tensor]
            assert (flat.group, flat.dtype, at) == (tensor.group, tensor.dtype, piece.start)
            assert tensor.elements == piece.stop - piece.start
            at = piece.stop
            placed.append(piece.tensor)
        assert at == flat.elements
        assert sorted(piece.tensor for piece in flat.pieces) == [piece.tensor for piece in flat.pieces]
    assert list(range(len(spec.tensors))) == sorted(placed)
    assert len({(flat.group, flat.dtype) for flat in layout.flats}) == len(layout.flats)
    # The blocks of a flat cover it end to end; they are numbered by flat, then by position.
    assert list(range(len(layout.blocks))) == [block.index for block in layout.blocks]
    assert sorted((b.flat, b.start) for b in layout.blocks) == [(b.flat, b.start) for b in layout.blocks]
    for number, flat in enumerate(layout.flats):
        at = 0
        for block in [block for block in layout.blocks if block.flat == number]:
            assert (at, ITEMSIZE[flat.dtype]) == (block.start, block.itemsize)
            assert 0 < block.elements
            assert block.stop == flat.elements or block.elements % 64 == 0
            assert block.nbytes <= layout.block_bytes
            at = block.stop
        assert at == flat.elements
    # Every block is on one shard; the shards are even to within a block.
    assert sorted(b.index for owned in layout.by_shard for b in owned) == list(range(len(layout.blocks)))
    for shard, owned in enumerate(layout.by_shard):
        assert {shard} >= {block.shard for block in owned}
        assert sorted(b.index for b in owned) == [b.index for b in owned]
    loads = [sum(block.nbytes for block in owned) for owned in layout.by_shard]
    assert layout.shards == len(loads)
    assert spec.total_bytes == sum(loads)
    assert max(loads) - min(loads) <= max((block.nbytes for block in layout.blocks), default=0)


def naive(spec: ModelSpec, shards: int, block_bytes: int) -> list[tuple[int, int, int, int]]:
    """SPEC §4.2 word for word: (flat, start, stop, shard) of each block."""
    keys = list(dict.fromkeys((tensor.group, tensor.dtype) for tensor in spec.tensors))
    limit = min(block_bytes, max(4096, -(-spec.total_bytes // shards)))
    blocks = []
    for flat, key in enumerate(keys):
        elements = sum(tensor.elements for tensor in spec.tensors if (tensor.group, tensor.dtype) == key)
        itemsize = ITEMSIZE[key[1]]
        step = max(1, limit // (64 * itemsize) * 64)
        blocks += [(flat, at, min(at + step, elements), itemsize) for at in range(0, elements, step)]
    loads, owners = [0] * shards, {}
    for number in sorted(range(len(blocks)), key=lambda i: ((blocks[i][1] - blocks[i][2]) * blocks[i][3], i)):
        shard = loads.index(min(loads))
        _, start, stop, itemsize = blocks[number]
        owners[number], loads[shard] = shard, loads[shard] + (stop - start) * itemsize
    return [(flat, start, stop, owners[i]) for i, (flat, start, stop, _) in enumerate(blocks)]


@settings(deadline=None, max_examples=120)
@given(specs, counts, sizes)
def test_every_layout_is_sound(spec: ModelSpec, shards: int, block_bytes: int) -> None:
    """Every element is in exactly one block, every block on one shard, and shards differ by at most one block's bytes."""
    check_layout(lay_out(spec, shards, block_bytes))


@settings(deadline=None, max_examples=80)
@given(specs, counts, sizes)
def test_a_layout_is_as_specified(spec: ModelSpec, shards: int, block_bytes: int) -> None:
    """Blocks, owners and digest are those that SPEC §4.2 gives, computed here a second time and simply."""
    layout = lay_out(spec, shards, block_bytes)
    wanted = naive(spec, shards, block_bytes)
    hashed = bytes.fromhex(spec.digest) + shards.to_bytes(4, "big") + block_bytes.to_bytes(4, "big")
    hashed += b"".join(shard.to_bytes(4, "big") for *_, shard in wanted)

    assert wanted == [(b.flat, b.start, b.stop, b.shard) for b in layout.blocks]
    assert hashlib.sha256(hashed).hexdigest() == layout.digest
    assert layout == lay_out(spec, shards, block_bytes)


def model(*found: Tensor, groups: tuple[Any, ...] = (SGD(),)) -> ModelSpec:
    return ModelSpec(found, groups)


def test_one_huge_tensor_is_cut() -> None:
    """A tensor of 64 GiB becomes blocks of 4 MiB, as many on every shard, the same number for any dtype of its size."""
    layout = lay_out(model(Tensor("w", "float32", (2**34,))), 8)

    check_layout(layout)
    assert {BLOCK_BYTES} == {block.nbytes for block in layout.blocks}
    assert [2**11] * 8 == [len(owned) for owned in layout.by_shard]


def test_ten_thousand_small_tensors_share_blocks() -> None:
    """Small tensors are laid end to end: the blocks are as many as the bytes demand, whatever the number of tensors."""
    layout = lay_out(model(*(Tensor(f"t{i}", "float32", (16,)) for i in range(10_000))), 4)

    check_layout(layout)
    assert 1 == len(layout.flats)
    assert 4 == len({block.shard for block in layout.blocks})
    assert len(layout.blocks) <= 8


def test_mixed_dtypes_and_groups_lie_apart() -> None:
    """A flat holds one dtype of one group, in the order of first appearance."""
    found = lay_out(
        model(
            Tensor("a", "float16", (3,), 1),
            Tensor("b", "float32", (5,)),
            Tensor("c", "float16", (7,)),
            Tensor("d", "float16", (2,), 1),
            Tensor("e", "bfloat16", (4,)),
            groups=(SGD(), Adam()),
        ),
        2,
    )

    check_layout(found)
    assert [(1, "float16", 5), (0, "float32", 5), (0, "float16", 7), (0, "bfloat16", 4)] == [
        (flat.group, flat.dtype, flat.elements) for flat in found.flats
    ]


@pytest.mark.parametrize("shards", [1, 3, 100])
def test_a_model_smaller_than_a_block(shards: int) -> None:
    """A model of one element is one block on the first shard, and the other shards own nothing."""
    layout = lay_out(model(Tensor("w", "float64", ())), shards)

    check_layout(layout)
    assert [1] + [0] * (shards - 1) == [len(owned) for owned in layout.by_shard]


def test_a_model_without_elements_has_no_blocks() -> None:
    """Tensors with a zero in their shape are known by name and take no block."""
    layout = lay_out(model(Tensor("w", "float32", (0, 4)), Tensor("v", "float64", (0,))), 3)

    check_layout(layout)
    assert ((), 2) == (layout.blocks, len(layout.flats))


def test_a_middling_model_uses_every_shard() -> None:
    """A model smaller than a block for each shard is cut smaller, down to 4 KiB, so that no shard idles."""
    layout = lay_out(model(Tensor("w", "float32", (8 * 1024,))), 8)

    check_layout(layout)
    assert [4096] * 8 == [sum(block.nbytes for block in owned) for owned in layout.by_shard]


def test_a_digest_changes_with_anything() -> None:
    """Name, dtype, shape, order, group, rule, a rule's number, shards, block size: another of any is another digest."""
    one, other = Tensor("a", "float32", (4, 2)), Tensor("b", "float32", (8,))
    groups = (SGD(), Adam())
    base = model(one, other, groups=groups)
    layouts = [
        lay_out(base, 2, 8192),
        lay_out(base, 3, 8192),
        lay_out(base, 2, 8193),
        lay_out(model(replace(one, name="c"), other, groups=groups), 2, 8192),
        lay_out(model(replace(one, dtype="float64"), other, groups=groups), 2, 8192),
        lay_out(model(replace(one, shape=(2, 4)), other, groups=groups), 2, 8192),
        lay_out(model(replace(one, shape=(8,)), other, groups=groups), 2, 8192),
        lay_out(model(replace(one, group=1), other, groups=groups), 2, 8192),
        lay_out(model(other, one, groups=groups), 2, 8192),
        lay_out(model(one, groups=groups), 2, 8192),
        lay_out(model(one, other, groups=(Adam(), SGD())), 2, 8192),
        lay_out(model(one, other, groups=(SGD(lr=0.2), Adam())), 2, 8192),
        lay_out(model(one, other, groups=(SGD(), Adam(), Adam())), 2, 8192),
    ]

    assert len(layouts) == len({layout.digest for layout in layouts})


def test_a_digest_covers_the_owners() -> None:
    """Two layouts that differ in nothing but who owns a block have different digests."""
    layout = lay_out(model(Tensor("w", "float32", (4096,))), 2, 8192)
    moved = replace(layout, blocks=(replace(layout.blocks[0], shard=1), *layout.blocks[1:]))

    assert layout.digest != moved.digest


DIGEST = "9353d27d0bed775e07bf0600e692d32a7bd240f5c4c717af4f0d5ae81da36b73"


def test_the_digest_is_fixed() -> None:
    """The digest of a known model: a change of it means that two versions of shoal no longer understand each other."""
    spec = model(Tensor("layer.weight", "float32", (300, 70)), Tensor("h", "bfloat16", (9,)), groups=(SGD(lr=0.5),))

    assert DIGEST == lay_out(spec, 3, 65_536).digest


@pytest.mark.parametrize(
    ("shards", "block_bytes"), [(0, 4096), (-1, 4096), (1, 4095), (1, 0), (1, MAX_BLOCK_BYTES + 1)]
)
def test_wrong_arguments_are_refused(shards: int, block_bytes: int) -> None:
    """No shards, or blocks out of bounds, are a `ValueError`; the bounds themselves are allowed."""
    spec = model(Tensor("w", "float32", (4,)))
    assert 2 == len({lay_out(spec, 1, size).digest for size in (MIN_BLOCK_BYTES, MAX_BLOCK_BYTES)})

    with pytest.raises(ValueError, match="block_bytes"):
        lay_out(spec, shards, block_bytes)
