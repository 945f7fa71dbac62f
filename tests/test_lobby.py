"""Joins that wait: for shards, or for a name (rung T0, SPEC §3.1)."""

from __future__ import annotations

import pytest

from shoal.protocol.messages import Join
from shoal.ps.lobby import LASTS, Lobby


def joining(incarnation: int, name: str = "w") -> Join:
    return Join(incarnation, name, 0, "host", 1)


def test_those_who_wait_for_shards_are_let_in_in_order() -> None:
    """In the order of their coming, however often they repeat it; by the door that they used last; once."""
    lobby = Lobby()
    for peer, incarnation in ((b"a", 1), (b"b", 2), (b"c", 1)):
        lobby.wait(peer, joining(incarnation), 0.0)

    assert [(b"c", joining(1)), (b"b", joining(2))] == lobby.waiting(LASTS / 2)
    assert [] == lobby.waiting(LASTS / 2)


def test_who_does_not_repeat_a_join_is_forgotten() -> None:
    """Its process may be dead: admitting it would make the others wait for a lease."""
    lobby = Lobby()
    lobby.wait(b"dead", joining(1), 0.0)
    lobby.wait(b"alive", joining(2), 0.0)
    lobby.wait(b"alive", joining(2), LASTS)

    assert [b"alive"] == [peer for peer, _ in lobby.waiting(LASTS)]


def test_those_who_contest_a_name_are_told_once() -> None:
    """Those of that name, and no others."""
    lobby = Lobby()
    for incarnation, name in ((1, "w"), (2, "other"), (3, "w")):
        assert lobby.contest(b"peer", joining(incarnation, name))

    assert [1, 3] == [join.incarnation for _, join in lobby.contesting("w")]
    assert [] == list(lobby.contesting("w"))
    assert [2] == [join.incarnation for _, join in lobby.contesting("other")]


def test_both_lists_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is on a list stays there and may repeat; one more is not kept."""
    monkeypatch.setattr("shoal.ps.lobby.MOST", 2)
    lobby = Lobby()
    for incarnation in (1, 2, 3, 1):
        lobby.wait(b"peer", joining(incarnation), 0.0)

    assert [1, 2] == [join.incarnation for _, join in lobby.waiting(0.0)]
    assert [True, True, False, True] == [lobby.contest(b"peer", joining(i)) for i in (1, 2, 3, 1)]
