"""What others do for the same work: a server that holds one float32 vector and steps it with SGD, a worker that pushes and pulls.

Each contestant is a context that gives `push` and `pull` for a payload of so many bytes
- push: a gradient of ones goes to the server, `w -= lr·g` is applied in place, and the caller knows.
- pull: the values of now are in the worker's memory. Where a rival gives a read-only view of shared memory (Ray), that counts
  as it is.

Rules
- A server is a process of its own with one torch thread, and ends with its parent's standard input. Every wait has a time-out.
- `pull` returns the values, so that whoever measures can check that the work was done.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from math import inf
from typing import Any

import msgpack
import numpy as np
import torch
import zmq

from ..launch.cluster import LocalCluster
from ..launch.connect import connect
from ..protocol.layout import BLOCK_BYTES
from ..protocol.rules import SGD

Calls = dict[str, Callable[[], Any]]

LR = 2.0**-10
"""Exact in float32: so many pushes of ones move a weight by exactly so much."""
TIMEOUT = 60.0
_HOST = "127.0.0.1"
_PUSH, _PULL = 1, 2


# --- ours


@contextmanager
def _shoal(nbytes: int, transport: str) -> Iterator[Calls]:
    os.environ["SHOAL_TRANSPORT"] = transport
    with (
        LocalCluster(bind=_HOST, shards=1, mode="async", staleness=inf) as cluster,
        connect(cluster.join, wait_timeout=TIMEOUT) as worker,
    ):
        worker.register({"w": np.zeros(nbytes // 4, np.float32)}, optimizer=SGD(lr=LR))
        seen: set[int] = set()

        def push() -> None:
            gradients = worker.buffers.gradients
            if id(gradients) not in seen:  # lent arrays hold anything until they are written
                seen.add(id(gradients))
                gradients["w"][:] = 1.0
            worker.push(gradients).result()

        def pull() -> Any:
            return worker.pull(out=worker.buffers.weights)["w"]

        yield {"push": push, "pull": pull}


def shoal_shm(nbytes: int) -> AbstractContextManager[Calls]:
    """shoal, on one machine."""
    return _shoal(nbytes, "shm")


def shoal_tcp(nbytes: int) -> AbstractContextManager[Calls]:
    """shoal as between machines."""
    return _shoal(nbytes, "tcp")


# --- raw ZeroMQ


@contextmanager
def raw_zmq(nbytes: int) -> Iterator[Calls]:
    """pyzmq and msgpack by hand: DEALER and ROUTER, blocks of 4 MiB, no copy where ZeroMQ allows it."""
    with _other_end("zmq", nbytes) as line, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.sndtimeo = dealer.rcvtimeo = int(TIMEOUT * 1000)
        dealer.connect(f"tcp://{_HOST}:{int(line)}")
        gradient, values = np.ones(nbytes // 4, np.float32), np.empty(nbytes // 4, np.float32)
        starts = range(0, nbytes, BLOCK_BYTES)
        outgoing, incoming = gradient.data.cast("B"), values.data.cast("B")

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
    router = zmq.Context().socket(zmq.ROUTER)
    _say(router.bind_to_random_port(f"tcp://{_HOST}"))
    weights, got = torch.zeros(nbytes // 4), 0
    live = weights.numpy().data.cast("B")
    while True:
        peer, header, *payload = router.recv_multipart(copy=False)
        what, at = msgpack.unpackb(header.buffer)
        if what == _PUSH:
            gradient = torch.frombuffer(payload[0].buffer, dtype=torch.float32)
            weights[at // 4 : at // 4 + len(gradient)].add_(gradient, alpha=-LR)
            got += 4 * len(gradient)
            if got == nbytes:
                got = 0
                router.send_multipart([peer, b""])
            continue
        for at in range(0, nbytes, BLOCK_BYTES):  # a copy: the next push must not change what is under way
            router.send_multipart([peer, msgpack.packb(at), bytes(live[at : at + BLOCK_BYTES])], copy=False)


# --- torch.distributed over gloo


@contextmanager
def gloo(nbytes: int) -> Iterator[Calls]:
    """`send` and `recv` of torch.distributed."""
    port = _free_port()
    with _other_end("gloo", nbytes, port):
        _join_gloo(port, 1)
        try:
            gradient, values, word = torch.ones(nbytes // 4), torch.empty(nbytes // 4), torch.zeros(1)

            def push() -> None:
                torch.distributed.send(word.fill_(_PUSH), 0)
                torch.distributed.send(gradient, 0)
                torch.distributed.recv(word, 0)

            def pull() -> Any:
                torch.distributed.send(word.fill_(_PULL), 0)
                torch.distributed.recv(values, 0)
                return values.numpy()

            yield {"push": push, "pull": pull}
            torch.distributed.send(word.fill_(0), 0)
        finally:
            torch.distributed.destroy_process_group()


def _join_gloo(port: int, rank: int) -> None:
    where = f"tcp://{_HOST}:{port}"
    torch.distributed.init_process_group("gloo", where, timedelta(seconds=TIMEOUT), world_size=2, rank=rank)


def _serve_gloo(nbytes: int, port: int) -> None:
    _say(port)
    _join_gloo(port, 0)
    weights, gradient, word = torch.zeros(nbytes // 4), torch.empty(nbytes // 4), torch.zeros(1)
    while True:
        torch.distributed.recv(word, 1)
        if word == _PUSH:
            torch.distributed.recv(gradient, 1)
            weights.add_(gradient, alpha=-LR)
            torch.distributed.send(word, 1)
        elif word == _PULL:
            torch.distributed.send(weights, 1)
        else:
            return


# --- torch RPC


class RpcStore:
    """Lives on the server; the worker holds a reference."""

    def __init__(self, elements: int) -> None:
        self._weights = torch.zeros(elements)

    def push(self, gradient: torch.Tensor) -> None:
        self._weights.add_(gradient, alpha=-LR)

    def pull(self) -> torch.Tensor:
        return self._weights


@contextmanager
def torch_rpc(nbytes: int) -> Iterator[Calls]:
    """torch.distributed.rpc over TensorPipe: a remote object, called synchronously."""
    from torch.distributed import rpc

    port = _free_port()
    with _other_end("rpc", nbytes, port):
        _join_rpc(port, "worker", 1)
        try:
            store, gradient = rpc.remote("server", RpcStore, (nbytes // 4,)), torch.ones(nbytes // 4)
            calls = {
                "push": lambda: store.rpc_sync(TIMEOUT).push(gradient),
                "pull": lambda: store.rpc_sync(TIMEOUT).pull().numpy(),
            }
            yield calls
            calls.clear()
        finally:
            rpc.shutdown(graceful=False)


def _join_rpc(port: int, name: str, rank: int) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4, rpc_timeout=TIMEOUT, init_method=f"tcp://{_HOST}:{port}"
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
    """An actor; arrays travel through Ray's shared-memory object store."""
    import ray

    store = max(200 * 10**6, min(2 * 10**9, 8 * nbytes))
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=store, log_to_driver=False, logging_level="ERROR",
        _system_config={"automatic_object_spilling_enabled": False},
    )  # fmt: skip
    try:

        class Store:
            def __init__(self, elements: int, lr: float) -> None:
                torch.set_num_threads(1)
                self._weights, self._lr = torch.zeros(elements), lr

            def push(self, gradient: Any) -> None:
                self._weights.add_(torch.from_numpy(gradient), alpha=-self._lr)

            def pull(self) -> Any:
                return self._weights.numpy()

        actor, gradient = ray.remote(Store).remote(nbytes // 4, LR), np.ones(nbytes // 4, np.float32)
        yield {
            "push": lambda: ray.get(actor.push.remote(gradient), timeout=TIMEOUT),
            "pull": lambda: ray.get(actor.pull.remote(), timeout=TIMEOUT),
        }
    finally:
        ray.shutdown()


CONTESTANTS: dict[str, Callable[[int], AbstractContextManager[Calls]]] = {
    "shoal": shoal_shm,
    "shoal over TCP": shoal_tcp,
    "raw ZeroMQ": raw_zmq,
    "gloo": gloo,
    "torch RPC": torch_rpc,
    "Ray actor": ray_actor,
}


def versions() -> dict[str, str]:
    """Of what takes part; "" for what is not installed."""
    try:
        import ray
    except ImportError:
        theirs = ""
    else:
        theirs = str(ray.__version__)
    return {"torch": str(torch.__version__), "pyzmq": zmq.pyzmq_version(), "numpy": np.__version__, "ray": theirs}


# --- the other end


@contextmanager
def _other_end(kind: str, *numbers: int) -> Iterator[bytes]:
    """Starts a server, and ends it. Gives the line that it says when it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, kind, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin and process.stdout
    try:
        yield process.stdout.readline()
    finally:
        process.stdin.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _free_port() -> int:
    """For libraries that cannot say which port they took. Another may take it in between; then they say so."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _say(port: int) -> None:
    print(port, flush=True)


def main(kind: str, *numbers: str) -> None:
    """The other end: says that it is ready, and serves until its standard input ends."""

    def watch() -> None:
        sys.stdin.read(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)
    serve: dict[str, Callable[..., None]] = {"zmq": _serve_zmq, "gloo": _serve_gloo, "rpc": _serve_rpc}
    serve[kind](*map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
