"""Leased partitions against a real coordinator: what batches look like, and that all data is seen (rungs T0, T3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import until
from test_sync import together

import shoal


@pytest.fixture(scope="module")
def worker() -> Iterator[shoal.Worker]:
    """A worker without a model: data needs none."""
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as made:
        yield made


class Squares(torch.utils.data.Dataset[dict[str, Any]]):
    """A torch Dataset of dicts."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.tensor([float(index)]), "y": index * index}


def test_arrays_give_arrays(worker: shoal.Worker) -> None:
    """A tuple of arrays gives tuples of arrays, an array gives arrays, torch gives torch; rows stay together."""
    x, y = np.arange(20).reshape(10, 2), torch.arange(10)
    batches = list(worker.partition((x, y), batch_size=4))

    assert [4, 4, 2] == sorted((len(a) for a, _ in batches), reverse=True)
    for a, b in batches:
        assert isinstance(a, np.ndarray)
        assert isinstance(b, torch.Tensor)
        assert (a[:, 0] // 2 == b.numpy()).all()
    assert sorted(range(10)) == sorted(torch.cat([b for _, b in batches]).tolist())
    assert isinstance(next(iter(worker.partition(x, batch_size=10))), np.ndarray)


def test_a_dataset_is_collated(worker: shoal.Worker) -> None:
    """A torch Dataset is collated as a DataLoader would."""
    batches = list(worker.partition(Squares(), batch_size=5))

    assert all((b["x"][:, 0] ** 2 == b["y"]).all() for b in batches)
    assert [5, 5] == [len(b["y"]) for b in batches]


def test_any_sequence_gives_lists(worker: shoal.Worker) -> None:
    """A list of anything gives lists."""
    words = [f"word{i}" for i in range(7)]
    batches = list(worker.partition(words, batch_size=3))

    assert all(isinstance(batch, list) for batch in batches)
    assert sorted(words) == sorted(word for batch in batches for word in batch)


def test_epochs_go_on(worker: shoal.Worker) -> None:
    """`len` counts the batches of all epochs; each epoch has its own order; iterating again gives the next epochs."""
    part = worker.partition(np.arange(12), batch_size=4, partition_size=12, epochs=2, seed=5)
    first, second = list(part), list(part)

    assert 6 == len(part) == len(first) == len(second)
    orders = [np.concatenate(run[i : i + 3]).tolist() for run in (first, second) for i in (0, 3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert 4 == len({tuple(order) for order in orders})


def test_order_comes_from_the_seed(worker: shoal.Worker) -> None:
    """The same seed and name give the same order, another seed another one, and no shuffling gives the data's own."""
    data = np.arange(30)

    def order(**how: Any) -> list[int]:
        return [int(v) for batch in worker.partition(data, batch_size=30, **how) for v in batch]

    assert list(range(30)) == order(shuffle=False)
    assert order(seed=1, name="a") != order(seed=2, name="b")
    expected = np.random.default_rng([7, __import__("zlib").crc32(b"c"), 0]).permutation(30).tolist()
    assert expected == order(seed=7, name="c")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda w: w.partition(iter([1, 2]), batch_size=1), "has no length"),
        (lambda w: w.partition(torch.utils.data.DataLoader(Squares()), batch_size=1), "give its dataset"),
        (lambda w: w.partition((np.zeros(3), np.zeros(4)), batch_size=1), r"lengths \[3, 4\]"),
        (lambda w: w.partition(np.zeros(3), batch_size=0), "batch_size is 0"),
        (lambda w: w.partition(np.zeros(3), batch_size=2, epochs=-1), "epochs is -1"),
        (lambda w: w.partition(np.zeros(9), batch_size=2, partition_size=3), "not a multiple"),
    ],
)
def test_what_cannot_be_partitioned(worker: shoal.Worker, make: Any, told: str) -> None:
    """Each mistake has its own words."""
    with pytest.raises(shoal.ConfigError, match=told):
        make(worker)


def test_an_empty_data_set_ends_at_once(worker: shoal.Worker) -> None:
    """No examples, no batches."""
    assert [] == list(worker.partition(np.zeros((0, 3)), batch_size=4))


def test_two_workers_cover_everything_once() -> None:
    """Two workers see each example of each epoch once; with other data, the second is told what differs."""
    seen: Counter[int] = Counter()
    with shoal.LocalCluster(min_workers=2) as cluster:

        def work() -> None:
            with shoal.connect(cluster.join) as worker:
                for batch in worker.partition(np.arange(97), batch_size=5, epochs=3, name="numbers"):
                    seen.update(batch.tolist())
                with pytest.raises(shoal.ShapeError, match="97 examples for the worker that came first, 98 here"):
                    list(worker.partition(np.arange(98), batch_size=5, name="numbers"))

        together([work, work])

        assert dict.fromkeys(range(97), 3) == dict(seen)


def test_a_loop_left_early_gives_its_data_back() -> None:
    """A worker that breaks out of its loop does not keep its range: another one does the rest."""
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as early, shoal.connect(cluster.join) as late:
        data = np.arange(40)
        for batch in early.partition(data, batch_size=5, partition_size=20):
            first = batch
            break
        rest = np.concatenate(list(late.partition(data, batch_size=5, partition_size=20)))

        # The batch in hand when the loop was left is not known to be done, so it is given out again.
        assert set(range(40)) == set(rest.tolist()) | set(first.tolist())
        (job,) = cluster.status()["data"]
        assert 1 == job["lost"] == job["re_leased"]


def test_an_idle_worker_holds_nobody_up() -> None:
    """A worker that waits for data is counted out; the one that has it steps on, also with staleness 0."""
    with (
        shoal.LocalCluster(staleness=0, min_workers=2) as cluster,
        shoal.connect(cluster.join, name="busy") as busy,
        shoal.connect(cluster.join, name="idle") as idle,
    ):
        together([lambda w=w: w.register({"w": np.zeros(1)}, optimizer=shoal.Delta()) for w in (busy, idle)])  # type: ignore[misc]
        mine = iter(busy.partition(np.arange(8), batch_size=1, partition_size=8))
        next(mine)

        def wait_for_data() -> None:
            assert [] == list(idle.partition(np.arange(8), batch_size=1, partition_size=8))

        def step_on() -> None:
            until(lambda: not idle._core.fleet.active)
            for _ in range(8):
                busy.push({"w": np.ones(1)})
                busy.clock()
                busy.pull(timeout=10)
                next(mine, None)

        together([wait_for_data, step_on])

        assert 8.0 == float(idle.pull()["w"][0])
