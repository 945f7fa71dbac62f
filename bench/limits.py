"""The limits of this machine, each measured the way `shoal bench pushpull` measures shoal.

What each is
- copy: `numpy.copyto` of the payload into a warm buffer, one thread. Any push or pull that is not shared memory does more.
- update: one step of the optimizer by torch, in place, one thread: the least that applying a push can cost. For `sgd`
  `w.add_(g, alpha=-lr)`; for `adam` torch's own fused one on the whole tensor.
- tcp: a bare socket to another process on loopback. Push: the payload goes, and one byte comes back when all of it has been
  received. Pull: one byte goes, and the payload comes back. The least that any transport over TCP can cost.
- zmq: a bare DEALER to a bare ROUTER in another process, a small header and a payload frame sent and received without a copy, cut
  into messages of one block (4 MiB), as shoal cuts it: a single message of 100 MB is slower. Push: answered by a small frame
  when all of it has come. Pull: asked for by a small frame. Neither copies the payload out of what ZeroMQ hands over.

Rules
- The other end is a process of its own (`python -m shoal.bench.limits KIND BYTES`) that ends when its standard input does.
- Buffers are written once before they are used: pages that nobody has touched are free to read, and no limit.
- Every wait has a time-out; for sockets it is the kernel's, because Python's own would poll before each call.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import zmq

from ..protocol.errors import ShoalError
from ..protocol.layout import BLOCK_BYTES

Calls = dict[str, Callable[[], object]]
"""What is timed, by name."""

TIMEOUT = 60.0
GRACE = 5.0
LR = 1e-6
_HOST = "127.0.0.1"
_PAYLOAD, _PULL, _DONE = 2, b"\1", b"\3"
_HEADER = bytes(32)


@contextmanager
def memory(nbytes: int, optimizer: str = "sgd") -> Iterator[Calls]:
    """The limits within this process: `copy` and `update`, by `sgd` or `adam`."""
    import numpy as np
    import torch

    source, target = np.ones(nbytes // 4, np.float32), np.ones(nbytes // 4, np.float32)
    weights, gradient = torch.from_numpy(target), torch.from_numpy(source)
    weights.grad = gradient
    adam = torch.optim.Adam([weights], lr=LR, fused=True)
    update: Callable[[], object] = adam.step if optimizer == "adam" else lambda: weights.add_(gradient, alpha=-LR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a shard has
    try:
        yield {"copy": lambda: np.copyto(target, source), "update": update}
    finally:
        torch.set_num_threads(threads)


@contextmanager
def tcp(nbytes: int) -> Iterator[Calls]:
    """The limit of TCP: `tcp_push` and `tcp_pull`."""
    with _other_end("tcp", nbytes) as port, socket.create_connection((_HOST, port), TIMEOUT) as line:
        _tune(line, TIMEOUT)
        payload, answer, target = _buffer(nbytes), bytearray(1), _buffer(nbytes)

        def push() -> None:
            line.sendall(payload)
            _receive(line, memoryview(answer))

        def pull() -> memoryview:
            line.sendall(_PULL)
            _receive(line, target)
            return target

        yield {"tcp_push": _or_error(push), "tcp_pull": _or_error(pull)}


@contextmanager
def zeromq(nbytes: int) -> Iterator[Calls]:
    """The limit of ZeroMQ: `zmq_push` and `zmq_pull`."""
    with _other_end("zmq", nbytes) as port, zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.sndtimeo = dealer.rcvtimeo = int(TIMEOUT * 1000)
        dealer.connect(f"tcp://{_HOST}:{port}")
        pieces = _pieces(nbytes)

        def push() -> None:
            for piece in pieces:
                dealer.send_multipart([_HEADER, piece], copy=False)
            dealer.recv_multipart(copy=False)

        def pull() -> list[zmq.Frame]:
            dealer.send_multipart([_HEADER], copy=False)
            return [dealer.recv_multipart(copy=False)[1] for _ in pieces]

        yield {"zmq_push": _or_error(push), "zmq_pull": _or_error(pull)}


@contextmanager
def _other_end(kind: str, nbytes: int) -> Iterator[int]:
    """Starts the other end, and ends it. Gives its port."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __spec__.name, kind, str(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the other
    )
    assert process.stdin and process.stdout
    try:
        ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        port = process.stdout.readline() if ready else b""
        if not port:
            raise ShoalError(f"the other end of the {kind} measurement did not start")
        yield int(port)
    finally:
        process.stdin.close()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _or_error(call: Callable[[], object]) -> Callable[[], object]:
    """The same call; the other end's death or silence is an error of ours."""

    def timed() -> object:
        try:
            return call()
        except (OSError, zmq.ZMQError) as error:
            raise ShoalError(f"the other end of a limit does not answer: {type(error).__name__}: {error}") from error

    return timed


def _tune(line: socket.socket, timeout: float = 0.0) -> None:
    """No delay; a time-out of the kernel's, 0 for none."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seconds, rest = divmod(timeout, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        line.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(rest * 1e6)))


def _receive(line: socket.socket, target: memoryview) -> None:
    """Fill `target`."""
    got = 0
    while got < len(target):
        count = line.recv_into(target[got:], 0, socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("it has hung up")
        got += count


def _buffer(nbytes: int) -> memoryview:
    return memoryview(bytearray([_PAYLOAD]) * nbytes)


def _pieces(nbytes: int) -> list[memoryview]:
    whole = _buffer(nbytes)
    return [whole[at : at + BLOCK_BYTES] for at in range(0, nbytes, BLOCK_BYTES)]


# --- the other end


def _serve_tcp(nbytes: int) -> None:
    with socket.create_server((_HOST, 0)) as server:
        _say(server.getsockname()[1])
        line, _ = server.accept()
    with line, suppress(ConnectionError):
        _tune(line)
        data = _buffer(nbytes)
        while count := line.recv_into(data):
            if data[:1] == _PULL:
                data[0] = _PAYLOAD
                line.sendall(data)
            else:
                _receive(line, data[count:])
                line.sendall(_DONE)


def _serve_zmq(nbytes: int) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    _say(router.bind_to_random_port(f"tcp://{_HOST}"))
    pieces, got = _pieces(nbytes), 0
    while True:
        peer, _, *payload = router.recv_multipart(copy=False)
        if not payload:
            for piece in pieces:
                router.send_multipart([peer, _HEADER, piece], copy=False)
            continue
        got += payload[0].buffer.nbytes
        if got == nbytes:
            got = 0
            router.send_multipart([peer, _HEADER], copy=False)


def _say(port: int) -> None:
    print(port, flush=True)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def main(kind: str, nbytes: str) -> None:
    """The other end: says its port, and serves until its standard input ends."""
    watch = threading.Thread(target=_end_with_parent, daemon=True)
    watch.start()
    {"tcp": _serve_tcp, "zmq": _serve_zmq}[kind](int(nbytes))
    watch.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
