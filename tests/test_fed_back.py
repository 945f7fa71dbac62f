"""What was fed back, read from the book in the order of its coming (rung T0)."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from shoal.protocol.tasking import Asked, Told
from shoal.tasks import book as book_module
from shoal.tasks.book import Closed, Open, SqliteBook


@pytest.fixture
def book(tmp_path: Path) -> Iterator[SqliteBook]:
    found = SqliteBook(tmp_path / "tasks.sqlite")
    yield found
    found.end()


def answered(book: SqliteBook, number: int, kind: str = "k", kept: bool = True) -> tuple[int, int]:
    """A task that was answered by version `v`; its inputs are its number."""
    id_ = 2**64 - 1, number
    asked = Asked(number, kind, "", 1, inf, 0.0, "" if kept else "site:a", inf, inf)
    book.add([Open(id_, asked, b"in %d" % number, 0.0)])
    book.close([Closed(id_, Told(number, "", "", "m", 1, "v", "x", 0.1), b"out", "", kept)])
    return id_


def test_rewards_and_examples(book: SqliteBook) -> None:
    """All rewards of a kind without data; with data those whose inputs and truth are both kept. After a place, so many."""
    for number in range(6):
        book.value(
            answered(book, number, "k" if number else "other", kept=number != 2),
            number / 10,
            b"" if number == 3 else b"t",
        )
    book.commit()
    rewards = [each for each, _, _ in book.fed_back("k", 0, 100, False)]
    assert [1, 2, 3, 4, 5] == [each.number for each in rewards]
    assert [True, False, False, True, True] == [each.kept for each in rewards]
    assert {(2**64 - 1, "v")} == {(each.owner, each.identity) for each in rewards}
    assert [0.1, 0.2, 0.3, 0.4, 0.5] == [each.reward for each in rewards]
    assert [(1, b"in 1", b"t"), (4, b"in 4", b"t"), (5, b"in 5", b"t")] == [
        (each.number, inputs, truth) for each, inputs, truth in book.fed_back("k", 0, 100, True)
    ]
    assert [4, 5] == [each.number for each, _, _ in book.fed_back("k", rewards[2].place, 100, True)]
    assert [2, 3] == [each.number for each, _, _ in book.fed_back("k", rewards[0].place, 2, False)]
    assert [] == book.fed_back("k", 2**64 - 1, 100, False) == book.fed_back("none", 0, 100, False)


def test_what_is_said_again_has_a_new_place(book: SqliteBook) -> None:
    """It comes once, with its last reward, after what was said before it."""
    first, second = answered(book, 1), answered(book, 2)
    book.value(first, 0.0, b"a")
    book.value(second, 0.5, b"b")
    (before, _, _), (other, _, _) = book.fed_back("k", 0, 9, False)
    book.value(first, 1.0, b"c")
    found = [(each.number, each.reward, truth) for each, _, truth in book.fed_back("k", 0, 9, True)]
    assert [(2, 0.5, b"b"), (1, 1.0, b"c")] == found
    assert [1] == [
        each.number for each, _, _ in book.fed_back("k", other.place, 9, False)
    ] and before.place < other.place


def test_a_message_is_not_larger_than_it_may_be(book: SqliteBook, monkeypatch: pytest.MonkeyPatch) -> None:
    """One example at least, however large; the rest when it is asked for."""
    monkeypatch.setattr(book_module, "MOST_RECALLED", 12)
    for number in range(4):
        book.value(answered(book, number), 1.0, b"t" if number else b"t" * 100)
    read, after = [], 0
    while found := book.fed_back("k", after, 100, True):
        read.append([each.number for each, _, _ in found])
        after = found[-1][0].place
    assert [[0], [1, 2], [3]] == read
