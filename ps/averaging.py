"""Sync mode's average of one step: the workers' gradients, weighted by examples (SPEC §6.3).

Rules
- A worker counts when its step is complete: all of it, or nothing of it.
- The mean is over all examples of the step, also for a block that some workers did not push: as one process would compute on the
  concatenated batch, where those examples have gradient zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rules import Ranges


@dataclass(slots=True)
class _Sum:
    """`total` holds the sum of `examples · gradient`; while one worker has contributed, its plain gradient."""

    total: torch.Tensor
    dtype: torch.dtype
    alone: float | None
    ranges: list[tuple[int, int]] | None


class StepAverage:
    """Collects one step."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sum] = {}
        self._examples = 0.0
        self._hyper: tuple[int, tuple[tuple[float, ...], ...]] | None = None

    @property
    def hyper(self) -> tuple[tuple[float, ...], ...]:
        """The hyperparameters of the contributor with the lowest rank."""
        return self._hyper[1] if self._hyper else ()

    def add(self, block: int, elements: int, gradient: torch.Tensor, ranges: Ranges | None, examples: float) -> None:
        """A mean gradient over `examples` examples. `gradient` may be a view of a buffer that lives on."""
        if ranges is not None:
            whole = torch.zeros(elements, dtype=gradient.dtype)
            at = 0
            for start, stop in ranges:
                whole[start:stop] = gradient[at : at + stop - start]
                at += stop - start
            gradient = whole
        held = self._sums.get(block)
        if held is None:
            self._sums[block] = _Sum(gradient, gradient.dtype, examples, None if ranges is None else list(ranges))
            return
        if held.alone is not None:
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            held.total = held.total.to(wide, copy=True).mul_(held.alone)
            held.alone = None
        held.total.add_(gradient, alpha=examples)
        held.ranges = None if held.ranges is None or ranges is None else _union(held.ranges, ranges)

    def finish(self, examples: float, rank: int, hyper: tuple[tuple[float, ...], ...]) -> None:
        """One worker's step is complete."""
        self._examples += examples
        if examples and (self._hyper is None or rank < self._hyper[0]):
            self._hyper = (rank, hyper)

    def means(self) -> list[tuple[int, torch.Tensor, Ranges | None]]:
        """Each block's mean gradient, and which part of it was pushed by anybody."""
        found: list[tuple[int, torch.Tensor, Ranges | None]] = []
        for block, held in self._sums.items():
            mean = held.total
            if held.alone != self._examples:
                scale = (1.0 if held.alone is None else held.alone) / self._examples
                mean = mean * scale
            mean = mean.to(held.dtype)
            if held.ranges is not None:
                mean = torch.cat([mean[start:stop] for start, stop in held.ranges])
            found.append((block, mean, held.ranges))
        return found


def _union(mine: Ranges, other: Ranges) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted([*mine, *other]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
