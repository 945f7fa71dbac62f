"""Off loopback: keys, the allow-list, and who is told what (rung T3). Loopback stands in for the network here."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from conftest import until
from zmq.utils import z85

import shoal
from shoal.launch import keys, servers
from shoal.launch.inquiry import inquire
from shoal.protocol.errors import AuthError, ConfigError
from shoal.protocol.frames import encode
from shoal.protocol.join import JoinAddress, read_join
from shoal.protocol.messages import Inquire
from shoal.ps.zap import Zap, secure


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[shoal.LocalCluster]:
    """A cluster that takes its address for one that others can reach."""
    monkeypatch.setattr(servers, "is_loopback", lambda host: False)
    with shoal.LocalCluster(shards=2, state_dir=str(tmp_path / "state")) as cluster:
        yield cluster


def other_key() -> bytes:
    return z85.decode(zmq.curve_keypair()[1])


def test_a_worker_with_the_join_string_trains(guarded: shoal.LocalCluster) -> None:
    """The join string carries everything: address, the server's key, the credential. Coordinator and shards take it."""
    address = read_join(guarded.join)
    assert (32, 32) == (len(address.server_key), len(address.secret))

    with shoal.connect(guarded.join) as worker:
        worker.register({"w": np.zeros(4096)}, optimizer=shoal.Delta())
        worker.push({"w": np.ones(4096)}).result()
        assert 1.0 == float(worker.pull()["w"][-1])
    assert "curve" == guarded.status()["security"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda a: replace(a, secret=other_key()), "does not have this join string's secret on its list"),
        (lambda a: replace(a, server_key=keys.public_of(other_key())), "holds another key than the join string says"),
        (lambda a: JoinAddress(a.host, a.port), "asks for keys, and the join string has none"),
    ],
)
def test_wrong_keys_are_told_apart_in_time(guarded: shoal.LocalCluster, spoil: object, told: str) -> None:
    """A wrong credential, a wrong server key, a missing key: AuthError within 5 s that says which. Counted, never silent."""
    wrong = str(spoil(read_join(guarded.join)))  # type: ignore[operator]
    started = time.monotonic()
    with pytest.raises(AuthError, match=told):
        shoal.connect(wrong, timeout=20)
    assert time.monotonic() - started < 5
    with pytest.raises(AuthError, match=told):
        inquire(read_join(wrong), "status")

    until(lambda: guarded.status()["rejected"].get("handshake", 0) >= 2)


def test_keys_against_a_server_without() -> None:
    """A join string with keys, at a server that speaks without: AuthError that says so."""
    with shoal.LocalCluster() as cluster:
        plain = read_join(cluster.join)
        wrong = JoinAddress(plain.host, plain.port, keys.public_of(other_key()), other_key())
        with pytest.raises(AuthError, match="speaks without keys, while the join string demands them"):
            shoal.connect(str(wrong), timeout=20)


def test_what_listens_is_no_shoal() -> None:
    """Something else has the port: it is said, in time."""
    import socket
    import threading

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def http() -> None:
            for _ in range(5):
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=http)
        thread.start()
        with pytest.raises(shoal.ShoalError, match="does not speak ZeroMQ"):
            shoal.connect(f"127.0.0.1:{other.getsockname()[1]}", timeout=10)
        other.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_insecure_is_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without keys off loopback only by --insecure, and every status says so."""
    monkeypatch.setattr(servers, "is_loopback", lambda host: False)
    with shoal.LocalCluster(insecure=True, state_dir=str(tmp_path)) as cluster:
        assert ("none", True) == (cluster.status()["security"], cluster.status()["insecure"])
        assert b"" == read_join(cluster.join).secret
        assert "keys.json" not in os.listdir(tmp_path)


def test_the_handler_refuses_what_is_not_on_its_list() -> None:
    """libzmq lets anybody in unless domain, enforcement and handler are all there: a random key fails with each of them gone."""
    (server_public, server_secret), (friend_public, friend_secret) = zmq.curve_keypair(), zmq.curve_keypair()

    def enters(secret: bytes, handler: bool) -> bool:
        context = zmq.Context()
        zap = Zap(context, [("friend", z85.decode(friend_public))]) if handler else None
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        secure(router, z85.decode(server_secret))
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.linger = router.linger = 0
        dealer.curve_serverkey, dealer.curve_secretkey = server_public, secret
        dealer.curve_publickey = zmq.curve_public(secret)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send_multipart(encode(Inquire(1, "status")))
        entered = False
        for _ in range(20):
            if zap:
                zap.answer()
            if router.poll(50):
                entered = True
                break
        for socket in (router, dealer):
            socket.close(0)
        if zap:
            zap.close()
        context.term()
        return entered

    stranger = zmq.curve_keypair()[1]
    assert enters(friend_secret, handler=True)
    assert not enters(stranger, handler=True)
    assert not enters(stranger, handler=False)
    assert not enters(friend_secret, handler=False)


def test_keys_on_disk(tmp_path: Path) -> None:
    """Made on first use, for their owner alone, the same the next time; refused when others can read them or they are spoilt."""
    first = keys.load_or_make(tmp_path / "state")
    path = tmp_path / "state" / keys.FILE

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [keys.FILE] == os.listdir(path.parent)
    again = keys.load_or_make(tmp_path / "state")
    assert (first.server_secret, first.enrol_secret) == (again.server_secret, again.enrol_secret)
    assert key_free(repr(first), first)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others .mode 640.*chmod 600"):
        keys.load_or_make(tmp_path / "state")
    path.chmod(0o600)
    for spoilt in ("", "{}", '{"server": "short", "enrol": ""}', "[]"):
        path.write_text(spoilt)
        with pytest.raises(ConfigError, match="is not a key file"):
            keys.load_or_make(tmp_path / "state")


def key_free(text: str, held: keys.Keys) -> bool:
    """No secret shows in a text."""
    from shoal.protocol.join import key_text

    return not any(
        key_text(secret) in text or repr(secret) in text for secret in (held.server_secret, held.enrol_secret)
    )


def test_secrets_show_nowhere(guarded: shoal.LocalCluster, tmp_path: Path) -> None:
    """Not in arguments or environments of server processes, not in the status, not in an error."""
    held = keys.load_or_make(tmp_path / "state")
    for pid in [guarded.pids["coordinator"], *guarded.pids["shards"]]:
        seen = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert key_free(seen.decode("utf-8", "replace"), held)
    assert key_free(str(guarded.status()), held)
    assert key_free(repr(read_join(guarded.join)), held)
    with pytest.raises(ConfigError) as caught:
        read_join(guarded.join[:-3])
    assert key_free(str(caught.value), held)
