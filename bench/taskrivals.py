"""The contestants of `shoal bench tasks`: `python -m shoal.bench.taskrivals NAME` is one, as `shoal.bench.seats` wants it.

The same work for all: two processes hold the same weights and answer tasks of one row of 16 float32; a third process submits
tasks one by one, and takes the answers one by one.

Rules
- A contestant is asked for `{"rate": 0, "seconds": s}`, as many tasks as it does with `WINDOW` of them under way, or for
  `{"rate": r, "seconds": s}`, tasks that come at random moments, r a second on average, whether or not others are answered.
- A time of an answer runs from the moment when the task should have been submitted: who submits late has the lateness in it.
- Answers are taken in the order of submission. One that overtakes another counts from when it is looked at.
- Inputs are whole numbers and weights are ones, so that every answer has one right value; each is looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.errors import ShoalError
from .rivals import versions

WIDTH = 16
WINDOW = 512
"""Tasks under way at full speed."""
EXECUTORS = 2
TOGETHER = 64
"""Tasks that Ray's caller puts into a call at most."""
PERIOD = 1000
"""Inputs repeat after so many tasks."""
PATIENCE = 60.0
WARM_UP = 0.5
"""Seconds at full speed that are not counted."""


@dataclass(frozen=True)
class Calls:
    """What a contestant does: submit a task, wait for its answer, and say when all are at their places."""

    submit: Callable[[Any], Any]
    result: Callable[[Any], Any]
    ready: Callable[[], bool] = lambda: True


def weights() -> dict[str, Any]:
    """What a model of this benchmark is."""
    import torch

    return {"w": torch.ones(WIDTH, 1)}


def predict(held: dict[str, Any], x: Any) -> Any:
    """The same arithmetic for all: rows of inputs times the weights."""
    import torch

    return (torch.from_numpy(x) @ held["w"]).numpy()


# --- ours


@contextmanager
def shoal() -> Iterator[Calls]:
    """A cluster, two executors and a client: each task is written down, answered once, and its answer kept until it is heard."""
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(shards=1))
        for number in range(EXECUTORS):
            stack.enter_context(_executor(cluster.join, f"x{number}"))
        client = stack.enter_context(connect(cluster.join, role="client"))
        client.publish("sum", weights(), {"accuracy": 1.0}, promote=True)

        def ready() -> bool:
            return sum(bool(each["loaded"]) for each in client.status()["executors"]) == EXECUTORS

        yield Calls(lambda x: client.submit("sum", x), lambda pending: pending.result(PATIENCE).outputs, ready)


@contextmanager
def _executor(join: str, name: str) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, "executor", name],
        env={**os.environ, "SHOAL_JOIN": join},
        stdin=subprocess.PIPE,
    )
    assert process.stdin
    try:
        yield
    finally:
        process.stdin.close()
        process.wait()


def _execute(name: str) -> None:
    """An executor, until its standard input ends."""
    import torch

    torch.set_num_threads(1)
    with connect(name=name) as worker, worker.serve({"sum": predict}):
        sys.stdin.read()


# --- Ray


def ray_actors() -> AbstractContextManager[Calls]:
    """Two actors, called in turn, a call a task; inputs and answers in the messages, as Ray does with what is small."""
    return _ray(1)


def ray_together() -> AbstractContextManager[Calls]:
    """The same, but the caller puts up to 64 tasks into a call, while it waits for those before: one outcome for all of them."""
    return _ray(TOGETHER)


class _Batch:
    """Tasks that go out in one call of an actor."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.reference: Any = None
        self.outputs: Any = None


@contextmanager
def _ray(together: int) -> Iterator[Calls]:
    import ray

    ray.init(
        num_cpus=EXECUTORS, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 * 1024**2,
    )  # fmt: skip
    try:

        class Actor:
            def __init__(self) -> None:
                import torch

                torch.set_num_threads(1)
                self._held, self._torch = {"w": torch.ones(WIDTH, 1)}, torch

            def predict(self, x: Any) -> Any:
                return (self._torch.from_numpy(x.copy()) @ self._held["w"]).numpy()  # what Ray hands over is read-only

        actors = cycle([ray.remote(Actor).remote() for _ in range(EXECUTORS)])
        lock, last = threading.Lock(), _Batch()

        def send(batch: _Batch) -> None:
            inputs = batch.inputs[0] if together == 1 else np.concatenate(batch.inputs)
            batch.reference = next(actors).predict.remote(inputs)

        def submit(x: Any) -> tuple[_Batch, int]:
            nonlocal last
            with lock:
                if last.reference is not None:
                    last = _Batch()
                last.inputs.append(x)
                if len(last.inputs) == together:
                    send(last)
                return last, len(last.inputs) - 1

        def result(handle: tuple[_Batch, int]) -> Any:
            batch, place = handle
            if batch.outputs is None:
                with lock:
                    if batch.reference is None:
                        send(batch)
                batch.outputs = ray.get(batch.reference)
            return batch.outputs[place : place + 1]

        yield Calls(submit, result)
    finally:
        ray.shutdown()


CONTESTANTS: dict[str, Callable[[], AbstractContextManager[Calls]]] = {
    "shoal": shoal,
    "ray": ray_actors,
    "ray-together": ray_together,
}


# --- what is timed


def _inputs() -> list[Any]:
    return [np.full((1, WIDTH), number, np.float32) for number in range(PERIOD)]


def _right(number: int, output: Any) -> bool:
    return output.shape == (1, 1) and float(output[0, 0]) == WIDTH * (number % PERIOD)


def at_full_speed(calls: Calls, seconds: float) -> dict[str, float]:
    """Tasks a second with `WINDOW` under way, and how many answers were wrong."""
    inputs, pending = _inputs(), deque[Any]()
    submitted = answered = wrong = 0
    started = time.perf_counter()
    while True:
        while len(pending) < WINDOW:
            pending.append(calls.submit(inputs[submitted % PERIOD]))
            submitted += 1
        wrong += not _right(answered, calls.result(pending.popleft()))
        answered += 1
        if answered % 64 == 0 and time.perf_counter() - started >= seconds:
            break
    elapsed, counted = time.perf_counter() - started, answered
    for handle in pending:
        wrong += not _right(answered, calls.result(handle))
        answered += 1
    return {"tasks": answered, "tasks_per_s": counted / elapsed, "wrong": wrong}


def at_a_rate(calls: Calls, rate: float, seconds: float, seed: int) -> dict[str, float]:
    """Seconds to an answer when tasks come by themselves: median, 99 %, most."""
    gaps, inputs = np.random.default_rng(seed).exponential(1 / rate, max(1, round(rate * seconds))), _inputs()
    moments = [float(moment) for moment in gaps.cumsum()]
    submitted: SimpleQueue[Any] = SimpleQueue()
    started = time.perf_counter() + 0.01

    def submit() -> None:
        try:
            for number, moment in enumerate(moments):
                wait = started + moment - time.perf_counter()
                if wait > 0:
                    time.sleep(wait)
                submitted.put(calls.submit(inputs[number % PERIOD]))
        except Exception as error:  # said by who waits
            submitted.put(error)

    thread = threading.Thread(target=submit, name="submitting", daemon=True)
    thread.start()
    taken, wrong = [], 0
    for number, moment in enumerate(moments):
        handle = submitted.get()
        if isinstance(handle, Exception):
            raise handle
        output = calls.result(handle)
        taken.append(time.perf_counter() - started - moment)
        wrong += not _right(number, output)
    thread.join()
    median, most_of, most = np.quantile(taken, (0.5, 0.99, 1.0))
    return {"tasks": len(taken), "p50": float(median), "p99": float(most_of), "most": float(most), "wrong": wrong}


def _settle(calls: Calls) -> None:
    """Until all are there, and warm."""
    deadline = time.monotonic() + PATIENCE
    while not calls.ready():
        if time.monotonic() > deadline:
            raise ShoalError(f"its executors are not there after {PATIENCE:g} s")
        time.sleep(0.05)
    at_full_speed(calls, WARM_UP)


def converse(name: str) -> None:
    """Does what it is asked to on its standard input."""
    words = os.fdopen(os.dup(1), "w")  # a library may print what it likes: this line is ours
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=words, flush=True)

    try:
        with CONTESTANTS[name]() as calls:
            _settle(calls)
            say({"ready": True, "versions": versions()})
            for line in sys.stdin:
                asked = json.loads(line)
                _settle(calls)  # they may have been stopped for long
                if asked["rate"]:
                    say(at_a_rate(calls, asked["rate"], asked["seconds"], asked["seed"]))
                else:
                    say(at_full_speed(calls, asked["seconds"]))
    except ImportError as error:
        say({"absent": str(error)})


def main(name: str, *more: str) -> None:
    if name == "executor":
        _execute(*more)
    else:
        converse(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
