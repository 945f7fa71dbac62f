"""The contestants of `shoal bench peers`: `python -m shoal.bench.rivals NAME BYTES` is one, as `shoal.bench.seats` wants it.

The same work for all: a server holds one float32 vector and steps it with SGD; a worker, another process, pushes and pulls.
- push: a gradient goes to the server, `w -= lr·g` is applied in place, and the caller knows.
- pull: the values of now are in the worker's own buffers, where a model would have its parameters.
- view: as `pull`, but left where the library hands it out, for those who hand out memory of their own.
- step: a push and a pull. For a library without a server (an all-reduce), what comes to the same.

Rules
- Servers use one torch thread and end with their parent's standard input.
- A rival may do what is fastest for one worker, and what a real server could not: all but shoal and Ray send their live weights,
  which another worker's push would tear.
- The gradient is 1, 2, … 8, 1, 2, …, the rate a power of two: so all values are exact, and an element that was lost, doubled or
  misplaced is found.
- How long anybody waits is the run's to decide: time-outs here are long, for time passes while processes are stopped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import msgpack
import numpy as np
import zmq

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.layout import BLOCK_BYTES
from ..protocol.rules import SGD

if TYPE_CHECKING:
    import torch

Calls = dict[str, Callable[[], Any]]
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"

LR = 2.0**-10
HOURS = 4 * 3600.0
"""Longer than any run: of leases and time-outs, which go on while a process is stopped."""
_HOST = "127.0.0.1"
_PUSH, _PULL = 1, 2


def gradient(nbytes: int) -> Floats:
    """What is pushed, `nbytes // 4` elements."""
    return (np.arange(nbytes // 4) % 8 + 1).astype(np.float32)


def wrong(values: Floats, pushes: int) -> int:
    """How many elements are not what so many pushes make of zeros. Exact below a million pushes."""
    return int(np.count_nonzero(values != gradient(values.nbytes) * np.float32(-LR * pushes)))


# --- ours


@contextmanager
def _shoal(nbytes: int, transport: str, own: bool = False) -> Iterator[Calls]:
    os.environ["SHOAL_TRANSPORT"] = transport
    with (
        LocalCluster(bind=_HOST, shards=1, mode="async", staleness=inf, lease=HOURS) as cluster,
        connect(cluster.join, wait_timeout=HOURS) as worker,
    ):
        worker.register({"w": np.zeros(nbytes // 4, np.float32)}, optimizer=SGD(lr=LR))
        mine, out = {"w": gradient(nbytes)}, {"w": np.ones(nbytes // 4, np.float32)}
        written: set[int] = set()

        def push() -> None:
            gradients = worker.buffers.gradients
            where = gradients["w"].__array_interface__["data"][0]
            if where not in written:  # a training step computes it there; that is not what is timed
                written.add(where)
                gradients["w"][:] = mine["w"]
            worker.push(gradients).result()

        if own:
            yield {"push": lambda: worker.push(mine).result(), "pull": lambda: worker.pull(out=out)["w"]}
        else:
            yield {"push": push, "pull": lambda: worker.pull(out=worker.buffers.weights)["w"]}


def shoal_shm(nbytes: int) -> AbstractContextManager[Calls]:
    """shoal on one machine, gradient and weights in `worker.buffers`, as the torch wrapper has them."""
    return _shoal(nbytes, "shm")


def shoal_own(nbytes: int) -> AbstractContextManager[Calls]:
    """shoal on one machine, with arrays of the caller's own: a copy more each way."""
    return _shoal(nbytes, "shm", own=True)


def shoal_tcp(nbytes: int) -> AbstractContextManager[Calls]:
    """shoal as between machines."""
    return _shoal(nbytes, "tcp")


# --- the limit


@contextmanager
def memory(nbytes: int) -> Iterator[Calls]:
    """No rival, a limit: one process that steps the vector in place (push) and copies it once (pull). Nothing is sent."""
    import torch

    weights, pushed, values = (
        torch.zeros(nbytes // 4),
        torch.from_numpy(gradient(nbytes)),
        np.ones(nbytes // 4, np.float32),
    )
    live = weights.numpy()

    def pull() -> Any:
        np.copyto(values, live)
        return values

    yield {"push": lambda: weights.add_(pushed, alpha=-LR), "pull": pull}


# --- raw ZeroMQ


@contextmanager
def raw_zmq(nbytes: int) -> Iterator[Calls]:
    """A bare lower bound: a DEALER and a ROUTER, blocks of 4 MiB, no copy where ZeroMQ allows it, nothing checked or remembered."""
    with _other_end("zmq", nbytes) as line, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"tcp://{_HOST}:{int(line)}")
        pushed, values = gradient(nbytes), np.ones(nbytes // 4, np.float32)
        starts = range(0, nbytes, BLOCK_BYTES)
        outgoing, incoming = pushed.data.cast("B"), values.data.cast("B")

        def push() -> None:
            for at in starts:
                dealer.send_multipart([msgpack.packb((_PUSH, at)), outgoing[at : at + BLOCK_BYTES]], copy=False)
            dealer.recv_multipart()

        def pull() -> Any:
            dealer.send_multipart([msgpack.packb((_PULL, 0))])
            for _ in starts:
                header, payload = dealer.recv_multipart(copy=False)
                at = msgpack.unpackb(header.buffer)
                incoming[at : at + BLOCK_BYTES] = payload.buffer
            return values

        yield {"push": push, "pull": pull}


def _serve_zmq(nbytes: int) -> None:
    import torch

    router = zmq.Context().socket(zmq.ROUTER)
    _say(router.bind_to_random_port(f"tcp://{_HOST}"))
    weights, got = torch.zeros(nbytes // 4), 0
    live = weights.numpy().data.cast("B")
    while True:
        peer, header, *payload = router.recv_multipart(copy=False)
        what, at = msgpack.unpackb(header.buffer)
        if what == _PUSH:
            pushed = torch.frombuffer(payload[0].buffer, dtype=torch.float32)
            weights[at // 4 : at // 4 + len(pushed)].add_(pushed, alpha=-LR)
            got += 4 * len(pushed)
            if got == nbytes:
                got = 0
                router.send_multipart([peer, b""])
            continue
        for at in range(0, nbytes, BLOCK_BYTES):
            router.send_multipart([peer, msgpack.packb(at), live[at : at + BLOCK_BYTES]], copy=False)


# --- torch.distributed over gloo


@contextmanager
def gloo(nbytes: int) -> Iterator[Calls]:
    """A parameter server by hand out of gloo's `send` and `recv`: a word before, a word as the acknowledgement."""
    import torch

    with _gloo_group("gloo", nbytes):
        pushed, values, word = torch.from_numpy(gradient(nbytes)), torch.ones(nbytes // 4), torch.zeros(1)

        def push() -> None:
            torch.distributed.send(word.fill_(_PUSH), 0)
            torch.distributed.send(pushed, 0)
            torch.distributed.recv(word, 0)

        def pull() -> Any:
            torch.distributed.send(word.fill_(_PULL), 0)
            torch.distributed.recv(values, 0)
            return values.numpy()

        yield {"push": push, "pull": pull}


@contextmanager
def gloo_all_reduce(nbytes: int) -> Iterator[Calls]:
    """No server: gloo averages the gradients of two processes, and each steps its own weights. Both push the same."""
    import torch

    with _gloo_group("all_reduce", nbytes):
        summed, values = torch.from_numpy(gradient(nbytes)), torch.zeros(nbytes // 4)

        def step() -> Any:
            _reduce(summed, values)
            return values.numpy()

        yield {"step": step}


def _reduce(summed: torch.Tensor, values: torch.Tensor) -> None:
    import torch

    torch.distributed.all_reduce(summed)
    values.add_(summed, alpha=-LR / 2)
    summed.mul_(0.5)  # the gradient again, for the next


@contextmanager
def _gloo_group(kind: str, nbytes: int) -> Iterator[None]:
    import torch

    port = free_port()
    with _other_end(kind, nbytes, port):
        _join_gloo(port, 1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _join_gloo(port: int, rank: int) -> None:
    import torch

    where = f"tcp://{_HOST}:{port}"
    torch.distributed.init_process_group("gloo", where, timedelta(seconds=HOURS), world_size=2, rank=rank)


def _serve_gloo(nbytes: int, port: int) -> None:
    import torch

    _say(port)
    _join_gloo(port, 0)
    weights, pushed, word = torch.zeros(nbytes // 4), torch.empty(nbytes // 4), torch.zeros(1)
    while True:
        torch.distributed.recv(word, 1)
        if word == _PUSH:
            torch.distributed.recv(pushed, 1)
            weights.add_(pushed, alpha=-LR)
            torch.distributed.send(word, 1)
        else:
            torch.distributed.send(weights, 1)


def _serve_all_reduce(nbytes: int, port: int) -> None:
    import torch

    _say(port)
    _join_gloo(port, 0)
    summed, values = torch.from_numpy(gradient(nbytes)), torch.zeros(nbytes // 4)
    while True:
        _reduce(summed, values)


# --- torch RPC


class RpcStore:
    """Lives on the server; the worker holds a reference."""

    def __init__(self, elements: int) -> None:
        import torch

        self._weights = torch.zeros(elements)

    def push(self, pushed: torch.Tensor) -> None:
        self._weights.add_(pushed, alpha=-LR)

    def pull(self) -> torch.Tensor:
        return self._weights


@contextmanager
def torch_rpc(nbytes: int) -> Iterator[Calls]:
    """torch.distributed.rpc over TensorPipe: a remote object, called synchronously."""
    import torch
    from torch.distributed import rpc

    warnings.filterwarnings("ignore", "You are using a Backend")  # torch RPC's own use of gloo
    port = free_port()
    with _other_end("rpc", nbytes, port):
        _join_rpc(port, "worker", 1)
        try:
            store = rpc.remote("server", RpcStore, (nbytes // 4,))
            pushed, values = torch.from_numpy(gradient(nbytes)), torch.ones(nbytes // 4)
            calls = {
                "push": lambda: store.rpc_sync(HOURS).push(pushed),
                "pull": lambda: values.copy_(store.rpc_sync(HOURS).pull()).numpy(),
                "view": lambda: store.rpc_sync(HOURS).pull(),
            }
            yield calls
            calls.clear()
        finally:
            rpc.shutdown(graceful=False)


def _join_rpc(port: int, name: str, rank: int) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4, rpc_timeout=HOURS, init_method=f"tcp://{_HOST}:{port}"
    )
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        name, rank=rank, world_size=2, rpc_backend_options=options
    )


def _serve_rpc(nbytes: int, port: int) -> None:
    _say(port)
    _join_rpc(port, "server", 0)
    threading.Event().wait()


# --- Ray


@contextmanager
def ray_actor(nbytes: int) -> Iterator[Calls]:
    """An actor; arrays travel through Ray's shared-memory object store, and are read there without a copy."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    os.environ |= {"RAY_worker_niceness": "0"}  # its actors would stand back behind everybody else's processes
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=max(200 * 10**6, 10 * nbytes),
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=os.environ.get("TMPDIR"),
        _system_config={"automatic_object_spilling_enabled": False},
    )
    try:

        class Store:
            def __init__(self, elements: int, lr: float) -> None:
                import warnings

                import torch

                warnings.simplefilter("ignore")  # what Ray hands over is read-only, says torch; it is only read
                torch.set_num_threads(1)
                self._weights, self._lr, self._wrap = torch.zeros(elements), lr, torch.from_numpy

            def push(self, pushed: Any) -> None:
                self._weights.add_(self._wrap(pushed), alpha=-self._lr)

            def pull(self) -> Any:
                return self._weights.numpy()

        actor = ray.remote(Store).remote(nbytes // 4, LR)
        pushed, values = gradient(nbytes), np.ones(nbytes // 4, np.float32)

        def pull() -> Any:
            values[:] = ray.get(actor.pull.remote())
            return values

        yield {
            "push": lambda: ray.get(actor.push.remote(pushed)),
            "pull": pull,
            "view": lambda: ray.get(actor.pull.remote()),
        }
    finally:
        ray.shutdown()


CONTESTANTS: dict[str, Callable[[int], AbstractContextManager[Calls]]] = {
    "shoal": shoal_shm,
    "shoal-own": shoal_own,
    "shoal-tcp": shoal_tcp,
    "torch-rpc": torch_rpc,
    "ray": ray_actor,
    "zmq": raw_zmq,
    "gloo": gloo,
    "gloo-all-reduce": gloo_all_reduce,
    "memory": memory,
}


# --- the other end


@contextmanager
def _other_end(kind: str, *numbers: int) -> Iterator[bytes]:
    """Starts a server, and ends it. Gives the line that it says when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, "serve", kind, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        yield process.stdout.readline()
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def free_port() -> int:
    """For libraries that cannot say which port they took. Another may take it in between; then they say so."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _say(port: int) -> None:
    print(port, flush=True)


def _serve(kind: str, *numbers: str) -> None:
    """A server: says that it is ready, and serves until its standard input ends."""
    import torch

    def watch() -> None:
        sys.stdin.read(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    serve: dict[str, Callable[..., None]] = {
        "zmq": _serve_zmq,
        "gloo": _serve_gloo,
        "all_reduce": _serve_all_reduce,
        "rpc": _serve_rpc,
    }
    serve[kind](*map(int, numbers))


# --- the worker


def timed(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, and of the first two together as `step`; one round before that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                taken[name].append(time.perf_counter() - started)
    if "step" not in taken:
        taken["step"] = [push + pull for push, pull in zip(taken["push"], taken["pull"], strict=True)]
    return taken


def versions() -> dict[str, str]:
    """Of the libraries that this process has loaded."""
    loaded = {name: sys.modules.get({"pyzmq": "zmq"}.get(name, name)) for name in ("numpy", "pyzmq", "torch", "ray")}
    return {name: str(module.__version__) for name, module in loaded.items() if module}


def converse(name: str, nbytes: int) -> None:
    """The worker: does what it is asked to on its standard input."""
    words = os.fdopen(os.dup(1), "w")  # a library may print what it likes: this line is ours
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=words, flush=True)

    pushes = 0
    try:
        with CONTESTANTS[name](nbytes) as calls:
            say({"ready": True, "versions": versions()})
            for line in sys.stdin:
                asked = json.loads(line)
                rounds = int(asked.get("rounds", 0))
                if rounds:
                    say(timed(calls, rounds))
                    pushes += 1 + rounds
                else:
                    pushes += "pull" not in calls  # who has none shows its weights after a step more
                    values = calls["pull" if "pull" in calls else "step"]()
                    say({"pushes": pushes, "wrong": wrong(values, pushes)})
    except ImportError as error:
        say({"absent": str(error)})


def main(name: str, *more: str) -> None:
    """Either end."""
    if name == "serve":
        _serve(*more)
    else:
        converse(name, int(more[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
