"""One small model learns what several large ones say (Hinton, Vinyals and Dean 2015): soft targets, and the loss towards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..protocol.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    import torch


def soft_targets(logits: Sequence[torch.Tensor], temperature: float = 2.0) -> torch.Tensor:
    """What teachers say together: the mean of their probabilities at this temperature.

    Args:
        logits: of each teacher, `(inputs, classes)`. temperature: above 0; 1 leaves them as they are, more shows what is similar.

    Raises:
        ShapeError: there are none, or they differ in shape. ConfigError: a temperature that is not above 0.
    """
    if not logits or any(each.shape != logits[0].shape or each.ndim != 2 for each in logits):
        raise ShapeError("teachers whose logits do not fit each other", hint="(inputs, classes) of each")
    if not temperature > 0:
        raise ConfigError(f"a temperature of {temperature}")
    import torch

    with torch.no_grad():
        return torch.stack([torch.softmax(each / temperature, 1) for each in logits]).mean(0)


def loss(
    student: torch.Tensor,
    targets: torch.Tensor,
    truth: torch.Tensor | None = None,
    temperature: float = 2.0,
    share: float = 0.9,
) -> torch.Tensor:
    """How far a student is from its teachers, and from the truth where it is known.

    Args:
        student: logits, `(inputs, classes)`. targets: of `soft_targets`, at the same temperature.
        truth: numbers of the right classes, or None: then the teachers alone count. share: of the teachers, 0 to 1.

    Returns:
        A scalar: cross entropy towards the targets, times the square of the temperature so that its gradients keep their size, and
        cross entropy towards the truth.

    Raises:
        ShapeError: student and targets differ in shape. ConfigError: a share that is none.
    """
    if student.shape != targets.shape:
        raise ShapeError(f"a student of shape {list(student.shape)} and targets of {list(targets.shape)}")
    if not 0 <= share <= 1:
        raise ConfigError(f"a share of {share}", hint="from 0, the truth alone, to 1, the teachers alone")
    from torch.nn import functional

    soft = -(targets * functional.log_softmax(student / temperature, 1)).sum(1).mean() * temperature**2
    return soft if truth is None else share * soft + (1 - share) * functional.cross_entropy(student, truth)
