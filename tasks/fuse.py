"""Several versions become one by averaging their weights (model soups, Wortsman et al. 2022). Pure; torch comes with the tensors.

Rules
- Only versions of one architecture: the same names, shapes and dtypes. Floating-point tensors are averaged in float32; others
  are the first version's.
- Averaging helps versions that began alike (one parent, other data or settings). Nets that began apart lie in other valleys: their
  average is worse than any of them. So what comes out is evaluated before it is promoted, as everything is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..protocol.errors import ShapeError

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"
Evaluate = Callable[[dict[str, "torch.Tensor"]], float]
"""Of weights, on held-out data: higher is better."""


@dataclass(frozen=True)
class Soup:
    """What was made.

    Attributes:
        weights: the average. used: which of the versions are in it, by their place. quality: of it, as evaluated.
        alone: of each version.
    """

    weights: dict[str, torch.Tensor]
    used: tuple[int, ...]
    quality: float
    alone: tuple[float, ...]


def average(versions: Sequence[Tensors], shares: Sequence[float] | None = None) -> dict[str, torch.Tensor]:
    """The mean of the weights, or the weighted mean.

    Raises:
        ShapeError: there are none, they are not of one architecture, or the shares are not positive in sum.
    """
    if not versions:
        raise ShapeError("there is nothing to average")
    given = [1.0] * len(versions) if shares is None else list(shares)
    total = sum(given)
    if len(given) != len(versions) or not total > 0 or min(given) < 0:
        raise ShapeError(f"{len(given)} shares for {len(versions)} versions; each is 0 or more, and one is above 0")
    first = versions[0]
    for number, other in enumerate(versions[1:], 1):
        if first.keys() != other.keys() or any(
            (first[name].shape, first[name].dtype) != (other[name].shape, other[name].dtype) for name in first
        ):
            raise ShapeError(f"versions 0 and {number} are not of one architecture")
    found = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        mean = sum(version[name].float() * (share / total) for version, share in zip(versions, given, strict=True))
        found[name] = mean.to(tensor.dtype)  # type: ignore[union-attr]
    return found


def uniform(versions: Sequence[Tensors], evaluate: Evaluate) -> Soup:
    """All of them. Raises as `average`."""
    weights = average(versions)
    alone = tuple(evaluate(dict(version)) for version in versions)
    return Soup(weights, tuple(range(len(versions))), evaluate(weights), alone)


def greedy(versions: Sequence[Tensors], evaluate: Evaluate) -> Soup:
    """The best one, and each further one, from the best on, with which the average does not get worse. So it is never worse than
    the best, on what it is evaluated on. Raises as `average`.
    """
    average(versions)
    alone = tuple(evaluate(dict(version)) for version in versions)
    order = sorted(range(len(versions)), key=lambda number: (-alone[number], number))
    used, quality = [order[0]], alone[order[0]]
    for number in order[1:]:
        tried = evaluate(average([versions[each] for each in (*used, number)]))
        if tried >= quality:
            used.append(number)
            quality = tried
    return Soup(average([versions[each] for each in used]), tuple(sorted(used)), quality, alone)
