"""Leased partitions of a data set, as an iterator of batches (SPEC §9).

Rules
- The coordinator leases ranges of an epoch's order; the data itself stays with the workers and is never sent.
- A range is reported done when every update made while working on it is acknowledged.
- A worker without data is counted out of the clocks, and begins again with fresh weights.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import ConfigError
from .arrays import is_torch
from .calls import Lease

if TYPE_CHECKING:
    from .client import Worker

MAX_NAME = 128
PARTITIONS = 32
"""Partitions that an epoch is cut into unless the caller says otherwise."""


class Partition:
    """Batches of a data set that all workers share; made by `Worker.partition`.

    Iterating again goes on with the next epochs. `len()` is the number of batches if this worker did them all.
    """

    def __init__(
        self,
        worker: Worker,
        data: Any,
        batch_size: int,
        epochs: int,
        shuffle: bool,
        seed: int,
        size: int | None,
        name: str,
    ) -> None:
        for what, value in (
            ("batch_size", batch_size),
            ("epochs", epochs),
            ("partition_size", 1 if size is None else size),
        ):
            if not isinstance(value, int) or not 1 <= value < 2**32:
                raise ConfigError(f"{what} is {value!r}, not a whole number from 1 to 4294967295")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"seed is {seed!r}, not a whole number from 0 to 2**63 - 1")
        if len(name) > MAX_NAME:
            raise ConfigError(f"the name of a data set has at most {MAX_NAME} characters")
        self._length, self._take = _reader(data)
        if size is None:
            size = max(1, -(-self._length // (PARTITIONS * batch_size))) * batch_size
        elif size % batch_size:
            raise ConfigError(f"partition_size {size} is not a multiple of batch_size {batch_size}")
        self._worker, self._name = worker, name
        self._batch, self._epochs, self._size = batch_size, epochs, size
        self._seed = seed if shuffle else None
        self._until = 0
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return -(-self._length // self._batch) * self._epochs

    def __iter__(self) -> Iterator[Any]:
        self._until += self._epochs
        worker = self._worker
        worker._declare(self._name, self._length, self._batch, self._size, self._seed or 0, self._until - self._epochs)
        while (lease := worker._claim(self._name, self._until)) is not None:
            yield from self._batches(lease)
        worker._rest()

    def _batches(self, lease: Lease) -> Iterator[Any]:
        worker, done = self._worker, 0
        try:
            for start in range(lease.start, lease.stop, self._batch):
                if worker.incarnation != lease.incarnation:
                    return  # evicted: the range is somebody else's by now
                stop = min(start + self._batch, lease.stop)
                worker._batch_begins(stop - start)
                yield self._take(self._indices(lease.epoch)[start:stop])
                done = stop - lease.start
                worker._processed(lease, done, over=stop == lease.stop)
        finally:
            if done < lease.stop - lease.start:
                worker._processed(lease, done, over=True)  # the loop was left early: the rest is free again

    def _indices(self, epoch: int) -> np.ndarray[Any, Any]:
        """The epoch's order (SPEC §9.2)."""
        if self._order[0] != epoch:
            if self._seed is None:
                order = np.arange(self._length)
            else:
                order = np.random.default_rng([self._seed, zlib.crc32(self._name.encode()), epoch]).permutation(
                    self._length
                )
            self._order = (epoch, order)
        return self._order[1]


def _reader(data: Any) -> tuple[int, Callable[[np.ndarray[Any, Any]], Any]]:
    """(number of examples, how to take some of them by index)."""
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is not None and isinstance(data, torch_data.DataLoader):
        raise ConfigError(
            "partition was given a DataLoader", hint="give its dataset: partition(loader.dataset, batch_size=…)"
        )
    if isinstance(data, tuple) and data and all(_is_array(part) for part in data):
        lengths = {len(part) for part in data}
        if len(lengths) != 1:
            raise ConfigError(f"the arrays of the data set have lengths {sorted(lengths)}")
        return lengths.pop(), lambda indices: tuple(_pick(part, indices) for part in data)
    if _is_array(data):
        return len(data), lambda indices: _pick(data, indices)
    try:
        length = len(data)
    except TypeError:
        raise ConfigError(
            f"a {type(data).__name__} has no length, so it cannot be partitioned",
            hint="a Dataset, arrays or a sequence",
        ) from None
    if torch_data is not None and isinstance(data, torch_data.Dataset):
        collate = torch_data.default_collate
        if hasattr(data, "__getitems__"):
            return length, lambda indices: collate(data.__getitems__(indices.tolist()))
        return length, lambda indices: collate([data[i] for i in indices.tolist()])
    return length, lambda indices: [data[i] for i in indices.tolist()]


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray) or is_torch(data)


def _pick(array: Any, indices: np.ndarray[Any, Any]) -> Any:
    if isinstance(array, np.ndarray):
        return array[indices]
    import torch

    return array[torch.from_numpy(indices)]
