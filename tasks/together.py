"""Several versions on one task: their outputs become one (pure; numpy alone).

Rules
- An output is an array with an entry for each input: a number, or a row of scores by class. All outputs of a task have one shape.
- Whoever is not sure says so by its scores: confidence is the largest of a row of probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..protocol.errors import ShapeError

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

RIDGE = 1e-3
"""Of a stack: how much its weights are drawn to equal ones, as a share of the outputs' mean square."""


def mean(outputs: Sequence[Array]) -> Array:
    """The plain average.

    Raises:
        ShapeError: there are none, or they differ in shape.
    """
    return weighted(outputs, [1.0] * len(outputs))


def weighted(outputs: Sequence[Array], weights: Sequence[float]) -> Array:
    """The average by weights, such as what is believed of each version's quality.

    Raises:
        ShapeError: as many weights as outputs there are not, or none is above 0.
    """
    stacked = _stacked(outputs)
    given = np.asarray(weights, np.float64)
    if len(given) != len(outputs) or not (given >= 0).all() or not given.sum() > 0 or not np.isfinite(given).all():
        raise ShapeError(f"{len(given)} weights for {len(outputs)} outputs; each is 0 or more, and one is above 0")
    found: Array = np.tensordot(given / given.sum(), stacked, 1)
    return found


def vote(outputs: Sequence[Array], weights: Sequence[float] | None = None) -> Array:
    """The class that most versions have as their first, for each input; of equal ones that with the higher mean score.

    Args:
        outputs: scores by class, `(inputs, classes)`. weights: how much each version's vote counts; by default 1.

    Returns:
        Numbers of classes, int64, `(inputs,)`.

    Raises:
        ShapeError: these are no scores by class, or the weights do not fit.
    """
    stacked = _stacked(outputs)
    if stacked.ndim != 3:
        raise ShapeError(
            f"a vote is about classes, and outputs are of shape {list(stacked.shape[1:])}", hint="mean, for numbers"
        )
    counts = np.ones(len(outputs)) if weights is None else np.asarray(weights, np.float64)
    if len(counts) != len(outputs):
        raise ShapeError(f"{len(counts)} weights for {len(outputs)} outputs")
    votes = np.zeros(stacked.shape[1:])
    rows = np.arange(stacked.shape[1])
    for scores, count in zip(stacked, counts, strict=True):
        votes[rows, scores.argmax(1)] += count
    ties = votes == votes.max(1, keepdims=True)
    found: Array = np.where(ties, stacked.mean(0), -np.inf).argmax(1)
    return found


@dataclass(frozen=True)
class Stack:
    """Weights of versions that were learned from what was right (Wolpert 1992; linear, as Breiman 1996): `fit` makes one.

    Attributes:
        weights: of each version, in the order of the outputs; they may be negative, and need not add up to 1.
    """

    weights: tuple[float, ...]

    @classmethod
    def fit(cls, outputs: Sequence[Array], truth: Array) -> Stack:
        """Least squares, drawn a little to equal weights: a version that is a copy of another does not upset it.

        Args:
            outputs: on inputs that none of the versions was trained on.
            truth: of the same shape; or the numbers of the right classes.

        Raises:
            ShapeError: the truth is not of the outputs' inputs.
        """
        stacked = _stacked(outputs)
        wanted = np.asarray(truth)
        if stacked.ndim == 3 and wanted.ndim == 1 and wanted.dtype.kind in "iu":
            if (
                len(wanted) != stacked.shape[1]
                or not 0 <= wanted.min(initial=0) <= wanted.max(initial=0) < stacked.shape[2]
            ):
                raise ShapeError(f"{len(wanted)} classes as truth for outputs of shape {list(stacked.shape[1:])}")
            wanted = np.eye(stacked.shape[2])[wanted]
        if wanted.shape != stacked.shape[1:]:
            raise ShapeError(f"truth of shape {list(wanted.shape)} for outputs of shape {list(stacked.shape[1:])}")
        columns = stacked.reshape(len(outputs), -1).T.astype(np.float64)
        equal = np.full(len(outputs), 1.0 / len(outputs))
        drawn = RIDGE * float(np.mean(columns**2)) * len(columns)
        gram = columns.T @ columns + drawn * np.eye(len(outputs))
        rest = wanted.reshape(-1) - columns @ equal
        found = equal + np.linalg.solve(gram, columns.T @ rest) if drawn > 0 else equal
        return cls(tuple(map(float, found)))

    def __call__(self, outputs: Sequence[Array]) -> Array:
        """One output of these."""
        stacked = _stacked(outputs)
        if len(outputs) != len(self.weights):
            raise ShapeError(f"a stack of {len(self.weights)} versions was given {len(outputs)} outputs")
        found: Array = np.tensordot(np.asarray(self.weights), stacked, 1)
        return found


@dataclass(frozen=True)
class Cascade:
    """A cheap version first, the next when it is not sure: `calibrate` finds from which confidence on it is trusted.

    Attributes:
        threshold: the least confidence, above 1 where the cheap version is never sure enough.
        share: of the inputs it was calibrated on, how much the cheap version keeps. accuracy: of those that it keeps.
    """

    threshold: float
    share: float
    accuracy: float

    @classmethod
    def calibrate(cls, scores: Array, truth: Array, accuracy: float) -> Cascade:
        """The lowest threshold at which what is kept is right so often.

        Args:
            scores: probabilities by class, `(inputs, classes)`, of inputs that the version was not trained on.
            truth: numbers of the right classes. accuracy: of what is kept, 0 to 1.

        Raises:
            ShapeError: the truth is not of these inputs.
        """
        if scores.ndim != 2 or len(truth) != len(scores) or not len(scores):
            raise ShapeError(f"{len(truth)} truths for scores of shape {list(scores.shape)}")
        sure, right = scores.max(1), scores.argmax(1) == np.asarray(truth)
        order = np.argsort(-sure, kind="stable")
        kept = np.arange(1, len(order) + 1)
        good = np.cumsum(right[order]) / kept
        last = np.r_[sure[order][1:] != sure[order][:-1], True]  # inputs of one confidence are kept together
        able = np.flatnonzero((good >= accuracy) & last)
        if not len(able):
            return cls(float(np.nextafter(1.0, 2.0)), 0.0, 0.0)
        end = able[-1]
        return cls(float(sure[order][end]), float(kept[end] / len(order)), float(good[end]))

    def unsure(self, scores: Array) -> Array:
        """The numbers of the inputs that the next version is asked about."""
        found: Array = np.flatnonzero(scores.max(1) < self.threshold)
        return found

    @staticmethod
    def join(scores: Array, unsure: Array, others: Array) -> Array:
        """The first version's scores, but the next one's where it was asked.

        Raises:
            ShapeError: they do not fit.
        """
        if others.shape != (len(unsure), *scores.shape[1:]):
            raise ShapeError(f"scores of shape {list(others.shape)} for {len(unsure)} inputs")
        found: Array = scores.copy()
        found[unsure] = others
        return found


def _stacked(outputs: Sequence[Array]) -> Array:
    if not outputs or any(each.shape != outputs[0].shape for each in outputs) or not outputs[0].ndim:
        shapes = ", ".join(str(list(each.shape)) for each in outputs) or "none"
        raise ShapeError(f"outputs that do not fit each other: {shapes}")
    return np.stack([np.asarray(each) for each in outputs])
