"""Weights: filling, applying, averaging a step; a push is checked whole before any of it counts (rung T0, SPEC §4.3, §6.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cores import floats

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
    return replace(Push(worker, 9, 1, 0, True, 1.0, (), 0, tuple(parts), counts, 0, tuple(buffers)), **other)


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
