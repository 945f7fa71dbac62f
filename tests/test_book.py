"""The book of a dispatcher: what was committed is there again, and what was not is not (rung T0)."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from shoal.protocol.errors import ConfigError
from shoal.protocol.tasking import Asked, Told
from shoal.tasks import book as module
from shoal.tasks.book import Closed, Open, SqliteBook

OWNER = (1 << 64) - 3


def asked(number: int, privacy: str = "") -> Open:
    return Open(
        (OWNER, number), Asked(number, "kind", "", 2, inf, 0.5, privacy, inf, 9.0), b"in%d" % number, 100.0 + number
    )


def told(number: int, code: str = "", kept: bool = True) -> Closed:
    return Closed((OWNER, number), Told(number, code, "", "m", 3, "ab", "x", 0.25), b"out%d" % number, "why", kept)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tasks.sqlite"


def test_tasks_and_answers_outlive_the_process(path: Path) -> None:
    book = SqliteBook(path)
    book.add([asked(1), asked(2), asked(3)])
    book.add([asked(1)])
    book.close([told(1), told(2)])
    book.heard([(OWNER, 2)])
    book.put("note", "text")
    book.end()

    book = SqliteBook(path)
    assert [asked(3)] == list(book.open())
    ((closed),) = book.unheard()
    assert (told(1).told, b"out1", "why") == (closed.told, closed.output, closed.reason)
    assert {"note": "text"} == book.notes()
    line = book.find((OWNER, 2))
    assert line is not None and (told(2).told, "kind", 102.0, None) == (line.told, line.kind, line.came, line.reward)
    assert book.find((OWNER, 9)) is None and [3, 2, 1] == [line.id[1] for line in book.newest(9)]
    book.put("note", "")
    assert not book.notes()
    book.end()


def test_what_was_not_committed_is_not_there(path: Path) -> None:
    book = SqliteBook(path)
    book.add([asked(1)])
    book.commit()
    book.add([asked(2)])
    book.close([told(1)])
    book._writing = False  # the process dies
    book.end()

    book = SqliteBook(path)
    assert [asked(1)] == list(book.open()) and not book.unheard()
    book.end()


def test_a_task_is_closed_once(path: Path) -> None:
    book = SqliteBook(path)
    book.add([asked(1)])
    book.close([told(1)])
    book.close([Closed((OWNER, 1), told(1, "failed").told, b"late", "", True)])
    ((closed),) = book.unheard()
    assert b"out1" == closed.output and "" == closed.told.code
    book.end()


def test_feedback_counts_once_a_task_and_only_on_answers(path: Path) -> None:
    book = SqliteBook(path)
    book.add([asked(1), asked(2), asked(3, "site:a"), asked(4)])
    book.close([told(1), told(2, "deadline"), told(3, kept=False)])
    for number, reward in ((1, 0.5), (2, 1.0), (3, 0.75), (4, 1.0), (9, 1.0), (1, 0.25)):
        book.value((OWNER, number), reward, b"truth")
    assert [("ab", "kind", 0.75), ("ab", "kind", 0.25)] == list(book.rewards())
    ((found, inputs, truth),) = book.fed_back("kind", 0, 10, data=True)
    said = found.owner, found.number, found.reward, inputs, truth
    assert (OWNER, 1, 0.25, b"in1", b"truth") == said  # the other's inputs had a label, and are gone
    assert not book.fed_back("kind", found.place, 10, data=True) and not book.fed_back("other", 0, 10, data=True)
    assert [(3, False), (1, True)] == [(each.number, each.kept) for each, _, _ in book.fed_back("kind", 0, 10, False)]
    book.end()


def test_the_oldest_are_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 40)
    monkeypatch.setattr(module, "KEEP_BYTES", 60)
    book = SqliteBook(path)
    numbers = range(10, 110)
    book.add([asked(number) for number in numbers])
    book.close([told(number) for number in numbers])
    for number in numbers:
        book.value((OWNER, number), 1.0, b"t")
    book.heard([(OWNER, number) for number in numbers])
    book.commit()
    kept = [line.id[1] for line in book.newest(1000)]
    assert 40 == len(kept) and 109 == kept[0] and len(list(book.rewards())) <= 40
    assert 0 < len(book.fed_back("kind", 0, 1000, data=True)) < 12
    book.end()


def test_two_at_once_and_other_files(path: Path) -> None:
    book = SqliteBook(path)
    with pytest.raises(ConfigError, match="another server keeps its tasks"):
        SqliteBook(path)
    book.end()
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match="no book of tasks"):
        SqliteBook(path)
    with pytest.raises(ConfigError, match="cannot be kept"):
        SqliteBook(path / "below" / "tasks.sqlite")
