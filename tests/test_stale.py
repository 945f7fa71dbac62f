"""Stale gradients: how stale a push is, and what is done about it (rungs T0 and T3, SPEC §13)."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from cores import READER, ShardBench, floats, only

import shoal
from shoal.protocol import messages as m
from shoal.protocol.errors import ConfigError, ShapeError
from shoal.protocol.model import ModelSpec, Tensor
from shoal.protocol.rules import SGD, Adam, Delta, Rule
from shoal.protocol.stale import Compensate, Stale, read_option
from shoal.ps import stale as remedies
from shoal.ps.store import MOST_COUNTED

SCALE = Stale("scale")


def bench_of(stale: Stale, *rules: Rule, elements: int = 2, dtype: str = "float32", **other: Any) -> ShardBench:
    """A shard with one block for each rule; workers 1 and 2 are counted in."""
    tensors = tuple(Tensor(f"w{i}", dtype, (elements,), i) for i in range(len(rules or "1")))
    bench = ShardBench((1, 2), staleness=float("inf"), spec=ModelSpec(tensors, rules or (SGD(lr=1.0),), stale), **other)
    bench.start(1, 2)
    return bench


def read(bench: ShardBench, worker: int, **other: Any) -> int:
    """A pull by this worker. The version that it has now."""
    return only(m.Values, bench.pull(worker, **other)).version


def counted(bench: ShardBench) -> dict[str, float]:
    """The shard's report of stale gradients, without what is 0."""
    counters = dict(bench.report().counters)
    return {k: v for k, v in counters.items() if (k.startswith("stale.") or k == "uncompensated") and v}


# --- how it is said


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        (None, Stale()),
        ("scale", SCALE),
        ("compensate", Stale("compensate", (0.04, 0.0))),
        (Compensate(2, adaptive=True), Stale("compensate", (2.0, 1.0))),
    ],
)
def test_what_users_say(option: Any, wanted: Stale) -> None:
    """None, a name, or a remedy with its numbers."""
    assert wanted == read_option(option)
    assert bool(wanted) == (option is not None)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: read_option("scaled"), "no remedy 'scaled'.*scale, compensate"),
        (lambda: read_option(0.5), "stale is a float"),
        (lambda: Compensate(0), "lam is 0.0.*0.04"),
        (lambda: Compensate(1e9), "lam is"),
        (lambda: Compensate(float("nan")), "lam is nan"),
        (lambda: Compensate("much"), "compensate: could not convert"),  # type: ignore[arg-type]
        (lambda: Stale("compensate", (0.1, 0.5)), "adaptive is a flag"),
        (lambda: Stale("scale", (1.0,)), "takes 0 numbers, not 1"),
        (lambda: ModelSpec((Tensor("w", "float32", (1,)),), (Delta(),), SCALE), "rule delta has neither"),
        (lambda: ModelSpec((Tensor("w", "float32", (1,)),), (SGD(), Delta()), Compensate()), "rule delta"),
        (lambda: ModelSpec((Tensor("w", "float32", (1,)),), (Rule("mean"),), SCALE), "rule mean has neither"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any, told: str) -> None:
    """An unknown remedy, a number out of range, a rule that has no use for it."""
    with pytest.raises(ConfigError, match=told):
        wrong()


def test_a_remedy_is_part_of_the_model() -> None:
    """It changes the digest, travels, and a difference is named."""
    tensors = (Tensor("w", "float32", (1,)),)
    plain, scaled, other = (ModelSpec(tensors, (SGD(),), s) for s in (Stale(), SCALE, Compensate(0.5)))

    assert 3 == len({plain.digest, scaled.digest, other.digest})
    assert "stale gradients are met with none against scale" == plain.difference(scaled)
    assert "stale gradients are met with compensate(lam=0.5, adaptive=0) against none" == other.difference(plain)


# --- how stale a push is


def test_staleness_is_the_updates_of_a_block_since_it_was_read() -> None:
    """Everybody's, the own too, of that block alone, whatever else changed; a push counts by its stalest block (§13.2)."""
    bench = bench_of(SCALE, SGD(lr=1.0), SGD(lr=1.0))
    store = bench.core.weights.store
    seen = read(bench, 1)
    assert 2 == seen == store.version, "filling is a change and no update"

    def push(worker: int, *blocks: int) -> None:
        bench.do(m.Push, worker, 0, False, 1.0, (), 0, 0, blocks, (), False, seen, (floats(0.0, 0.0),) * len(blocks))

    push(1, 0, 1)
    push(2, 0)
    push(1, 0)
    push(2, 1)
    assert (3, 2) == (store.updates_since(0, seen), store.updates_since(1, seen))
    assert (1, 0) == (store.updates_since(0, store.version - 2), store.updates_since(0, store.version))
    push(2, 0, 1)
    bench.do(m.Push, 1, 0, True, 1.0, (), 0, 0, (), (), False, seen, ())

    assert {"stale.0": 1, "stale.1": 2, "stale.2": 1, "stale.3": 1} == counted(bench), "who pushes nothing is not stale"


def test_counting_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard remembers so many updates of a block and not more (§13.2)."""
    bench = bench_of(Stale())
    store = bench.core.weights.store
    gradient = torch.zeros(2)
    for _ in range(2 * MOST_COUNTED + 10):
        store.apply(0, gradient, None, (), 1)

    assert MOST_COUNTED == store.updates_since(0, 0)
    assert 7 == store.updates_since(0, store.version - 7)
    assert len(store._held[0].updates) < 2 * MOST_COUNTED
    bench.push(1, 0, 0.0, 0.0)
    assert {"stale.64": 1} == counted(bench)


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("stale", [Stale(), SCALE, Compensate()])
def test_a_version_that_is_not_yet_is_refused(stale: Stale, mode: str) -> None:
    """`seen` above the shard's version is refused, and nothing of it applied (MUST, §13.1)."""
    bench = bench_of(stale, mode=mode)
    seen = read(bench, 1)
    refused = only(m.Ack, bench.push(1, 0, 1.0, 1.0, seen=seen + 1, advance=False)).refusals
    bench.push(1, 0, 1.0, 1.0, seen=2**64 - 1)

    assert ["shape"] == [code for _, code, _ in refused]
    assert 2 == bench.core.counters["refused.shape"]
    assert [0.0, 0.0] == bench.weights
    assert (1, 1) in bench.report().clocks, "a refused gradient holds nobody up"


# --- a smaller learning rate


def test_the_learning_rate_is_divided_by_staleness() -> None:
    """By max(1, τ), as registered or as carried; by hand (§13.3, Zhang et al. 2016)."""
    bench = bench_of(SCALE)
    seen = read(bench, 1)
    moved = []
    for hyper in ((), (), (), (), ((0.5, 0.0, 0.0, 0.0, 0.0, 0.0),), ((),)):
        before = bench.weights[0]
        bench.push(1, 0, -6.0, 0.0, seen=seen, hyper=hyper, advance=False)
        moved.append(bench.weights[0] - before)
    bench.push(1, 0, -6.0, 0.0, seen=bench.core.weights.store.version, advance=False)

    assert pytest.approx([6, 6, 3, 2, 0.75, 1.2]) == moved, "τ = 0, 1, 2, 3, 4, 5"
    assert pytest.approx(sum(moved) + 6) == bench.weights[0], "and full again for a fresh one"


def test_other_numbers_and_groups_keep_theirs() -> None:
    """Of Adam only the learning rate; of averaged buffers nothing (§13.3)."""
    rules = (Adam(lr=0.8, betas=(0.5, 0.5)), Rule("mean"))
    benches = [bench_of(stale, *rules) for stale in (SCALE, Stale())]
    for bench in benches:
        seen = read(bench, 1)
        for _ in range(2):
            grads = (floats(1.0, -1.0), floats(8.0, 4.0))
            bench.do(m.Push, 1, 0, False, 1.0, (), 0, 0, (0, 1), (), False, seen, grads)
        assert [1, 1] == [bench.core.weights.store.updates_since(b, seen + 2) for b in (0, 1)]
    scaled, plain = benches
    assert plain.weights == scaled.weights

    for bench in benches:
        bench.do(m.Push, 1, 0, False, 1.0, (), 0, 0, (0, 1), (), False, seen, (floats(1.0, -1.0), floats(8.0, 4.0)))
    step = [np.float32(b - a) for a, b in zip([-1.6, 1.6], plain.weights, strict=True)]
    half = [np.float32(b - a) for a, b in zip([-1.6, 1.6], scaled.weights, strict=True)]
    np.testing.assert_allclose(np.array(step) / 2, half, rtol=1e-5)
    buffers = [np.frombuffer(only(m.Values, b.pull(READER, blocks=(1,))).buffers[0], np.float32) for b in benches]
    np.testing.assert_array_equal(*buffers)


# --- compensation


def test_compensation_by_hand() -> None:
    """g + λ·g⊙g⊙(w - b), b what this worker read last; a fresh gradient is left as it is (§13.3, Zheng et al. 2017)."""
    bench = bench_of(Compensate(0.5))
    seen = {worker: read(bench, worker) for worker in (1, 2)}
    bench.push(2, 0, -2.0, 4.0, seen=seen[2])
    assert [2.0, -4.0] == bench.weights, "worker 2 was not late"

    bench.push(1, 0, 3.0, 1.0, seen=seen[1])
    g = np.array([3.0, 1.0]) + 0.5 * np.array([9.0, 1.0]) * (np.array([2.0, -4.0]) - 0.0)
    assert (np.array([2.0, -4.0]) - g).tolist() == bench.weights
    before = np.array(bench.weights)
    seen[1] = read(bench, 1)
    bench.push(1, 1, 1.0, 1.0, seen=seen[1])
    assert (before - 1).tolist() == bench.weights
    assert {"stale.0": 2, "stale.1": 1} == counted(bench)


def test_the_adaptive_form_by_hand() -> None:
    """λ is divided by the root of a running mean of g², kept for each element at the shard (§13.4)."""
    bench = bench_of(Compensate(2.0, adaptive=True))
    seen, w, square = read(bench, 1), np.zeros(2), np.zeros(2)
    read(bench, 2)
    for g in (np.array([3.0, -1.0]), np.array([0.5, 2.0]), np.array([-1.0, 0.25])):
        bench.push(1, 0, *g, seen=seen, advance=False)
        square = 0.95 * square + 0.05 * g * g
        w = w - (g + 2.0 / np.sqrt(square + 1e-7) * g * g * (w - 0.0))
        np.testing.assert_allclose(bench.weights, w, rtol=1e-5)


def test_what_is_maximized_has_minus_the_gradient() -> None:
    """To maximize f is to minimize -f, compensated or not (§13.4)."""
    down, up = bench_of(Compensate(0.5)), bench_of(Compensate(0.5), SGD(lr=1.0, maximize=True))
    for bench, sign in ((down, 1.0), (up, -1.0)):
        seen = read(bench, 1)
        for g in (2.0, 3.0, -1.0):
            bench.push(1, 0, sign * g, 0.0, seen=seen, advance=False)

    assert down.weights == up.weights
    assert down.weights[0] not in (0.0, -4.0)


def test_ranges_are_compensated_as_elements_of_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same elements pushed alone come out as in a whole push, however it is cut up; the rest stays (§13.4)."""
    spans = np.array([(0, 1), (2, 5)], "<u4").tobytes()
    benches = [bench_of(Compensate(0.5, adaptive=adaptive), elements=5) for adaptive in (False, False, True, True)]
    for bench, ranged in zip(benches, (True, False) * 2, strict=True):
        monkeypatch.setattr(remedies, "CHUNK", 2 if ranged else 1000)
        bench.push(2, 0, 1.0, 2.0, 3.0, -1.0, -2.0, seen=read(bench, 2))
        seen = read(bench, 1)
        for g in ((1.0, 2.0, 3.0, 4.0), (0.5, -1.0, 0.25, 2.0)):
            parts = ((3,), (spans, floats(*g))) if ranged else ((), (floats(g[0], 0.0, *g[1:]),))
            ranges = (2,) if ranged else ()
            bench.do(m.Push, 1, 0, False, 1.0, (), 0, 0, (0,), ranges, False, seen, parts[1])
    for ranged, whole in (benches[:2], benches[2:]):
        assert whole.weights == ranged.weights
    assert benches[0].weights != benches[2].weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_narrow_gradients_are_compensated_in_float32(dtype: str) -> None:
    """And rounded once, at the end; wide ones stay wide (§13.4)."""
    kind, size = getattr(torch, dtype), 512
    wide = torch.float64 if dtype == "float64" else torch.float32
    bench = bench_of(Compensate(0.5), SGD(lr=1.0), dtype=dtype, elements=size, fill=False)
    dice = torch.Generator().manual_seed(1)
    zero, moved, g = (k * torch.randn(size, generator=dice).to(kind) for k in (0, 1, 1))

    def buffers(values: torch.Tensor) -> tuple[bytes, ...]:
        return (values.view(torch.uint8).numpy().tobytes(),)

    bench.do(m.Fill, 1, bench.epoch, (0,), buffers(zero))
    seen = read(bench, 1)
    read(bench, 2)
    for worker, gradient in ((2, moved), (1, g)):
        bench.do(m.Push, worker, 0, False, 1.0, (), 0, 0, (0,), (), False, seen, buffers(gradient))

    wanted = torch.addcmul(g.to(wide), -moved.to(wide) * g.to(wide), g.to(wide), value=0.5).to(kind)
    found = only(m.Values, bench.pull(READER, blocks=(0,))).buffers[0]
    assert torch.equal(-moved - wanted, torch.frombuffer(bytearray(found), dtype=kind))


def test_what_cannot_be_compensated_is_applied_as_it_came() -> None:
    """Nothing read here, an older answer than the last, a product out of range: plain, and counted (§13.5)."""
    bench = bench_of(Compensate(0.5))
    bench.push(1, 0, -1.0, 0.0, advance=False)
    assert [1.0, 0.0] == bench.weights
    old = read(bench, 1)
    bench.push(1, 0, -1.0, 0.0, seen=old, advance=False)
    newer = read(bench, 1)
    bench.push(1, 0, -1.0, 0.0, seen=old, advance=False)
    assert [3.0, 0.0] == bench.weights
    bench.push(1, 0, -1e30, 0.0, seen=newer, advance=False)
    assert [np.float32(1e30), 0.0] == bench.weights
    assert 3.0 == counted(bench)["uncompensated"]

    bench.push(1, 0, 0.0, -2.0, seen=newer, advance=False)
    assert [np.float32(1e30), 2.0] == bench.weights, "0 times anything"
    assert 3.0 == counted(bench)["uncompensated"]
    bench.push(1, 0, 0.0, -2.0, seen=bench.core.weights.store.version, advance=False)
    assert [np.float32(1e30), 4.0] == bench.weights, "on weights that it was never told"
    assert 4.0 == counted(bench)["uncompensated"]


def test_an_unchanged_block_is_known_from_before() -> None:
    """A pull that brings nothing of a block, since it has not changed, says that the copy still holds (§13.5)."""
    bench = bench_of(Compensate(0.5), SGD(lr=1.0), SGD(lr=1.0))
    first = read(bench, 1)
    bench.do(m.Push, 2, 0, False, 1.0, (), 0, 0, (1,), (), False, 0, (floats(1.0, 1.0),))
    seen = read(bench, 1, since=first)
    bench.push(2, 0, -2.0, 0.0)
    bench.push(1, 0, 3.0, 0.0, seen=seen)

    assert [2 - (3 + 0.5 * 9 * 2), 0.0] == bench.weights


def test_a_pull_of_some_blocks_is_one_of_those() -> None:
    """What else has changed is not what the worker holds (§13.5)."""
    bench = bench_of(Compensate(0.5), SGD(lr=1.0), SGD(lr=1.0))
    seen = read(bench, 1)
    for block in (0, 1):
        bench.do(m.Push, 2, 0, False, 1.0, (), 0, 0, (block,), (), False, 0, (floats(-2.0, 0.0),))
    read(bench, 1, blocks=(1,))
    bench.push(1, 0, 3.0, 0.0, seen=seen)

    assert [2 - (3 + 0.5 * 9 * 2), 0.0] == bench.weights


def test_copies_are_kept_for_those_counted_in_and_no_longer() -> None:
    """One a worker and block, shared where two read the same version; none for readers, nor after a pause or an end (§13.5)."""
    bench = bench_of(Compensate())
    kept = bench.core.weights.remedy._backups
    for worker in (1, 2, READER):
        read(bench, worker)
    assert {1, 2} == set(kept)
    assert kept[1][0].values.data_ptr() == kept[2][0].values.data_ptr()
    for step in range(5):
        bench.push(1, step, 1.0, 1.0, seen=read(bench, 1))
    assert [1, 1] == [len(of) for of in kept.values()]

    bench.do(m.Pause, 1)
    assert {2} == set(kept)
    read(bench, 1)
    assert {2} == set(kept), "whoever rests reads without"
    bench.view((1,))
    assert {} == kept
    for stale in (Stale(), SCALE):
        other = bench_of(stale)
        read(other, 1)
        assert {} == other.core.weights.remedy._backups


def test_an_answer_that_is_said_again_is_of_before() -> None:
    """Over shared memory a repeated request is not written again: what its worker holds has not changed (§11.4, §13.5)."""
    bench = bench_of(Compensate(0.5))
    weights, first = bench.core.weights, read(bench, 1)
    bench.push(2, 0, -2.0, 0.0)
    weights.read(1, (), first)
    bench.push(1, 0, 3.0, 0.0, seen=first)

    assert [2 - (3 + 0.5 * 9 * 2), 0.0] == bench.weights


def test_buffers_that_are_averaged_are_let_be() -> None:
    """They have no gradient: nothing is kept of them, and nothing counted as not compensated (§13.3)."""
    bench = bench_of(Compensate(0.5), SGD(lr=1.0), Rule("mean"))
    seen = read(bench, 1)
    for _ in range(2):
        bench.do(m.Push, 1, 0, False, 1.0, (), 0, 0, (1,), (), False, seen, (floats(8.0, 4.0),))

    values = only(m.Values, bench.pull(READER, blocks=(1,))).buffers[0]
    assert [6.0, 3.0] == np.frombuffer(values, np.float32).tolist()
    assert [0] == list(bench.core.weights.remedy._backups[1])
    assert "uncompensated" not in counted(bench)


def test_a_copy_stays_as_it_was_read() -> None:
    """However the block changes afterwards, and whoever else reads it meanwhile."""
    bench = bench_of(Compensate())
    kept = bench.core.weights.remedy._backups
    read(bench, 1)
    for step in range(4):
        bench.push(2, step, 1.0, 1.0, seen=read(bench, 2))
        read(bench, READER)

    assert [0.0, 0.0] == kept[1][0].values.tolist()
    assert [-3.0, -3.0] == kept[2][0].values.tolist()


def test_a_restarted_shard_knows_no_copies() -> None:
    """A new life has read nothing to anybody: `seen` is 0, gradients are stale by all its updates, and plain (§13.2, §13.5)."""
    bench = bench_of(Compensate(0.5), registered=())
    bench.push(2, 0, -1.0, 0.0)
    bench.push(2, 1, -1.0, 0.0)
    bench.push(1, 0, -1.0, 0.0, seen=0)

    assert [3.0, 0.0] == bench.weights
    assert {"stale.0": 1, "stale.1": 1, "stale.2": 1, "uncompensated": 3} == counted(bench)


def test_sync_knows_no_staleness() -> None:
    """Neither remedy changes a step's average, and nothing is kept (§13.6)."""
    found = []
    for stale in (Stale(), SCALE, Compensate(100.0)):
        bench = bench_of(stale, mode="sync")
        for step in range(3):
            for worker in (1, 2):
                read_at = read(bench, worker, clock=step)
                bench.push(worker, step, 1.0 * worker, -1.0, seen=read_at if step < 2 else 1)
        found.append(bench.weights)
        assert {} == counted(bench) == bench.core.weights.remedy._backups
    assert found[0] == found[1] == found[2]


def test_a_pushed_gradient_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in memory of its worker's."""
    bench = bench_of(Compensate(0.5))
    given: list[torch.Tensor] = []
    before = remedies.Remedy.gradient

    def gradient(self: Any, worker: int, block: int, gradient: torch.Tensor, *rest: Any) -> torch.Tensor:
        given.append(gradient)
        return before(self, worker, block, gradient, *rest)

    monkeypatch.setattr(remedies.Remedy, "gradient", gradient)
    seen = read(bench, 1)
    for _ in range(3):
        bench.push(1, 0, 2.0, 1.0, seen=seen, advance=False)

    assert [[2.0, 1.0]] * 3 == [g.tolist() for g in given]
    assert -6.0 != bench.weights[0], "though it was compensated"


# --- from end to end


def test_real_servers_compensate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are late, over either transport, on two shards: the weights are what the formula says."""
    first, size, workers = np.linspace(-1, 1, 3000, dtype=np.float32), 3000, {}
    with shoal.LocalCluster(shards=2, block_bytes=4096, staleness="inf") as cluster, ExitStack() as stack:
        for name, transport in (("quick", "shm"), ("late over memory", "shm"), ("late over TCP", "tcp")):
            monkeypatch.setenv("SHOAL_TRANSPORT", transport)
            workers[name] = stack.enter_context(shoal.connect(cluster.join, name=name))
            workers[name].register({"w": first}, optimizer=shoal.SGD(lr=0.5), stale=shoal.Compensate(0.25))
        quick, *late = workers.values()
        for worker in late:
            then = worker.pull()["w"]
            for _ in range(3):
                quick.pull()
                quick.push({"w": np.ones(size, np.float32)}).result()
            now = quick.pull()["w"]
            worker.push({"w": 2 * first}).result()
            after = quick.pull()["w"]

            g = 2 * first
            np.testing.assert_allclose(after, now - 0.5 * (g + 0.25 * g * g * (now - then)), rtol=1e-5, atol=1e-6)
            assert not np.allclose(after, now - 0.5 * g)


def test_real_servers_scale_and_name_a_mismatch() -> None:
    """Pulls by name count as pulls; a worker that registers another remedy is told which."""
    with (
        shoal.LocalCluster(staleness="inf") as cluster,
        shoal.connect(cluster.join, name="late") as late,
        shoal.connect(cluster.join, name="quick") as quick,
    ):
        arrays = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
        late.register(arrays, optimizer=shoal.SGD(lr=1.0), stale="scale")
        with pytest.raises(ShapeError, match="stale gradients are met with scale against compensate"):
            quick.register(arrays, optimizer=shoal.SGD(lr=1.0), stale="compensate")
        quick.register(arrays, optimizer=shoal.SGD(lr=1.0), stale="scale")
        late.pull("a")
        ones = {"a": np.ones(2, np.float32)}
        for _ in range(4):
            quick.push(ones).result()
        late.push(ones).result()
        quick.pull()
        quick.push(ones).result()

        # 1 + 1 + 1/2 + 1/3 by quick, 1/4 by late, 1 by quick
        np.testing.assert_allclose(quick.pull()["a"], -(1 + 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1), rtol=1e-6)


def test_torch_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    """`worker.optimizer(…, stale=…)`; with an optimizer that runs here it is refused, in `sync` it is said to be idle."""
    net = torch.nn.Linear(3, 1)
    with shoal.LocalCluster(mode="sync") as cluster, shoal.connect(cluster.join) as worker:
        with pytest.raises(ConfigError, match="stale is scale, and the rule delta has neither"):
            worker.optimizer(torch.optim.NAdam(net.parameters()), net, stale="scale")
        with caplog.at_level(logging.WARNING, "shoal"):
            opt = worker.optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, stale="compensate")
        assert "stale=compensate(lam=0.04, adaptive=0) is without effect in sync mode" in caplog.text
        net(torch.ones(1, 3)).sum().backward()
        before = net.bias.item()
        opt.step()
        assert pytest.approx(before - 0.1) == net.bias.item()
