"""`shoal doctor`: which step on the way to a server fails.

Rules
- Each step uses as little as it can, so that the first failure is the cause; the steps after it are not tried.
- A step that fails says what to do.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import AuthError, ShoalError
from ..protocol.join import JoinAddress
from ..worker.greeting import mechanism
from .inquiry import Inquiry

TIMEOUT = 5.0
PAYLOAD = 4 * 1024 * 1024
ROUNDS = 5
SKEW = 2.0
"""Seconds by which clocks may differ before it is worth a word: logs and key lifetimes are read side by side."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One step. `code` is the exit code if it failed: 69 unavailable, 77 keys."""

    step: str
    ok: bool
    text: str
    hint: str = ""
    code: int = 69


def examine(address: JoinAddress) -> Iterator[Finding]:
    """The steps in order; the first that failed is the last."""
    steps: list[tuple[str, Callable[[], Finding]]] = [
        ("name", lambda: _name(address)),
        ("tcp", lambda: _tcp(address)),
        ("greeting", lambda: _greeting(address)),
    ]
    for _, step in steps:
        finding = step()
        yield finding
        if not finding.ok:
            return
    try:
        with Inquiry(address) as inquiry:
            yield from _protocol(inquiry, address)
    except ShoalError as error:
        code = 77 if isinstance(error, AuthError) else 69
        yield Finding("keys" if code == 77 else "version", False, error.what, error.hint, code)


def _name(address: JoinAddress) -> Finding:
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        return Finding(
            "name",
            False,
            f"{address.host!r} does not resolve: {getattr(error, 'strerror', '') or error}",
            "the server's IP address instead of its name",
        )
    return Finding("name", True, f"{address.host} is {', '.join(found)}")


def _tcp(address: JoinAddress) -> Finding:
    started = time.perf_counter()
    try:
        socket.create_connection((address.host, address.port), TIMEOUT).close()
    except ConnectionRefusedError:
        return Finding(
            "tcp", False, f"nothing listens at {address.address}", "is `shoal server` running there, on this port?"
        )
    except OSError as error:
        text = f"no connection to {address.address} within {TIMEOUT:g} s: {error.strerror or error}"
        return Finding("tcp", False, text, "a firewall, a wrong address, or a host that is down; try `ping`")
    return Finding("tcp", True, f"connected to {address.address} in {(time.perf_counter() - started) * 1000:.1f} ms")


def _greeting(address: JoinAddress) -> Finding:
    theirs, version = mechanism(address.host, address.port, TIMEOUT)
    if not version:
        return Finding("greeting", False, "what listens there does not speak ZeroMQ", "another program has this port")
    ours = "CURVE" if address.server_key else "NULL"
    if theirs != ours:
        told = (
            "asks for keys, and the join string has none"
            if theirs == "CURVE"
            else "speaks without keys, and the join string demands them"
        )
        return Finding("greeting", False, f"the server {told}", "the join string that this server printed", 77)
    return Finding("greeting", True, f"ZMTP {version}, mechanism {theirs}")


def _protocol(inquiry: Inquiry, address: JoinAddress) -> Iterator[Finding]:
    inquiry.connect(TIMEOUT)
    yield Finding("keys", True, "accepted" if address.server_key else "none needed")
    started = time.perf_counter()
    status, wall = inquiry.ask("status", TIMEOUT)
    took = time.perf_counter() - started
    yield Finding(
        "version", True, f"protocol 1, answered in {took * 1000:.1f} ms, {len(status['workers'])} workers known"
    )
    skew = wall - (time.time() - took / 2)
    words = f"the server's clock is {abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'}"
    yield Finding("clock", abs(skew) < SKEW, words, "let both machines take their time from the network (NTP)", 70)
    if abs(skew) >= SKEW:
        return
    yield _bandwidth("bandwidth", inquiry)
    for shard in status["shards"]:
        yield from _shard(shard, address)


def _shard(shard: dict[str, Any], address: JoinAddress) -> Iterator[Finding]:
    """A shard is reached at an address of its own."""
    host, _, port = shard["address"].rpartition(":")
    key = shard.get("key", "")
    from ..protocol.join import read_key

    place = JoinAddress(host, int(port), read_key(key, "key") if key else b"", address.secret)
    step = f"shard {shard['index']}"
    if shard["state"] != "live":
        yield Finding(
            step,
            False,
            f"has not reported for {shard['heard_seconds_ago']:.0f} s",
            f"is its process on {host} running?",
        )
        return
    reached = _tcp(place)
    if not reached.ok:
        yield Finding(step, False, reached.text, reached.hint)
        return
    with Inquiry(place) as inquiry:
        inquiry.connect(TIMEOUT)
        yield _bandwidth(step, inquiry)


def _bandwidth(step: str, inquiry: Inquiry) -> Finding:
    """Echoes: small ones for the round trip, large ones for the rate."""
    payload = bytes(PAYLOAD)
    trips, rates = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        inquiry.echo(b"", TIMEOUT)
        trips.append(time.perf_counter() - started)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        inquiry.echo(payload, 4 * TIMEOUT)
        rates.append(2 * PAYLOAD / (time.perf_counter() - started))
    return Finding(
        step,
        True,
        f"round trip {statistics.median(trips) * 1000:.2f} ms, {statistics.median(rates) / 1e6:.0f} MB/s there and back",
    )
