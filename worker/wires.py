"""The worker's sockets: one DEALER to each server, each watched by a monitor (SPEC §1, §10).

Rules
- Only the thread that drives the loop touches this.
- What goes wrong in a handshake is told, with the key that is at fault; nothing fails in silence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq
from zmq.backend import Socket as Bare
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from ..protocol.effects import Denied, Linked, Open, Received, Unlinked, Unreadable
from ..protocol.errors import ProtocolError
from ..protocol.frames import MAX_BUFFER, decode, encode
from ..protocol.join import bracket, read_key
from ..protocol.messages import Message
from .greeting import NOT_ZMTP, mechanism

HIGH_WATER = 1024
TURN = 64
SMALL = 65_536
"""Bytes below which a frame is copied into the socket: cheaper than to keep track of it."""
_MORE = zmq.NOBLOCK | zmq.SNDMORE
_MISMATCH = 0x11000002  # ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_PUZZLED_AFTER = 3
"""Handshakes in a row that end without a word before we look for the reason."""
_PLAIN = "speaks without keys, while the join string demands them"
_GREETING = 1.0
"""Seconds to wait for a greeting."""

Event = Linked | Unlinked | Denied | Received | Unreadable


@dataclass(slots=True)
class _Wire:
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    order: Open
    up: bool = False
    known: bool = False
    """Was it ever up? Then its keys are right."""
    failures: int = 0
    waiting: deque[Message] = field(default_factory=deque)


class Wires:
    """All connections of one worker.

    Args:
        secret: raw CURVE secret key from the join string, or empty.
    """

    def __init__(self, secret: bytes) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.poller = zmq.Poller()
        self._secret = z85.encode(secret) if secret else b""
        self._wires: dict[int, _Wire] = {}
        self._by_socket: dict[zmq.Socket[bytes], int] = {}

    def open(self, order: Open) -> None:
        """Connect; a connection under the same index is closed first."""
        self._close(order.peer)
        socket = self.context.socket(zmq.DEALER)
        socket.linger = 0
        socket.immediate = True
        socket.sndhwm = socket.rcvhwm = HIGH_WATER
        socket.maxmsgsize = MAX_BUFFER
        socket.ipv6 = ":" in order.host
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000
        for option, value in (
            (zmq.CONNECT_TIMEOUT, 5000),
            (zmq.HANDSHAKE_IVL, 5000),
            (zmq.HEARTBEAT_IVL, 2000),
            (zmq.HEARTBEAT_TIMEOUT, 10_000),
            (zmq.HEARTBEAT_TTL, 10_000),
        ):
            socket.setsockopt(option, value)
        if order.key and self._secret:
            socket.curve_serverkey = z85.encode(read_key(order.key, "server key"))
            socket.curve_secretkey = self._secret
            socket.curve_publickey = zmq.curve_public(self._secret)
        monitor = socket.get_monitor_socket()
        self._wires[order.peer] = _Wire(socket, monitor, order)
        for one in (socket, monitor):
            self._by_socket[one] = order.peer
            self.poller.register(one, zmq.POLLIN)
        socket.connect(f"tcp://{bracket(order.host)}:{order.port}")

    def send(self, peer: int, message: Message) -> None:
        """Send, or keep until the socket takes it. What is kept when the connection breaks is dropped."""
        wire = self._wires.get(peer)
        if wire is None:
            return
        if wire.waiting or not self._sent(wire, message):
            wire.waiting.append(message)

    def flush(self) -> bool:
        """Send what waits. True if something still does."""
        behind = False
        for wire in self._wires.values():
            if wire.waiting and self._flush(wire):
                behind = True
        return behind

    def _flush(self, wire: _Wire) -> bool:
        while wire.waiting:
            if not self._sent(wire, wire.waiting[0]):
                if not wire.up:
                    wire.waiting.clear()
                return bool(wire.waiting)
            wire.waiting.popleft()
        return False

    def _sent(self, wire: _Wire, message: Message) -> bool:
        """False if the socket does not take it now."""
        frames = encode(message)
        last = len(frames) - 1
        try:
            for number, frame in enumerate(frames):
                Bare.send(wire.socket, frame, _MORE if number < last else zmq.NOBLOCK, len(frame) < SMALL)  # type: ignore[call-overload]
        except zmq.Again:  # of the first frame: whoever takes that takes the others
            return False
        return True

    def events(self, ready: list[tuple[object, int]]) -> Iterator[Event]:
        """What has happened on sockets that the poller found ready."""
        for source, _ in ready:
            peer = self._by_socket.get(source)  # type: ignore[call-overload]
            if peer is None or peer not in self._wires:
                continue
            wire = self._wires[peer]
            if source is wire.socket:
                yield from self._received(peer, wire)
            elif source is wire.monitor:
                yield from self._noticed(peer, wire)

    def _received(self, peer: int, wire: _Wire) -> Iterator[Event]:
        for _ in range(TURN):
            try:
                frames = [Bare.recv(wire.socket, zmq.NOBLOCK, False)]
            except zmq.Again:
                return
            while frames[-1].more:
                frames.append(Bare.recv(wire.socket, zmq.NOBLOCK, False))
            try:
                message = decode([frame.buffer for frame in frames])
            except ProtocolError as error:
                yield Unreadable(peer, error.reason)
            else:
                yield Received(peer, message)

    def _noticed(self, peer: int, wire: _Wire) -> Iterator[Event]:
        while wire.monitor.poll(0):
            happened = recv_monitor_message(wire.monitor)
            match happened["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    wire.up = wire.known = True
                    wire.failures = 0
                    yield Linked(peer)
                case zmq.EVENT_DISCONNECTED if wire.up:
                    wire.up = False
                    wire.waiting.clear()
                    yield Unlinked(peer)
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    yield Denied(peer, "does not have this join string's secret on its list of keys")
                case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                    wire.failures += 1
                    if wire.failures % _PUZZLED_AFTER == 0 or happened["value"] == _MISMATCH:
                        why = _reason(wire.order, wire.known)
                        if why:
                            yield Denied(peer, why)

    def _close(self, peer: int) -> None:
        wire = self._wires.pop(peer, None)
        if wire is None:
            return
        for one in (wire.socket, wire.monitor):
            self.poller.unregister(one)
            del self._by_socket[one]
        wire.socket.disable_monitor()
        wire.monitor.close(0)
        wire.socket.close(0)

    def close(self) -> None:
        """Free everything."""
        for peer in list(self._wires):
            self._close(peer)
        self.context.term()


def _reason(order: Open, known: bool) -> str:
    """Why handshakes fail; "" if it is not for good (a server that is stopped or busy, a proxy whose server is down).

    ZeroMQ tells it by chance: the side that hangs up first leaves the other without a word.
    """
    theirs, _ = mechanism(order.host, order.port, _GREETING)
    if theirs == NOT_ZMTP and not known:
        return "does not speak ZeroMQ"
    if theirs == "CURVE" and not order.key:
        return "asks for keys, and the join string has none"
    if theirs == "CURVE" and not known:
        return "holds another key than the join string says"
    return _PLAIN if theirs == "NULL" and order.key else ""
