"""Weights: filling, applying, averaging a step; a push is checked whole before any of it counts (rung T0, SPEC §4.3, §6.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cores import floats

from shoal.protocol.codecs import INT8, RAW, TOPK, Codec
from shoal.protocol.coding import encode
from shoal.protocol.layout import lay_out
from shoal.protocol.messages import Fill, Push
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD, Delta
from shoal.ps.store import Misfit
from shoal.ps.weights import Weights

SPEC = ModelSpec((Tensor("a", "float32", (2,), 0), Tensor("b", "float32", (3,), 1)), (SGD(lr=1.0), Delta()))
LR = (0.5, 0.0, 0.0, 0.0, 0.0, 0.0)


def pushed(worker: int, parts: dict[int, Any], **other: Any) -> Push:
    """`parts`: for each block its gradient, or (ranges, gradient)."""
    ranged = {block: part for block, part in parts.items() if isinstance(part, tuple)}
    buffers = [floats(*(part[1] if isinstance(part, tuple) else part)) for part in parts.values()]
    counts = tuple(len(part[0]) if isinstance(part, tuple) else 0 for part in parts.values()) if ranged else ()
    if ranged:
        buffers.insert(0, np.array([span for part in ranged.values() for span in part[0]], "<u4").tobytes())
    return replace(Push(worker, 9, 1, 0, True, 1.0, (), 0, 0, tuple(parts), counts, False, 0, tuple(buffers)), **other)


@pytest.fixture
def weights() -> Weights:
    made = Weights(lay_out(SPEC, 1), 0)
    made.fill(Fill(1, 9, 1, 2, (0, 1), (floats(1, 1), floats(0, 0, 0))))
    return made


def values(weights: Weights) -> list[list[float]]:
    return [np.frombuffer(weights.store.snapshot(block), np.float32).tolist() for block in weights.store.blocks]


def test_filled_is_every_block_of_one_filler() -> None:
    """A shard is filled when one worker has sent every block; what another had sent before does not count (SPEC §4.3.3)."""
    weights = Weights(lay_out(SPEC, 1), 0)
    weights.fill(Fill(1, 9, 1, 2, (0,), (floats(1, 1),)))
    weights.fill(Fill(1, 9, 2, 2, (0,), (floats(1, 1),)))
    assert not weights.filled
    weights.restart_filling()
    weights.fill(Fill(2, 9, 1, 3, (1,), (floats(2, 2, 2),)))
    assert not weights.filled
    with pytest.raises(Misfit):
        weights.fill(Fill(2, 9, 2, 3, (0,), (floats(2),)))
    assert not weights.filled
    weights.fill(Fill(2, 9, 3, 3, (0,), (floats(2, 2),)))

    assert weights.filled
    assert [[2, 2], [2, 2, 2]] == values(weights)
    assert Weights(lay_out(SPEC, 5), 4).filled, "a shard without blocks lacks nothing"


def test_a_push_is_applied_by_its_groups_rules(weights: Weights) -> None:
    """Each block follows the rule of its group, at the push's hyperparameters where it has any."""
    weights.apply(pushed(1, {0: [1, 2], 1: [1, 2, 3]}), 1)
    assert [[0, -1], [1, 2, 3]] == values(weights)
    weights.apply(pushed(1, {0: [1, 2], 1: [1, 2, 3]}, hyper=(LR, ())), 1)
    assert [[-0.5, -2], [2, 4, 6]] == values(weights)
    weights.apply(pushed(1, {0: (((1, 2),), [1]), 1: [1, 1, 1]}, hyper=((), ())), 1)

    assert [[-0.5, -3], [3, 5, 7]] == values(weights)
    assert (3, 2 + 2 * 3) == (weights.updates, weights.store.version)


def coded(number: int, *gradients: Any, fraction: float = 0.5) -> dict[str, Any]:
    """The fields of a push of blocks 0, 1, … in a codec; bytes are taken as they are."""
    codec = Codec(number, fraction)
    buffers = (g if isinstance(g, bytes) else bytes(encode(codec, np.array(g, np.float32))) for g in gradients)
    return {"codec": number, "blocks": tuple(range(len(gradients))), "ranges": (), "buffers": tuple(buffers)}


BAD: dict[str, tuple[str, dict[int, Any], dict[str, Any]]] = {
    "a foreign block": ("shape", {0: [1, 1], 7: [1]}, {}),
    "too short": ("shape", {0: [1, 1], 1: [1]}, {}),
    "NaN": ("nonfinite", {0: [1, 1], 1: [1, np.nan, 1]}, {}),
    "infinity in a part": ("nonfinite", {0: [1, 1], 1: (((0, 2),), [1, np.inf])}, {}),
    "blocks out of order": ("shape", {1: [1, 1, 1], 0: [1, 1]}, {}),
    "a block twice": ("shape", {}, {"blocks": (0, 0), "buffers": (floats(1, 1),) * 2}),
    "ranges that touch": ("shape", {0: [1, 1], 1: (((0, 1), (1, 2)), [1, 1])}, {}),
    "ranges out of the block": ("shape", {0: [1, 1], 1: (((1, 4),), [1, 1, 1])}, {}),
    "ranges of a foreign block": ("shape", {0: [1, 1], 7: (((0, 1),), [1])}, {}),
    "a short list of ranges": ("shape", {}, {"blocks": (0,), "ranges": (1,), "buffers": (bytes(4), floats(1))}),
    "groups that are not there": ("shape", {0: [1, 1]}, {"hyper": (LR,)}),
    "too few numbers": ("shape", {0: [1, 1]}, {"hyper": ((0.5,), ())}),
    "numbers for a rule without": ("shape", {0: [1, 1], 1: [1, 1, 1]}, {"hyper": (LR, (1.0,))}),
    "another flag": ("shape", {0: [1, 1]}, {"hyper": ((*LR[:5], 1.0), ())}),
    "a codec's wrong length": ("shape", {}, coded(INT8, [1, 1], floats(1, 1, 1))),
    "a codec's wrong index": ("shape", {}, coded(TOPK, [1, 1], np.array([3, 0], "<u4").tobytes())),
    "a codec's NaN": ("nonfinite", {}, coded(INT8, [1, 1], [1, np.nan, 1])),
    "a codec of a foreign block": ("shape", {}, coded(INT8, [1, 1], [1]) | {"blocks": (0, 7)}),
    "a codec of ranges out of the block": (
        "shape",
        {},
        {"codec": INT8, "blocks": (1,), "ranges": (1,), "buffers": (np.array([1, 4], "<u4").tobytes(), bytes(7))},
    ),
    "an infinite learning rate": ("shape", {0: [1, 1]}, {"hyper": ((np.inf, *LR[1:]), ())}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_push_changes_nothing(weights: Weights, case: str) -> None:
    """Whatever is wrong with the last block of a push, the first is not touched; neither at once nor in a step's average."""
    code, parts, other = BAD[case]
    before = values(weights)
    for act in (lambda push: weights.apply(push, 1), weights.collect):
        with pytest.raises(Misfit) as misfit:
            act(pushed(1, parts, **other))
        assert code == misfit.value.code
    weights.contribute(pushed(1, {}), 0)
    weights.close_step()

    assert before == values(weights)


def test_a_step_is_averaged_over_examples(weights: Weights) -> None:
    """All pushes of those who finished the step, weighted; at the hyperparameters of the first to join, which are 3's here."""
    weights.collect(pushed(2, {0: [3, 0]}))
    weights.collect(pushed(2, {0: (((1, 2),), [3]), 1: [4, 0, 0]}))
    weights.contribute(pushed(2, {}, hyper=((1.0, *LR[1:]), ())), rank=1)
    weights.collect(pushed(3, {0: [1, 1]}, examples=3.0))
    weights.contribute(pushed(3, {}, examples=3.0, hyper=(LR, ())), rank=0)
    weights.close_step()

    assert [[1 - 0.5 * 6 / 4, 1 - 0.5 * 6 / 4], [1, 0, 0]] == values(weights)


def test_only_finished_steps_count(weights: Weights) -> None:
    """A worker that does not finish, or finishes without examples, adds nothing and weighs nothing; nor does an empty step."""
    weights.collect(pushed(1, {0: [9, 9]}))
    weights.drop(1)
    weights.contribute(pushed(1, {}), 0)
    weights.collect(pushed(2, {0: [9, 9]}))
    weights.contribute(pushed(2, {}, examples=0.0), 1)
    weights.collect(pushed(3, {0: [1, 2]}))
    weights.collect(pushed(4, {0: [9, 9]}))
    weights.contribute(pushed(3, {}), 2)
    for _ in range(2):
        weights.close_step()
        assert [[0.5, 0.0], [0, 0, 0]] == values(weights)


def test_a_step_counts_whole_or_not_at_all(weights: Weights) -> None:
    """A step of which a part was refused adds nothing and weighs nothing; the worker's next one counts (§6.3)."""
    weights.collect(pushed(1, {0: [9, 9]}, advance=False))
    weights.spoil(1)
    weights.collect(pushed(1, {0: [9, 9]}))
    weights.contribute(pushed(1, {}), 0)
    weights.collect(pushed(2, {0: [1, 2]}))
    weights.contribute(pushed(2, {}), 1)
    weights.close_step()
    assert [0.0, -1.0] == values(weights)[0]

    weights.collect(pushed(1, {0: [1, 1]}))
    weights.contribute(pushed(1, {}), 0)
    weights.close_step()
    assert [-1.0, -2.0] == values(weights)[0]


def test_a_step_that_does_not_end_is_bounded(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may push a step in many parts, not without end (§2.3)."""
    monkeypatch.setattr("shoal.ps.weights.MAX_COLLECTED", 24)
    part = pushed(1, {0: [1, 1]}, advance=False)
    for _ in range(5):  # 40 bytes: twice the shard's own
        weights.collect(part)
    with pytest.raises(Misfit, match="40 bytes") as refused:
        weights.collect(part)
    assert "full" == refused.value.code
    weights.collect(pushed(2, {0: [1, 1]}, advance=False))
    weights.contribute(part, 0)
    weights.close_step()

    assert [-4.0, -4.0] == values(weights)[0]


def test_a_push_in_a_codec_is_read_as_any(weights: Weights) -> None:
    """At once and in a step's average, whole or in ranges; what is kept for a step is what it holds, not what has travelled."""
    weights.apply(pushed(1, {}, **coded(INT8, [127, -254], [0, 1, 0])), 1)
    assert [[1 - 128, 1 + 254], [0, 1, 0]] == values(weights)
    spans = np.array([[0, 1], [2, 3]], "<u4").tobytes()
    payload = bytes(encode(Codec(TOPK, 0.5), np.array([3, 9], np.float32)))
    weights.apply(pushed(1, {}, codec=TOPK, blocks=(1,), ranges=(2,), buffers=(spans, payload)), 1)
    assert [0, 1, 9] == values(weights)[1]

    push = pushed(1, {}, **coded(TOPK, [0, 5], [0, 0, 2]))
    weights.collect(push)
    (kept,) = weights._collected[1]
    assert (RAW, 8 + 12) == (kept.codec, sum(map(len, kept.buffers)))
    weights.contribute(push, 0)
    weights.close_step()
    assert [[-127, 250], [0, 1, 11]] == values(weights)


def test_what_a_message_decodes_to_is_bounded(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of topk name whole blocks: of those a message has no more than if it were raw, or one (SPEC §12.10)."""
    monkeypatch.setattr("shoal.ps.weights.PART_BYTES", 8)
    with pytest.raises(Misfit, match="before its codec") as refused:
        weights.apply(pushed(1, {}, **coded(TOPK, [0, 5], [0, 0, 2])), 1)
    assert "shape" == refused.value.code
    weights.apply(pushed(1, {}, codec=TOPK, blocks=(1,), buffers=(bytes(4) + floats(7),)), 1)

    assert [[1, 1], [7, 0, 0]] == values(weights)


@pytest.mark.parametrize("span", [(0, 2**32 - 1), (2, 1), (0, 4)])
def test_no_memory_is_taken_for_ranges_that_cannot_be(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, span: tuple[int, int]
) -> None:
    """Eight bytes of topk may not ask for sixteen gigabytes: ranges are looked at before anything is decoded."""
    monkeypatch.setattr("shoal.ps.weights.decode", None)
    buffers = (np.array(span, "<u4").tobytes(), bytes(8))
    with pytest.raises(Misfit, match="the range"):
        weights.apply(pushed(1, {}, codec=TOPK, blocks=(1,), ranges=(1,), buffers=buffers), 1)
