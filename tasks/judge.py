"""How good an output is, by what was right: a reward from 0 to 1, for feedback that names the truth and no reward.

Rules
- Classes are right or wrong; of several inputs the share that is right counts.
- Numbers have no natural reward: who predicts them says one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..protocol.errors import ShapeError


def reward(outputs: Any, truth: Any) -> float:
    """The share of inputs that are right.

    Args:
        outputs: scores by class, `(inputs, classes)`, of which the largest is the answer; numbers of classes or booleans,
            `(inputs,)`; or probabilities of the second of two classes, `(inputs,)`. truth: numbers of classes, `(inputs,)`.

    Raises:
        ShapeError: these are none, or not of the same inputs.
    """
    said, right = np.asarray(outputs), np.asarray(truth)
    if said.ndim == 2 and said.shape[1] == 1:
        said = said[:, 0]
    if right.ndim == 2 and right.shape[1] == 1:
        right = right[:, 0]
    if right.dtype.kind == "f" and np.array_equal(right, np.rint(right)):
        right = right.astype(np.int64)
    if right.dtype.kind not in "iub" or said.dtype.kind not in "iubf" or said.ndim not in (0, 1, 2):
        raise ShapeError("these outputs cannot be compared with the truth as classes", hint="feedback(…, reward=…)")
    if said.ndim == 2:
        said = said.argmax(1)
    elif said.dtype.kind == "f":
        if said.size and not (said.min() >= 0 and said.max() <= 1):
            raise ShapeError("outputs that are neither classes nor probabilities", hint="feedback(…, reward=…)")
        said = said >= 0.5
    if said.shape != right.shape:
        raise ShapeError(f"{said.shape} outputs and {right.shape} truths")
    return float((said == right).mean()) if said.size else 0.0
