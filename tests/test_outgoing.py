"""Where effects gather: in order, once, and none for a ticket that nobody holds (rung T0)."""

from __future__ import annotations

from shoal.protocol.effects import Fail, Log, Open, Resolve, Send
from shoal.protocol.messages import Place, Probe
from shoal.worker.outgoing import Outgoing


def test_effects_come_out_in_order_and_once() -> None:
    """One `handle` gives what it has gathered, nothing for ticket 0; the next one begins with nothing."""
    out, error = Outgoing(), ValueError()
    out.note("info", "words")
    out.resolve(0, None)
    out.send(3, Probe(1, 2))
    out.open(Place(3, 9, "host", 7, "key"))
    out.fail(0, error)
    out.resolve(1, "value")
    out.fail(2, error)

    assert [
        Log("info", "words"),
        Send(3, Probe(1, 2)),
        Open(3, "host", 7, "key"),
        Resolve(1, "value"),
        Fail(2, error),
    ] == out.take()
    assert [] == out.take()


def test_a_waiting_list_is_told_once() -> None:
    """Telling a whole list empties it: the next one to end it tells nobody twice."""
    out, waiting, others, error = Outgoing(), [1, 0, 2], [3], ValueError()
    for _ in range(2):
        out.resolve_all(waiting, 5)
        out.fail_all(others, error)

    assert [Resolve(1, 5), Resolve(2, 5), Fail(3, error)] == out.take()
