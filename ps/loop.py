"""The only file of the server side with sockets and a clock: it performs the effects of either core.

Rules
- One thread. Nothing here blocks but the poll; a peer that does not read fills its own backlog and nobody else's.
- A message that cannot be delivered is dropped: the protocol repeats what matters.
- Whatever bytes come in, the loop goes on; what could not be read is counted by the core.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, Protocol

import zmq
from zmq.backend import Socket as Bare
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from ..protocol.effects import (
    COORDINATOR,
    Attach,
    Attached,
    Effect,
    Linked,
    Log,
    Peer,
    Received,
    Send,
    Stop,
    Stream,
    Tick,
    Unreadable,
)
from ..protocol.errors import ConfigError, ProtocolError
from ..protocol.frames import MAX_BUFFER, decode, encode
from ..protocol.join import bracket
from ..protocol.messages import Message, Share
from .attach import Unfit, attach
from .backlog import Backlog
from .coordinator import Died
from .zap import Zap, secure

HIGH_WATER = 64
SEND_HIGH_WATER = 16
"""Messages that a socket takes for a peer that does not read: of a slow reader, so many blocks are pinned."""
BACKLOG_RETRY = 0.002
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.ENODEV)
SMALL = 65_536
"""Bytes below which a frame is copied into the socket: cheaper than to keep track of it."""
_MORE = zmq.NOBLOCK | zmq.SNDMORE
TURN = 128
"""Messages taken in before ticks and backlogs get their turn."""


class Core(Protocol):
    """What the loop knows of a core."""

    counters: Counter[str]

    @property
    def wake_at(self) -> float: ...

    def handle(self, event: Any, now: float) -> list[Effect]: ...


@dataclass(frozen=True, slots=True)
class Door:
    """Where a process listens, and its keys: raw 32 bytes each, or empty for no security.

    Args:
        public, secret: of this process. allowed: whom the handshake lets in.
        client_public, client_secret: with which a shard goes to the coordinator.
    """

    host: str
    port: int
    public: bytes = b""
    secret: bytes = b""
    allowed: tuple[tuple[str, bytes], ...] = ()
    client_public: bytes = b""
    client_secret: bytes = b""


class Listener:
    """The ROUTER socket, bound. Raises ConfigError if the address cannot be had."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], door: Door) -> None:
        self.zap = Zap(context, door.allowed) if door.secret else None
        socket = context.socket(zmq.ROUTER)
        tune(socket)
        socket.router_mandatory = True
        socket.ipv6 = ":" in door.host
        socket.setsockopt(zmq.BACKLOG, 512)
        if door.secret:
            secure(socket, door.secret)
        self.socket = socket
        self.monitor = socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        try:
            socket.bind(f"tcp://{bracket(door.host)}:{door.port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(_bind_problem(door, error), hint=_bind_hint(door, error)) from None
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(endpoint.rpartition(":")[2])

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        if self.zap:
            self.zap.close()


def tune(socket: zmq.Socket[bytes]) -> None:
    """What every socket of ours has in common."""
    socket.linger = 0
    socket.sndhwm, socket.rcvhwm = SEND_HIGH_WATER, HIGH_WATER
    socket.maxmsgsize = MAX_BUFFER
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    socket.setsockopt(zmq.HEARTBEAT_TTL, 10_000)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)


class _Gone(Exception):
    """Nobody is connected under this name any more."""


class Loop:
    """Runs one core until its parent closes standard input, or the core stops."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], listener: Listener, core: Core, label: str) -> None:
        self._context, self._listener, self._core, self._label = context, listener, core, label
        self._router = listener.socket
        self._dealer: zmq.Socket[bytes] | None = None
        self._dealer_monitor: zmq.Socket[bytes] | None = None
        self._backlogs: dict[bytes, Backlog] = {}
        self._to_coordinator: deque[Message] = deque()
        self._control = b""
        self._stop = False

    def join(self, host: str, port: int, server_key: bytes, door: Door) -> None:
        """Connect to the coordinator (for a shard)."""
        dealer = self._context.socket(zmq.DEALER)
        tune(dealer)
        dealer.immediate = True
        dealer.ipv6 = ":" in host
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 2000
        if server_key:
            dealer.curve_serverkey = z85.encode(server_key)
            dealer.curve_publickey = z85.encode(door.client_public)
            dealer.curve_secretkey = z85.encode(door.client_secret)
        self._dealer_monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(f"tcp://{bracket(host)}:{port}")
        self._dealer = dealer

    def run(self) -> None:
        """Until the end."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._listener.monitor, zmq.POLLIN)
        if self._listener.zap:
            poller.register(self._listener.zap.socket, zmq.POLLIN)
        if self._dealer is not None and self._dealer_monitor is not None:
            poller.register(self._dealer, zmq.POLLIN)
            poller.register(self._dealer_monitor, zmq.POLLIN)
        poller.register(sys.stdin.fileno(), zmq.POLLIN)
        self._give(Tick())
        while not self._stop:
            for source, _ in poller.poll(self._timeout()):
                if source is self._router:
                    self._receive(self._router, routed=True)
                elif source is self._dealer:
                    self._receive(self._dealer, routed=False)
                elif source is self._listener.monitor:
                    self._count_failures()
                elif source is self._dealer_monitor:
                    recv_monitor_message(self._dealer_monitor)
                    self._give(Linked(COORDINATOR))
                elif source == sys.stdin.fileno():
                    self._commands()
                elif self._listener.zap:
                    self._listener.zap.answer()
            self._flush()
            if time.monotonic() >= self._core.wake_at:
                self._give(Tick())

    def close(self) -> None:
        if self._dealer is not None and self._dealer_monitor is not None:
            self._dealer.disable_monitor()
            self._dealer_monitor.close(0)
            self._dealer.close(0)
        self._listener.close()

    # --- in

    def _timeout(self) -> int:
        """Milliseconds until something must be done unasked."""
        wake = self._core.wake_at
        if self._backlogs or self._to_coordinator:
            wake = min(wake, time.monotonic() + BACKLOG_RETRY)
        return -1 if wake == inf else max(0, ceil((wake - time.monotonic()) * 1000))

    def _receive(self, socket: zmq.Socket[bytes], routed: bool) -> None:
        for _ in range(TURN):
            try:
                frames = [Bare.recv(socket, zmq.NOBLOCK, False)]
            except zmq.Again:
                return
            while frames[-1].more:
                frames.append(Bare.recv(socket, zmq.NOBLOCK, False))
            peer: bytes | int = frames.pop(0).bytes if routed else COORDINATOR
            try:
                message = decode([frame.buffer for frame in frames])
            except ProtocolError as error:
                self._give(Unreadable(peer, error.reason))
            else:
                self._give(Received(peer, message))

    def _count_failures(self) -> None:
        while self._listener.monitor.poll(0):
            recv_monitor_message(self._listener.monitor)
            self._give(Unreadable(b"", "handshake"))

    def _commands(self) -> None:
        """The parent's words: a JSON object a line. The end of them is the end of this process."""
        data = os.read(sys.stdin.fileno(), 65536)
        if not data:
            self._stop = True
            return
        *lines, self._control = (self._control + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "died" in command:
                self._give(Died(str(command["died"])))

    # --- out

    def _give(self, event: Any) -> None:
        """A fault of ours is counted and logged; it must not take everybody's weights with it."""
        try:
            effects = self._core.handle(event, time.monotonic())
        except Exception as error:
            self._core.counters["rejected.internal"] += 1
            what = type(event.message).__name__ if isinstance(event, Received) else type(event).__name__
            log(self._label, "error", f"handling {what} failed: {type(error).__name__}: {error}")
            return
        for effect in effects:
            match effect:
                case Send(peer, message):
                    if isinstance(peer, bytes):
                        self._send(peer, message)
                    elif self._dealer is not None:
                        self._send_up(message)
                case Stream(peer, messages) if isinstance(peer, bytes):
                    self._backlogs.setdefault(peer, Backlog()).stream(messages)
                    self._flush_to(peer)
                case Log(level, text):
                    log(self._label, level, text)
                case Attach(peer, offer):
                    self._attach(peer, offer)
                case Stop():
                    self._stop = True

    def _attach(self, peer: Peer, offer: Share) -> None:
        try:
            event = Attached(peer, offer, attach(offer))
        except Unfit as unfit:
            event = Attached(peer, offer, None, str(unfit))
        self._give(event)

    def _send(self, peer: bytes, message: Message) -> None:
        waiting = self._backlogs.get(peer)
        if waiting is None:
            try:
                if self._try(peer, message):
                    return
            except _Gone:
                return
            waiting = self._backlogs[peer] = Backlog()
        waiting.add(message)

    def _try(self, peer: bytes, message: Message) -> bool:
        """False if the peer's pipe is full.

        Raises:
            _Gone: the peer is.
        """
        try:
            frames = encode(message)
        except Exception as error:
            log(self._label, "error", f"encoding {type(message).__name__} failed: {type(error).__name__}: {error}")
            return True
        last = len(frames) - 1
        try:
            Bare.send(self._router, peer, _MORE, True)
            for number, frame in enumerate(frames):
                Bare.send(self._router, frame, _MORE if number < last else zmq.NOBLOCK, len(frame) < SMALL)  # type: ignore[call-overload]
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise _Gone from None
        return True

    def _flush_to(self, peer: bytes) -> None:
        try:
            done = self._backlogs[peer].flush(lambda message: self._try(peer, message))
        except _Gone:
            done = True
        except Exception as error:
            done = False
            self._core.counters["rejected.internal"] += 1
            log(self._label, "error", f"an answer could not be made: {type(error).__name__}: {error}")
        if done:
            del self._backlogs[peer]

    def _send_up(self, message: Message) -> None:
        self._to_coordinator.append(message)
        if len(self._to_coordinator) > HIGH_WATER:  # the coordinator is gone; only the newest words matter
            self._to_coordinator.popleft()
        self._flush_up()

    def _flush(self) -> None:
        for peer in list(self._backlogs):
            self._flush_to(peer)
        self._flush_up()

    def _flush_up(self) -> None:
        assert self._dealer is not None or not self._to_coordinator
        while self._to_coordinator and self._dealer is not None:
            frames = encode(self._to_coordinator[0])
            last = len(frames) - 1
            try:
                for number, frame in enumerate(frames):
                    Bare.send(self._dealer, frame, zmq.NOBLOCK | _MORE * (number < last), len(frame) < SMALL)  # type: ignore[call-overload]
            except zmq.Again:  # of the first frame: the others have room behind it
                return
            self._to_coordinator.popleft()


def log(label: str, level: str, text: str) -> None:
    """One line on standard error, which the parent prefixes and prints. What came over the wire may hold anything."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{level} {label}: {text}")
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the log


def _bind_problem(door: Door, error: zmq.ZMQError) -> str:
    where = f"{bracket(door.host)}:{door.port}"
    if error.errno == zmq.EADDRINUSE:
        return f"port {door.port} on {door.host} is in use"
    if error.errno in _NOT_OURS:
        return f"{door.host} is not an address of this machine"
    return f"cannot listen on {where}: {error}"


def _bind_hint(door: Door, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "--port 0 for a free one, or stop what listens there (another shoal server? `shoal status` shows it)"
    return "--bind with an address that `ip address` shows" if error.errno in _NOT_OURS else ""
