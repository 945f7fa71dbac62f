"""`shoal doctor`: for each step that can fail, that it is this one which is named, and nothing after it is tried (rung T2)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from shoal.launch import doctor
from shoal.launch.doctor import Finding, examine
from shoal.protocol.errors import AuthError, NoServerError, VersionError
from shoal.protocol.join import JoinAddress, key_text

KEYS = (b"k" * 32, b"s" * 32)
NULL, CURVE = (b"\xff" + bytes(8) + b"\x7f\x03\x01" + name.ljust(20, b"\0") + bytes(32) for name in (b"NULL", b"CURVE"))


@contextmanager
def speaking(greeting: bytes) -> Iterator[int]:
    """A listener that says these bytes to everybody. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


class Fake:
    """Stands in for an `Inquiry`: a server that answers as the test says."""

    status: dict[str, Any]
    wall: float
    errors: dict[str, Exception]
    asked: list[JoinAddress]

    def __init__(self, address: JoinAddress) -> None:
        self.asked.append(address)

    def connect(self, timeout: float) -> None:
        self._do("connect")

    def ask(self, what: str, timeout: float) -> tuple[dict[str, Any], float]:
        self._do("ask")
        return self.status, self.wall

    def echo(self, payload: bytes, timeout: float) -> None:
        self._do("echo")

    def _do(self, what: str) -> None:
        if what in self.errors:
            raise self.errors[what]

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """The protocol is answered by a `Fake` whose clock is ours; names, TCP and greetings are real."""
    Fake.status, Fake.errors, Fake.asked, Fake.wall = {"workers": [], "shards": []}, {}, [], 5000.0
    monkeypatch.setattr(doctor, "Inquiry", Fake)
    monkeypatch.setattr(doctor.time, "time", lambda: 5000.0)
    return Fake


def shard(port: int, **changed: Any) -> dict[str, Any]:
    return {"index": 3, "address": f"127.0.0.1:{port}", "state": "live", "heard_seconds_ago": 0.1} | changed


def fail(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def last(found: Iterator[Finding], *before: str) -> Finding:
    """The finding that failed, after these that did not; it is the last."""
    findings = list(found)
    assert [*before] == [finding.step for finding in findings[:-1] if finding.ok]
    assert not findings[-1].ok
    return findings[-1]


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is given back, for the eye to see the mistake in it."""
    monkeypatch.setattr(socket, "getaddrinfo", fail(socket.gaierror(socket.EAI_NONAME, "Name or service not known")))
    found = last(examine(JoinAddress("exmaple.org", 7450)))

    assert ("name", 69) == (found.step, found.code)
    assert "'exmaple.org' does not resolve: Name or service not known" == found.text
    assert "IP address" in found.hint


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is there, the port is not: is the server running? A packet filter that swallows it is another cause."""
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    found = last(examine(JoinAddress("127.0.0.1", port)), "name")

    assert ("tcp", f"nothing listens at 127.0.0.1:{port}", 69) == (found.step, found.text, found.code)
    assert "`shoal server` running there" in found.hint
    monkeypatch.setattr(socket, "create_connection", fail(TimeoutError("timed out")))
    found = last(examine(JoinAddress("127.0.0.1", port)), "name")

    assert ("tcp", f"no connection to 127.0.0.1:{port} within 5 s: timed out") == (found.step, found.text)
    assert "firewall" in found.hint


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n" + bytes(64), b"", b"\xff" + bytes(8) + b"\x7f"])
def test_another_program_has_the_port(greeting: bytes) -> None:
    """It speaks something else, says nothing, or stops in the middle of a greeting."""
    with speaking(greeting) as port:
        found = last(examine(JoinAddress("127.0.0.1", port)), "name", "tcp")

    assert ("greeting", "what listens there does not speak ZeroMQ", 69) == (found.step, found.text, found.code)


@pytest.mark.parametrize(
    ("greeting", "keys", "told"),
    [
        (CURVE, (), "the server asks for keys, and the join string has none"),
        (NULL, KEYS, "the server speaks without keys, and the join string demands them"),
    ],
)
def test_keys_on_one_side_only(greeting: bytes, keys: tuple[bytes, ...], told: str) -> None:
    """Seen in the greeting, before a handshake fails without a word; it is a matter of keys (77)."""
    with speaking(greeting) as port:
        found = last(examine(JoinAddress("127.0.0.1", port, *keys)), "name", "tcp")

    assert ("greeting", told, 77) == (found.step, found.text, found.code)


@pytest.mark.parametrize(
    ("where", "error", "step", "code"),
    [
        ("connect", AuthError("it holds another key", hint="do this"), "keys", 77),
        ("connect", NoServerError("it cannot be reached", hint="do this"), "version", 69),
        ("ask", VersionError("it speaks another", hint="do this"), "version", 69),
    ],
)
def test_what_the_protocol_says(fake: type[Fake], where: str, error: Any, step: str, code: int) -> None:
    """A refused handshake is a matter of keys; the error's own words and hint are shown."""
    fake.errors = {where: error}
    with speaking(CURVE) as port:
        found = list(examine(JoinAddress("127.0.0.1", port, *KEYS)))[-1]

    assert Finding(step, False, error.what, "do this", code) == found


@pytest.mark.parametrize(("ahead", "words"), [(2.5, "3.000 s ahead"), (-60.0, "59.500 s behind")])
def test_clocks_that_differ(fake: type[Fake], monkeypatch: pytest.MonkeyPatch, ahead: float, words: str) -> None:
    """Logs and key lifetimes are read side by side: over two seconds it is said which way, and that ends it."""
    monkeypatch.setattr(doctor.time, "perf_counter", count().__next__)  # an answer takes 1 s: half of it to come
    fake.wall = 5000.0 + ahead
    with speaking(NULL) as port:
        found = last(examine(JoinAddress("127.0.0.1", port)), "name", "tcp", "greeting", "keys", "version")

    assert ("clock", f"the server's clock is {words}", 70) == (found.step, found.text, found.code)
    assert "NTP" in found.hint


def test_a_shard_that_is_lost_or_not_reached(fake: type[Fake]) -> None:
    """Its process has ended, or its own port is not let through: the shard is named, and the others are looked at, too."""
    with socket.create_server(("127.0.0.1", 0)) as once:
        closed = once.getsockname()[1]
    with speaking(NULL) as port:
        fake.status["shards"] = [
            shard(port, state="lost", heard_seconds_ago=42.4),
            shard(closed, index=4),
            shard(port, index=5),
        ]
        found = list(examine(JoinAddress("127.0.0.1", port)))[-3:]

    assert [
        ("shard 3", False, "has not reported for 42 s"),
        ("shard 4", False, f"nothing listens at 127.0.0.1:{closed}"),
    ] == [(finding.step, finding.ok, finding.text) for finding in found[:2]]
    assert ("shard 5", True) == (found[2].step, found[2].ok)


def test_all_is_well(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step in order; a shard is asked at its own address with its own key and our credential."""
    with speaking(CURVE) as port:
        fake.status |= {"workers": [{}, {}], "shards": [shard(port, key=key_text(b"o" * 32))]}
        found = list(examine(JoinAddress("127.0.0.1", port, *KEYS)))

    assert ["name", "tcp", "greeting", "keys", "version", "clock", "bandwidth", "shard 3"] == [
        step.step for step in found
    ]
    assert all(step.ok for step in found)
    assert "ZMTP 3.1, mechanism CURVE" == found[2].text
    assert "2 workers known" in found[4].text
    assert "MB/s there and back" in found[-1].text
    assert [JoinAddress("127.0.0.1", port, *KEYS), JoinAddress("127.0.0.1", port, b"o" * 32, KEYS[1])] == fake.asked
