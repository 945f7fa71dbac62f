"""The worker's end of a stream: nothing lost, nothing renumbered, never more than a window under way (rung T0, SPEC §5)."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shoal.protocol.messages import Operation, Push, Start
from shoal.worker import outbox
from shoal.worker.outbox import WINDOW, WINDOW_BYTES, Outbox


def push(size: int, seq: int) -> Operation:
    return Push(1, 2, seq, 3, False, 1.0, (), 0, 0, (0,), (), False, 0, (bytes(size),))


def numbers(operations: list[Any]) -> list[int]:
    return [operation.seq for operation in operations]


@pytest.mark.parametrize("seed", range(20))
def test_an_outbox_is_a_list_with_a_window(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added, sent, acknowledged, asked for again: numbers in order, each until acknowledged, within the window.

    Beside it goes a list that does the same slowly; the window is 4 operations and 100 bytes.
    """
    monkeypatch.setattr(outbox, "WINDOW", 4)
    monkeypatch.setattr(outbox, "WINDOW_BYTES", 100)
    dice, box, sizes = random.Random(seed), Outbox(), [0]
    acknowledged = sent = furthest = 0  # numbers; `furthest` was sent before a rewind
    for _ in range(1000):
        match dice.choice(("add", "add", "send", "send", "acknowledge", "rewind")):
            case "add":
                sizes.append(dice.choice((0, 1, 30, 50, 99, 100, 101, 500)))
                box.add(push(sizes[-1], box.next), ticket=len(sizes) + 1000)
            case "send":
                wanted = []
                while sent + 1 < len(sizes):
                    under_way = sizes[acknowledged + 1 : sent + 1]
                    if under_way and (len(under_way) >= 4 or sum(under_way) + sizes[sent + 1] > 100):
                        break
                    sent += 1
                    wanted.append((sent, sizes[sent]))
                assert wanted == [(one.seq, len(one.buffers[0])) for one in box.due()]  # type: ignore[union-attr]
            case "acknowledge":  # old news, or news that overtakes a rewind
                seq = dice.randint(max(0, acknowledged - 1), furthest)
                ended = [(number, number + 1001) for number in range(acknowledged + 1, seq + 1)]
                assert ended == box.acknowledge(seq)
                acknowledged, sent = max(acknowledged, seq), max(sent, seq)
            case "rewind":
                received = dice.randint(0, sent)
                back = max(received, acknowledged)
                assert sent - back == box.rewind(received)
                sent = back
        furthest = max(furthest, sent)
        kept = sizes[acknowledged + 1 :]
        assert (len(kept), sum(kept), sent) == (len(box), box.nbytes, box.sent)
        assert (len(sizes) - 1, acknowledged) == (box.last, box.acknowledged)
        assert {number + 1001 for number in range(acknowledged + 1, len(sizes))} == box.tickets()


def test_the_window_is_that_of_the_specification() -> None:
    """SPEC §2.3: 16 MiB and 1,024 operations under way, but always at least one."""
    many, large = Outbox(), Outbox()
    for _ in range(WINDOW + 5):
        many.add(Start(1, 2, many.next, 3))
    for _ in range(3):
        large.add(push(WINDOW_BYTES + 1, large.next))

    assert (1024, 16 * 1024 * 1024) == (WINDOW, WINDOW_BYTES)
    assert list(range(1, WINDOW + 1)) == numbers(many.due())
    assert [] == many.due()
    assert [1] == numbers(large.due())
    large.acknowledge(1)
    assert [2] == numbers(large.due())
    assert set() == many.tickets()  # ticket 0: nobody waits
