"""A data set cut into the parts of simulated owners: `shoal.split` (for examples and tests of federated rounds).

Rules
- Every example is in exactly one part; the same seed gives the same parts everywhere.
- No owner is left without data: what cannot be is an error, not an empty part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..protocol.errors import ConfigError
from .data import reader


def split(
    data: Any,
    owners: int,
    *,
    by: Any = None,
    alpha: float | None = None,
    least: int = 1,
    seed: int = 0,
) -> list[Any]:
    """The parts of so many owners.

    Args:
        data: as `Worker.partition` takes it: a tuple of arrays of one length, an array, a torch Dataset, any sequence.
        owners: how many parts.
        by: None for even parts in random order. Else a value for each example, such as its label or its hospital: an array or a
            sequence, or the number of one of the arrays in a tuple. Without `alpha` owner k gets the k-th value, in order.
        alpha: shares of each label are drawn from a Dirichlet distribution with this concentration (Hsu et al. 2019): 0.1 gives
            owners few labels each, 100 nearly even parts.
        least: examples that each owner must have; with `alpha` it is given them by who has most.
        seed: of everything that is drawn.

    Returns:
        For arrays the same kinds of arrays; for a Dataset a `torch.utils.data.Subset`; for another sequence a list.

    Raises:
        ConfigError: there are fewer examples than owners, as many values as `by` has do not fit the owners, or a number cannot be.
    """
    length, _ = reader(data)
    if type(owners) is not int or owners < 1 or least < 1 or owners * least > length:
        raise ConfigError(f"{length} examples cannot be split among {owners} owners with at least {least} each")
    draw = np.random.default_rng(seed)
    if by is None:
        if alpha is not None:
            raise ConfigError("alpha skews labels, and there are none", hint="split(data, owners, by=labels, alpha=…)")
        chosen = np.array_split(draw.permutation(length), owners)
    else:
        labels = _values(data, by, length)
        chosen = _by_value(labels, owners) if alpha is None else _dirichlet(labels, owners, alpha, least, draw)
    short = min(range(owners), key=lambda owner: len(chosen[owner]))
    if len(chosen[short]) < least:
        raise ConfigError(f"owner {short} would have {len(chosen[short])} examples, and {least} are the least")
    return [_take(data, np.sort(indices)) for indices in chosen]


def _values(data: Any, by: Any, length: int) -> np.ndarray[Any, Any]:
    """A small number for each example's value, in order of values."""
    if isinstance(by, int):
        if not isinstance(data, tuple) or not -len(data) <= by < len(data):
            raise ConfigError(f"by is {by}, and the data are no tuple of more arrays than that")
        by = data[by]
    values = np.asarray(by)
    if values.shape != (length,):
        raise ConfigError(f"by has shape {values.shape}, and there are {length} examples")
    return np.unique(values, return_inverse=True)[1]


def _by_value(labels: np.ndarray[Any, Any], owners: int) -> list[np.ndarray[Any, Any]]:
    count = int(labels.max()) + 1
    if count != owners:
        raise ConfigError(
            f"by has {count} different values, and there are {owners} owners", hint=f"owners={count}, or alpha=…"
        )
    return [np.flatnonzero(labels == owner) for owner in range(owners)]


def _dirichlet(
    labels: np.ndarray[Any, Any], owners: int, alpha: float, least: int, draw: np.random.Generator
) -> list[np.ndarray[Any, Any]]:
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha is {alpha}", hint="0.1 for owners that differ much, 100 for owners that hardly do")
    groups = [draw.permutation(np.flatnonzero(labels == label)) for label in range(int(labels.max()) + 1)]
    shares = draw.dirichlet(np.full(owners, alpha), len(groups))
    cuts = [
        np.floor(np.cumsum(share)[:-1] * len(group)).astype(int) for share, group in zip(shares, groups, strict=True)
    ]
    pieces = [np.split(group, cut) for group, cut in zip(groups, cuts, strict=True)]
    parts = [np.concatenate([piece[owner] for piece in pieces]) for owner in range(owners)]
    for owner in range(owners):  # who has too few is given some of who has most
        while len(parts[owner]) < least:
            rich = max(range(owners), key=lambda other: len(parts[other]))
            parts[owner], parts[rich] = np.append(parts[owner], parts[rich][-1]), parts[rich][:-1]
    return parts


def _take(data: Any, indices: np.ndarray[Any, Any]) -> Any:
    if isinstance(data, tuple):
        return tuple(_take(part, indices) for part in data)
    if isinstance(data, np.ndarray):
        return data[indices]
    if hasattr(data, "index_select"):  # a torch tensor
        return data[indices.tolist()]
    if isinstance(data, list | str | range):
        return [data[index] for index in indices.tolist()]
    from torch.utils.data import Dataset, Subset

    return Subset(data, indices.tolist()) if isinstance(data, Dataset) else [data[index] for index in indices.tolist()]
