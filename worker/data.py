"""Leased partitions of a data set, as an iterator of batches (SPEC §9).

Rules
- The coordinator leases ranges of an epoch's order; the data itself stays with the workers and is never sent.
- A range is reported done when every update made while working on it is acknowledged.
- A worker without data is counted out of the clocks, and begins again with fresh weights.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import ConfigError
from . import calls
from .arrays import is_torch
from .calls import Federated, Lease
from .rounds import passes

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
        self._length, self._take = reader(data)
        if size is None:
            size = max(1, -(-self._length // (PARTITIONS * batch_size))) * batch_size
        elif size % batch_size:
            raise ConfigError(f"partition_size {size} is not a multiple of batch_size {batch_size}")
        self._worker, self._name = worker, name
        self._batch, self._epochs, self._size = batch_size, epochs, size
        self._seed = seed if shuffle else None
        self._until = self._epoch = 0
        """Epochs that are wanted, and those that are complete for all that is known here."""
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return -(-self._length // self._batch) * self._epochs

    def __iter__(self) -> Iterator[Any]:
        self._epoch, self._until = self._until, self._until + self._epochs
        worker = self._worker
        while True:
            if worker._core.federated:
                yield from self._passes()
            else:
                yield from self._leases()
            if self._epoch >= self._until:
                return self._rest()

    def _leases(self) -> Iterator[Any]:
        """Until all epochs are complete, or data are not leased any more."""
        worker = self._worker
        data = (self._name, self._length, self._batch, self._size, self._seed or 0, self._epoch)
        worker._loop.result(worker._loop.call(calls.DeclareCalled, *data), None)
        while isinstance(lease := self._claim(), Lease):
            self._epoch = max(self._epoch, lease.epoch)
            yield from self._batches(lease)
            if worker._core.federated:
                return
        if lease is None:
            self._epoch = self._until

    def _claim(self) -> Lease | Federated | None:
        """The next range, or None when all epochs are complete. Comes back counted in, with fresh weights if it was not."""
        worker, started = self._worker, time.perf_counter()
        lease: Lease | Federated | None
        lease = worker._loop.result(worker._loop.call(calls.ClaimCalled, self._name, self._until), None)
        if isinstance(lease, Federated):
            worker._loop.tell(calls.PauseCalled())
        elif lease is not None and worker._exchange.cache is not None and not worker._core.fleet.running:
            worker._be_counted_in(None)
            worker._refresh()
        worker._core.stats.seconds["data"] += time.perf_counter() - started
        return lease

    def _rest(self) -> None:
        """No data is left: hold nobody up, and end with the weights that all finished steps have made."""
        worker = self._worker
        if worker._exchange.cache is not None:
            worker._loop.tell(calls.PauseCalled())
            worker._refresh()
            for evaluator in worker._evaluators:
                evaluator.conclude()

    def _passes(self) -> Iterator[Any]:
        """A pass over this worker's own data in each round, until so many are complete, or there are no more."""
        trainer = self._worker._trainer
        if not trainer.arrays:
            raise ConfigError(
                "in federated mode a worker trains by itself, and this one has no model",
                hint="worker.optimizer(opt, model), or worker.rounds(model) in place of partition",
            )
        before, left = trainer.completed, self._until - self._epoch
        yield from passes(trainer, left, self._pass, self._length)
        done = min(left, max(0, trainer.completed - before))
        self._until -= done
        if self._worker._core.federated:  # as many as were wanted, here or there
            self._epoch = self._until

    def _pass(self, number: int) -> Iterator[Any]:
        order = self._order_of(self._worker.number, number)
        for start in range(0, self._length, self._batch):
            yield self._take(order[start : start + self._batch])

    def _batches(self, lease: Lease) -> Iterator[Any]:
        worker, done = self._worker, 0
        try:
            for start in range(lease.start, lease.stop, self._batch):
                if worker.incarnation != lease.incarnation or worker._core.federated:
                    return  # evicted: the range is somebody else's by now; or nothing is leased any more
                stop = min(start + self._batch, lease.stop)
                worker._examples += stop - start
                yield self._take(self._indices(lease.epoch)[start:stop])
                done = stop - lease.start
                worker._loop.tell(calls.DoneCalled(lease, done, stop == lease.stop))
                for evaluator in worker._evaluators:
                    evaluator.step()
        finally:
            if done < lease.stop - lease.start:
                worker._loop.tell(
                    calls.DoneCalled(lease, done, True)
                )  # the loop was left early: the rest is free again

    def _indices(self, epoch: int) -> np.ndarray[Any, Any]:
        """The epoch's order (SPEC §9.2)."""
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return self._order[1]

    def _order_of(self, *which: int) -> np.ndarray[Any, Any]:
        if self._seed is None:
            return np.arange(self._length)
        return np.random.default_rng([self._seed, zlib.crc32(self._name.encode()), *which]).permutation(self._length)


def reader(data: Any) -> tuple[int, Callable[[np.ndarray[Any, Any]], Any]]:
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
