"""`shoal bench tasks`: small tasks per second, and how long one takes at 2,500 of them, beside Ray actors doing the same work.

The same work for all: a client in one process, two executors in two others; a task is one row of 16 float32, a model one layer of
16 to 4. `python -m shoal.bench.tasks NAME COUNT` is one contestant's client; it prints its seconds as JSON.
- `shoal`: tasks are kept on disk before they are taken, and answered by any executor.
- `ray`: actors, called in turns, a call a task. `ray, batched`: by calls of 64 tasks, which the caller must put together.

Rules
- Contestants have their turns one after the other, in processes of their own, alternating; medians of turns.
- Latency is taken at `STEADY` tasks a second, or half of what the contestant has reached if that is less, spread evenly.
- Who is not installed is left out, and the report says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.errors import ShoalError
from .pushpull import machine
from .table import PLAIN_WIDTH, time_text

NAMES = ("shoal", "ray", "ray, batched")
COUNT, EXECUTORS, WIDTH, CLASSES, TOGETHER = 20_000, 2, 16, 4, 64
PATIENCE = 600.0
STEADY = 2500.0
Submit = Callable[[list[Any]], Callable[[], Any]]
"""Begins tasks, and gives what waits for all of them."""

_EXECUTOR = """
import sys, shoal
with shoal.connect(name=sys.argv[1]) as worker, worker.serve({"m": lambda held, x: x @ held["w"].numpy()}):
    print(flush=True)
    sys.stdin.read()
"""


def main(repeat: int = 5, count: int = COUNT, as_json: bool = False) -> int:
    """Measure, and print. Returns the exit code.

    Args:
        repeat: turns of each. count: tasks of a turn.
    """
    report: dict[str, Any] = {"machine": machine(), "repeat": repeat, "tasks": count, "executors": EXECUTORS}
    names = [name for name in NAMES if name == "shoal" or _has_ray()]
    rates: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(repeat):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            click.echo(f"turn {turn + 1} of {repeat}: {name}", err=True)
            rate, taken = _turn(name, count)
            rates[name].append(rate)
            times[name].append(taken)
    report["contestants"] = {
        name: {
            "rate": median(rates[name]),
            **{f"p{share}": median(float(np.percentile(each, share)) for each in times[name]) for share in (50, 99)},
        }
        for name in names
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(("tasks", "a second", "at 2,500 a second: median", "99 of 100")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for name, found in report["contestants"].items():
        table.add_row(name, f"{found['rate']:,.0f}", time_text(found["p50"]), time_text(found["p99"]))
    console.print(table)
    if len(report["contestants"]) == 1:
        console.print("Ray is not installed here: make bench-tasks installs it in a place of its own")


def _has_ray() -> bool:
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return True


def _turn(name: str, count: int) -> tuple[float, list[float]]:
    """Tasks per second, and seconds of each at half of it; in a process of its own.

    Raises:
        ShoalError: it has failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-m", "shoal.bench.tasks", name, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE)
    if done.returncode:
        raise ShoalError(f"the contestant {name} has failed: {done.stderr.decode()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["rate"], found["seconds"]


# --- a contestant


def contestant(name: str, count: int) -> dict[str, Any]:
    """As many tasks as fast as may be, then as many at half that rate."""
    with _shoal() if name == "shoal" else _ray(TOGETHER if "batched" in name else 1) as submit:
        tasks = [np.full((1, WIDTH), number % 7, np.float32) for number in range(count)]
        submit(tasks[: count // 10])()
        started = time.perf_counter()
        outcome = submit(tasks)()
        rate = count / (time.perf_counter() - started)
        _check(tasks, outcome)
        return {"rate": rate, "seconds": _at_rate(submit, tasks[: count // 2], min(STEADY, rate / 2))}


def _at_rate(submit: Submit, tasks: list[Any], rate: float) -> list[float]:
    """Seconds from when a task was due to its answer. What is due together is submitted together."""
    import threading
    from queue import Queue

    waiting: Queue[tuple[float, int, Callable[[], Any]] | None] = Queue()
    seconds: list[float] = []

    def wait() -> None:
        while (entry := waiting.get()) is not None:
            due, number, result = entry
            result()
            ended = time.perf_counter()
            seconds.extend(ended - due - at / rate for at in range(number))

    thread = threading.Thread(target=wait)
    thread.start()
    began, sent = time.perf_counter(), 0
    while sent < len(tasks):
        due = min(len(tasks), int((time.perf_counter() - began) * rate) + 1)
        if due > sent:
            waiting.put((began + sent / rate, due - sent, submit(tasks[sent:due])))
            sent = due
        else:
            time.sleep(0.0005)
    waiting.put(None)
    thread.join()
    return seconds


def _check(tasks: list[Any], outcome: list[Any]) -> None:
    wrong = sum(not np.array_equal(task @ _weights(), found) for task, found in zip(tasks, outcome, strict=True))
    if wrong:
        raise ShoalError(f"{wrong} of {len(tasks)} answers are wrong")


def _weights() -> Any:
    return np.arange(WIDTH * CLASSES, dtype=np.float32).reshape(WIDTH, CLASSES)


@contextmanager
def _shoal() -> Iterator[Submit]:
    with ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster())
        client = stack.enter_context(connect(cluster.join, role="client"))
        client.publish("m", {"w": _weights()}, {"accuracy": 1.0}, promote=True)
        environment = {**os.environ, "SHOAL_JOIN": cluster.join}
        for number in range(EXECUTORS):
            process = subprocess.Popen(
                [sys.executable, "-c", _EXECUTOR, f"x{number}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdin and process.stdout
            stack.callback(process.wait, 30)
            stack.callback(process.stdin.close)
            stack.callback(process.stdout.close)
            process.stdout.readline()
        while sum(bool(each["loaded"]) for each in client.status()["executors"]) < EXECUTORS:
            time.sleep(0.05)

        def submit(tasks: list[Any]) -> Callable[[], Any]:
            pending = [client.submit("m", task) for task in tasks]
            return lambda: [each.result(PATIENCE).outputs for each in pending]

        yield submit


@contextmanager
def _ray(together: int) -> Iterator[Submit]:
    import ray

    ray.init(num_cpus=EXECUTORS, include_dashboard=False, log_to_driver=False, configure_logging=False)

    @ray.remote(num_cpus=1)  # type: ignore[untyped-decorator, unused-ignore]
    class Executor:
        def __init__(self) -> None:
            self.w = _weights()

        def predict(self, x: Any) -> Any:
            return x @ self.w

    try:
        actors = [Executor.remote() for _ in range(EXECUTORS)]  # type: ignore[attr-defined]
        ray.get([actor.predict.remote(np.zeros((1, WIDTH), np.float32)) for actor in actors])

        def submit(tasks: list[Any]) -> Callable[[], Any]:
            parts = [tasks[at : at + together] for at in range(0, len(tasks), together)]
            refs = [
                actors[number % EXECUTORS].predict.remote(np.concatenate(part)) for number, part in enumerate(parts)
            ]
            return lambda: [row[None] for found in ray.get(refs) for row in found]

        yield submit
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(contestant(sys.argv[1], int(sys.argv[2]))))
