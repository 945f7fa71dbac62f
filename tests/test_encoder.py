"""What a worker pushes in a codec, and what it keeps for later; as a shard reads it (rungs T0 and T3, SPEC §12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.protocol.codecs import BF16, INT8, NAMES, RAW, TOPK, Codec
from shoal.protocol.coding import indices
from shoal.protocol.layout import MIN_BLOCK_BYTES, Layout, lay_out
from shoal.protocol.messages import Fill, Push
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import Delta, Rule
from shoal.ps.weights import Weights
from shoal.worker.arrays import Cache, Gather
from shoal.worker.encoder import Encoder

LIFE = 7


def floats_of(sizes: list[int]) -> ModelSpec:
    return ModelSpec(tuple(Tensor(f"t{i}", "float32", (n,)) for i, n in enumerate(sizes)), (Delta(),))


class Shards:
    """All shards of a layout, filled with zeros; what is pushed is added."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.each = [Weights(layout, index) for index in range(layout.shards)]
        for weights in self.each:
            for block in weights.store.blocks:
                weights.fill(Fill(1, 9, 1, 1, (block,), (bytes(layout.blocks[block].nbytes),)))

    def push(self, parts: Any) -> None:
        for part in parts:
            push = Push(1, 9, 1, 0, True, 1.0, (), 0, part.codec, part.blocks, part.ranges, False, 0, part.buffers)
            self.each[part.shard].apply(push, 1)

    def flat(self) -> np.ndarray[Any, Any]:
        """The first flat, whole."""
        blocks = [self.each[b.shard].store.snapshot(b.index) for b in self.layout.blocks if b.flat == 0]
        return np.concatenate([np.frombuffer(values, np.float32) for values in blocks])


@st.composite
def trainings(draw: Any) -> tuple[Layout, list[dict[str, int]], float]:
    """A layout of several blocks and shards, what is pushed (a seed by name), and how much of it is sent."""
    sizes = draw(st.lists(st.integers(1, 900) | st.integers(1, 3000), min_size=1, max_size=6))
    layout = lay_out(floats_of(sizes), draw(st.integers(1, 3)), MIN_BLOCK_BYTES)
    names = st.sampled_from([f"t{i}" for i in range(len(sizes))])
    return (
        layout,
        draw(st.lists(st.dictionaries(names, st.integers(0, 99), min_size=1), min_size=1, max_size=6)),
        draw(st.sampled_from((0.001, 0.01, 0.1, 0.5))),
    )


@settings(deadline=None, max_examples=80)
@given(trainings())
def test_nothing_is_lost_by_topk(training: tuple[Layout, list[dict[str, int]], float]) -> None:
    """Whatever names each push has: what the shards have got and what the worker has kept are together all that was pushed.

    In whole numbers, so that no rounding hides a difference. And what is kept of an element is at most what was pushed of it.
    """
    layout, pushes, fraction = training
    cache, shards, encoder = Cache(layout), Shards(layout), Encoder(Codec(TOPK, fraction), layout)
    wanted = np.zeros(layout.flats[0].elements, np.float32)
    for named in pushes:
        gather, arrays = Gather(cache), {}
        for name, seed in named.items():
            elements = cache.tensor(name).elements
            arrays[name] = np.random.default_rng(seed).integers(-50, 50, elements).astype(np.float32)
            start = cache._where[name][1].start
            wanted[start : start + elements] += arrays[name]
        gather.put(arrays, check=True)
        shards.push(encoder.encode(gather.parts(), (), LIFE, {}))
    got = shards.flat()
    kept = np.zeros_like(wanted)
    for block, rest in encoder._rests.items():
        kept[layout.blocks[block].start : layout.blocks[block].stop] = rest

    assert np.array_equal(wanted, got + kept)
    assert len(wanted) < 8 or fraction == 0.5 or np.any(kept), "nothing was left out: this tests nothing"
    touched = np.zeros(len(wanted), bool)
    for named in pushes:
        for name in named:
            piece = cache._where[name][1]
            touched[piece.start : piece.stop] = True
    assert not got[~touched].any()
    assert not kept[~touched].any()


def test_what_waits_is_sent_in_the_end() -> None:
    """Small elements grow in the rest until they are among the largest: each has been sent after some pushes."""
    layout = lay_out(floats_of([100]), 1)
    cache, encoder, gather = Cache(layout), Encoder(Codec(TOPK, 0.1), layout), Gather(Cache(layout))
    gradient = np.linspace(0.5, 1.0, 100, dtype=np.float32)
    gather = Gather(cache)
    seen: set[int] = set()
    for _ in range(20):
        gather.put({"t0": gradient}, check=True)
        (part,) = encoder.encode(gather.parts(), (), LIFE, {})
        assert 80 == len(part.buffers[0])
        seen |= set(indices(part.buffers[0]).tolist())

    assert set(range(100)) == seen


def test_a_new_life_begins_with_nothing_kept() -> None:
    """What an evicted worker had not sent is lost with what it had not had acknowledged."""
    layout = lay_out(floats_of([10]), 1)
    encoder, gather = Encoder(Codec(TOPK, 0.1), layout), Gather(Cache(layout))
    gather.put({"t0": np.arange(10, dtype=np.float32)}, check=True)
    encoder.encode(gather.parts(), (), LIFE, {})
    gather.put({"t0": np.ones(10, np.float32)}, check=True)
    (part,) = encoder.encode(gather.parts(), (), LIFE + 1, {})

    assert 1.0 == np.frombuffer(part.buffers[0], "<f4", 1, 4)[0]


@pytest.mark.parametrize("number", [BF16, INT8, TOPK], ids=NAMES.__getitem__)
def test_what_is_not_for_a_codec_travels_raw(number: int) -> None:
    """Another dtype, averaged buffers, and what a shard of this machine has in shared memory."""
    kinds = (("w", "float32", 0), ("d", "float64", 0), ("h", "float16", 0), ("mean", "float32", 1))
    spec = ModelSpec(tuple(Tensor(name, dtype, (8,), group) for name, dtype, group in kinds), (Delta(), Rule("mean")))
    layout = lay_out(spec, 1)
    assert (True, False, False, False) == layout.coded
    gather = Gather(Cache(layout))
    gather.put({name: np.full(8, 2.0, dtype) for name, dtype, _ in kinds}, check=True)
    raw = gather.parts()
    encoder = Encoder(Codec(number, 0.5), layout)
    (part,) = encoder.encode(raw, (), LIFE, {})

    assert number == part.codec
    assert [False, True, True, True] == [
        bytes(a) == bytes(b) for a, b in zip(part.buffers, raw[0].buffers, strict=True)
    ]
    assert raw == encoder.encode(raw, {0}, LIFE, {})
    gather.put({"d": np.ones(8)}, check=True)
    (part,) = encoder.encode(gather.parts(), (), LIFE, {})
    assert RAW == part.codec


WAYS = (
    ("raw", "raw", 4000, 4000, 0.0, 0.0),
    ("bf16", "fp16", 2000, 2000, 2.0**-9, 2.0**-11),
    ("fp16", "int8", 2000, 1016, 2.0**-12, 1 / 253),
    ("int8", "bf16", 1016, 2000, 1 / 253, 2.0**-8),
    ("topk:0.5", "raw", 4000, 4000, 0.6, 0.0),
    ("topk", "raw", 80, 4000, 1.0, 0.0),
)
"""Push and pull codec, bytes pushed and pulled, and the largest error of each beside the largest of 1000 numbers."""


def test_over_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers far from their server: the bytes that are counted are those that travel, the values as near as promised.

    A worker that pulls raw says what the server holds.
    """
    monkeypatch.setenv("SHOAL_TRANSPORT", "tcp")
    values = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    zeros = {"w": np.zeros(1000, np.float32)}
    with shoal.LocalCluster(staleness="inf") as cluster, shoal.connect(cluster.join) as reader:
        reader.register(zeros, optimizer=shoal.Delta())
        for push, pull, pushed, pulled, push_loss, pull_loss in WAYS:
            monkeypatch.setenv("SHOAL_PULL_CODEC", pull)
            with shoal.connect(cluster.join, push_codec=push) as worker:
                worker.register(zeros, optimizer=shoal.Delta())
                before = reader.pull()["w"]
                worker.push({"w": values}).result()
                after, found = reader.pull()["w"], worker.pull()["w"]

                assert (pushed, pulled) == (worker.stats.bytes_pushed, worker.stats.bytes_pulled), push
                for error, loss in (
                    (after - before - values, push_loss),
                    (found - after, pull_loss * np.abs(after).max()),
                ):
                    assert np.abs(error).max() <= loss + 1e-6, (push, pull)
                    assert loss == 0 or np.abs(error).max() > 2e-6, (push, pull)
                assert np.array_equal(found, worker.pull()["w"]), "what has not changed is not sent again"
                assert pulled == worker.stats.bytes_pulled


def test_in_shared_memory_nothing_is_encoded() -> None:
    """Nothing travels there: a worker beside its server pushes and pulls exactly, whatever codecs it was told."""
    values = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join, push_codec="topk", pull_codec="int8") as worker:
        worker.register({"w": np.zeros(1000, np.float32)}, optimizer=shoal.Delta())
        if not worker._exchange._near:
            pytest.skip("memory is not shared here")
        worker.push({"w": values}).result()

        assert np.array_equal(values, worker.pull()["w"])
