"""What a reader does not take: in order, made when its turn comes, and bounded (rungs T0 and T3, SPEC §6.4.4)."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np
import psutil
import pytest
import zmq
from conftest import until

import shoal
from shoal.launch.inquiry import inquire
from shoal.protocol.frames import decode, encode
from shoal.protocol.join import JoinAddress
from shoal.protocol.messages import Echoed, Hello, Message, Pull, Values
from shoal.protocol.records import Place
from shoal.ps import backlog
from shoal.ps.backlog import Backlog
from shoal.ps.loop import SEND_HIGH_WATER


def said(request: int, size: int = 0) -> Echoed:
    return Echoed(request, (bytes(size),))


class Reader:
    """Takes so many messages."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, list[int]()

    def take(self, message: Message) -> bool:
        assert isinstance(message, Echoed)
        if self.room == 0:
            return False
        self.room -= 1
        self.taken.append(message.request)
        return True


def test_nothing_is_made_before_its_turn() -> None:
    """Messages and streams leave in order; a stream's next message is made when the one before it was taken."""
    made: list[int] = []

    def stream(*requests: int) -> Iterator[Message]:
        for request in requests:
            made.append(request)
            yield said(request, 10)

    waiting, reader = Backlog(), Reader(2)
    waiting.add(said(1, 5))
    waiting.stream(stream(2, 3, 4))
    waiting.add(said(5, 7))
    assert ([], 12) == (made, waiting.nbytes)
    assert not waiting.flush(reader.take)
    assert ([1, 2], [2, 3], 17) == (reader.taken, made, waiting.nbytes)

    reader.room = 9
    assert waiting.flush(reader.take)
    assert ([1, 2, 3, 4, 5], 0, 0) == (reader.taken, waiting.nbytes, len(waiting))


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the bound in bytes or in messages all is forgotten; of more than two streams, the oldest."""
    monkeypatch.setattr(backlog, "MOST_BYTES", 100)
    monkeypatch.setattr(backlog, "MOST_MESSAGES", 3)
    waiting, reader = Backlog(), Reader(99)
    for size in (60, 40, 1):
        waiting.add(said(1, size))
    assert (0, 0) == (len(waiting), waiting.nbytes)
    for request in range(4):
        waiting.add(said(request))
    assert 0 == len(waiting)

    for request in (1, 3, 5):
        waiting.stream(iter((said(request), said(request + 1))))
    assert waiting.flush(reader.take)
    assert [3, 4, 5, 6] == reader.taken


def test_what_cannot_be_made_is_left_out() -> None:
    """The error comes out; what follows is not held up by it."""

    def stream() -> Iterator[Message]:
        yield said(1)
        raise MemoryError

    waiting, reader = Backlog(), Reader(99)
    waiting.stream(stream())
    waiting.add(said(2))
    with pytest.raises(MemoryError):
        waiting.flush(reader.take)
    assert waiting.flush(reader.take)
    assert [1, 2] == reader.taken


ELEMENTS = 12 * 1024 * 1024
MIB = 1024 * 1024


def test_a_slow_reader_has_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """One asks eight times for 48 MiB and reads nothing, while each answer is of another version: two of them are kept.

    When it reads, what comes is whole and of one moment. The others notice nothing.
    """
    monkeypatch.setenv("SHOAL_TRANSPORT", "tcp")
    context = zmq.Context()
    with (
        shoal.LocalCluster(bind="127.0.0.1", shards=1, mode="async", staleness=inf) as cluster,
        shoal.connect(cluster.join) as worker,
        context.socket(zmq.DEALER) as slow,
    ):
        worker.register({"w": np.zeros(ELEMENTS, np.float32)}, optimizer=shoal.Delta())
        gradient = {"w": np.ones(ELEMENTS, np.float32)}
        for _ in range(3):
            worker.push(gradient).result()
            worker.pull()
        shard = psutil.Process(cluster.pids["shards"][0])
        (link,) = worker._core.fleet.links.values()
        slow.linger, slow.rcvhwm = 0, 1
        slow.connect(f"tcp://{link.address}")
        slow.send_multipart(encode(Hello(worker._core.incarnation, worker._core.fleet._run, 1)))
        assert slow.poll(10_000)
        slow.recv_multipart()
        before = shard.memory_info().rss
        for request in range(1, 9):
            slow.send_multipart(encode(Pull(worker._core.incarnation, link.shard, 1000 + request, 0, 0, 0, 0, 0, ())))
            asked = request + 3
            until(lambda asked=asked: _pulls(link.place) >= asked)  # type: ignore[misc]
            worker.push(gradient).result()
        grown = shard.memory_info().rss - before
        assert grown < 4 * MIB * SEND_HIGH_WATER + 2 * 4 * ELEMENTS + 48 * MIB, f"{grown / MIB:.0f} MiB"
        assert 11.0 == worker.pull()["w"][0]

        whole: dict[int, set[float]] = {}
        while slow.poll(2000):
            values = decode(slow.recv_multipart())
            if isinstance(values, Values):
                seen = whole.setdefault(values.request, set())
                seen |= {
                    float(value) for buffer in values.buffers for value in np.frombuffer(buffer, np.float32)[::4096]
                }
        assert 1008 in whole
        assert all(1 == len(seen) for seen in whole.values())
    context.term()


def _pulls(shard: Place) -> float:
    return float(inquire(JoinAddress(shard.host, shard.port, b"", b""), "status")["counters"]["pulls"])
