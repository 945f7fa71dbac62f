"""Garbage at every socket of a running cluster: no crash, no growth, an honest count (rungs T0, T3)."""

from __future__ import annotations

import os
import random
import socket
import struct

import msgpack
import numpy as np
import psutil
import zmq
from conftest import until

import shoal
from shoal.protocol.errors import ProtocolError
from shoal.protocol.frames import MAX_BUFFER, decode, encode
from shoal.protocol.messages import (
    Ack,
    Claim,
    Enter,
    Fill,
    Hello,
    Join,
    Leave,
    Probe,
    Pull,
    Push,
    Register,
    Renew,
    Report,
    Start,
)

MESSAGES = 100_000
SEED = int(os.environ.get("SHOAL_SEED", random.SystemRandom().randrange(2**32)))

VALID = [
    Join(7, "fuzz", 0, "host", 1),
    Renew(7, 1, 2, True, (("steps", 1.0),), (("loss", 0.5),), ((1, 2),)),
    Leave(7, 1, (), (), ()),
    Register(7, 2, (b"\x92\x90\x90",)),
    Claim(7, 3, "data", 2),
    Report(9, 1, 1, "", False, False, 0, False, 0, ((1, 2),), (("pushes", 1.0),)),
    Hello(7, 8, 1),
    Enter(7, 9, 1, 3),
    Start(7, 9, 2, 5),
    Fill(7, 9, 3, 1, (0,), (bytes(64),)),
    Push(7, 9, 4, 0, True, 1.0, ((0.1,),), 0, 3, (0, 1), (1, 0), False, 3, (bytes(8), bytes(16), bytes(16))),
    Pull(7, 9, 1, 0, 0, 0, 0, 1, (0, 1)),
    Probe(7, 9),
    Ack(7, 9, 1, False, 0, ((1, "shape", "no"),)),
]


def nasty(dice: random.Random) -> list[bytes]:
    """A message that should be refused, or at least do no harm."""
    kind = dice.randrange(8)
    frames = [bytes(frame) for frame in encode(dice.choice(VALID))]
    if kind == 0:
        return [dice.randbytes(dice.randrange(200)) for _ in range(dice.randrange(1, 4))]
    if kind == 1:  # bits flipped
        spoilt = bytearray(frames[0])
        for _ in range(dice.randrange(1, 4)):
            spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
        return [bytes(spoilt), *frames[1:]]
    if kind == 2:  # cut short
        return [frames[0][: dice.randrange(len(frames[0]))], *frames[1:]]
    if kind == 3:  # another version
        header = list(msgpack.unpackb(frames[0]))
        header[0] = dice.choice((0, 2, 99, -1))
        return [msgpack.packb(header), *frames[1:]]
    if kind == 4:  # frames too many or too few
        return frames[:-1] if len(frames) > 1 and dice.random() < 0.5 else [*frames, b"more"]
    if kind == 5:  # valid msgpack, nonsense
        return [
            msgpack.packb(
                [
                    1,
                    dice.randrange(70),
                    *[dice.choice((None, -5, "x", [], {}, 2**63, True)) for _ in range(dice.randrange(12))],
                ]
            )
        ]
    if kind == 6:  # deep, or long
        return [
            dice.choice(
                (b"\x91" * 1000, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", msgpack.packb([1, 10, "a" * 5000]))
            )
        ]
    return frames  # well formed, from nobody


def test_any_bytes_are_refused_or_read() -> None:
    """Decoding raises ProtocolError or returns a message, whatever the bytes; what it returns encodes to the same bytes."""
    dice = random.Random(SEED)
    print(f"SHOAL_SEED={SEED}")
    read = 0
    for _ in range(20_000):
        frames = nasty(dice)
        try:
            message = decode(frames)
        except ProtocolError:
            continue
        read += 1
        assert frames == [bytes(frame) for frame in encode(message)]
    assert read > 1000


def resident(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def test_a_hundred_thousand_nasty_messages() -> None:
    """Coordinator and shard take them in, count the refused ones, do not grow, and a worker trains on meanwhile."""
    dice = random.Random(SEED)
    print(f"SHOAL_SEED={SEED}")
    with shoal.LocalCluster() as cluster, shoal.connect(cluster.join) as worker:
        worker.register({"w": np.zeros(64, np.float32)}, optimizer=shoal.Delta())
        ports = [int(cluster.join.rpartition(":")[2]), int(cluster.status()["shards"][0]["address"].rpartition(":")[2])]
        pids = [cluster.pids["coordinator"], cluster.pids["shards"][0]]
        context = zmq.Context()
        dealers = []
        for port in ports:
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 10_000
            dealer.sndhwm = 1000
            dealer.connect(f"tcp://127.0.0.1:{port}")
            dealers.append(dealer)

        def throw(count: int) -> None:
            for number in range(count):
                dealer = dealers[number % 2]
                dealer.send_multipart(nasty(dice))
                while dealer.poll(0):
                    dealer.recv_multipart()

        throw(MESSAGES // 5)
        before = [resident(pid) for pid in pids]
        throw(MESSAGES - MESSAGES // 5)
        worker.push({"w": np.ones(64, np.float32)}).result(60)
        until(lambda: sum(cluster.status()["rejected"].values()) > MESSAGES / 3)
        after = [resident(pid) for pid in pids]

        for dealer in dealers:
            dealer.close(0)
        context.term()
        assert 1.0 == float(worker.pull()["w"][0])
        rejected = cluster.status()["rejected"]
        assert {"garbage", "version", "malformed", "frames", "misplaced"} <= set(rejected)
        assert sum(rejected.values()) < MESSAGES
        for first, last in zip(before, after, strict=True):
            assert last - first < 16 * 1024 * 1024, f"grew from {first} to {last} bytes"
        assert [] == list(cluster._servers.endings())


def test_raw_bytes_and_oversized_frames() -> None:
    """Bytes that are no ZMTP, half a greeting, a frame that announces 4 GiB: the connection ends, the server lives and counts."""
    dice = random.Random(SEED)
    with shoal.LocalCluster() as cluster:
        port = int(cluster.join.rpartition(":")[2])
        pid = cluster.pids["coordinator"]
        before = resident(pid)
        for size in (0, 1, 11, 64, 5000):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(dice.randbytes(size))
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
        ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
        for announced in (MAX_BUFFER + 1, 2**32, 2**62):
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.settimeout(10)
                raw.sendall(greeting + ready + b"\x02" + struct.pack(">Q", announced) + bytes(1000))
                while raw.recv(4096):  # the server closes, it does not wait for the rest
                    pass

        until(lambda: cluster.status()["rejected"].get("handshake", 0) >= 1)
        assert resident(pid) - before < 16 * 1024 * 1024
