"""Sync mode's average: what one process computes on the concatenated batch (rung T0, SPEC §6.3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ps.averaging import StepAverage

SIZE = 8
spans = st.lists(st.integers(0, SIZE), min_size=2, max_size=6, unique=True).map(sorted)
ranges = st.none() | spans.map(lambda cuts: list(zip(cuts[::2], cuts[1::2], strict=False)))
pushes = st.tuples(st.integers(0, 1), ranges, st.integers(0, 2**31))
steps = st.lists(st.tuples(st.lists(pushes, max_size=3), st.integers(1, 50)), min_size=1, max_size=5)


def numbers(count: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(deadline=None, max_examples=200)
@given(steps)
def test_the_mean_is_over_all_examples(workers: list[tuple[list[Any], int]]) -> None:
    """Each worker's gradients count by its examples; whoever did not push an element counts as zero there; others are untouched."""
    average, total = StepAverage(), float(sum(examples for _, examples in workers))
    sums = torch.zeros(2, SIZE, dtype=torch.float64)
    touched = torch.zeros(2, SIZE, dtype=torch.bool)
    kept = []
    for found, examples in workers:
        for block, part, seed in found:
            mask = torch.zeros(SIZE, dtype=torch.bool)
            for start, stop in [(0, SIZE)] if part is None else part:
                mask[start:stop] = True
            gradient = numbers(int(mask.sum()), seed)
            kept.append((gradient, gradient.clone()))
            average.add(block, SIZE, gradient, part, float(examples))
            sums[block][mask] += examples * gradient
            touched[block] |= mask
        average.finish(float(examples), 0, ())

    means = {block: (mean, part) for block, mean, part in average.means()}
    assert all(torch.equal(before, gradient) for gradient, before in kept), (
        "the senders' buffers are not ours to change"
    )
    assert set(means) == {block for found, _ in workers for block, _, _ in found}
    for block, (mean, part) in means.items():
        mask = torch.zeros(SIZE, dtype=torch.bool)
        for start, stop in [(0, SIZE)] if part is None else part:
            assert not mask[max(0, start - 1) : stop].any(), "the ranges touch or are out of order"
            mask[start:stop] = True
        assert torch.equal(touched[block], mask)
        torch.testing.assert_close(mean, (sums[block] / total)[mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """Narrow gradients are summed in float32 and given back as they came: a thousand small ones are not lost beside a large one."""
    average = StepAverage()
    for value in [1.0] + [2.0**-12] * 1024:
        average.add(0, 1, torch.full((1,), value, dtype=dtype), None, 4.0)
        average.finish(4.0, 0, ())

    ((_, mean, part),) = average.means()
    assert (dtype, None) == (mean.dtype, part)
    torch.testing.assert_close(mean, torch.full((1,), 1.25 / 1025, dtype=dtype))


def test_a_gradient_over_no_examples_adds_nothing() -> None:
    """Each push adds `examples · gradient`: 0 of them add 0, also where the step has examples (SPEC §6.3)."""
    average = StepAverage()
    average.add(0, 1, torch.ones(1), None, 0.0)
    average.finish(2.0, 0, ())

    ((_, mean, _),) = average.means()
    assert 0.0 == float(mean)
