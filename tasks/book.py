"""What a dispatcher must not forget: tasks, answers, feedback, and which versions are tried. In SQLite.

Rules
- Nothing counts before `commit`: the core says what it promises after that.
- One process at a time: a second one is told so, and does not wait.
- What was answered and heard is kept for feedback, as much as `KEEP` and `KEEP_BYTES` say; the oldest go first.
- Data that have a label are not kept once their task is answered.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..protocol.errors import ConfigError
from ..protocol.schema import Buffer
from ..protocol.tasking import Asked, Recalled, Told

KEEP = 200_000
"""Answered tasks that are remembered."""
KEEP_BYTES = 256 * 1024 * 1024
"""Bytes of inputs and truths that are remembered of them."""
MOST_RECALLED = 8 * 1024 * 1024
"""Bytes of inputs and truths that are read at once."""
Id = tuple[int, int]
"""Of a task: the client's incarnation, and its number there."""


@dataclass(frozen=True, slots=True)
class Open:
    """A task that is not answered. `came`: seconds since 1970."""

    id: Id
    asked: Asked
    payload: Buffer
    came: float


@dataclass(frozen=True, slots=True)
class Closed:
    """A task that is answered. `kept`: are its inputs to be remembered? `reason`: why it went where it went."""

    id: Id
    told: Told
    output: Buffer
    reason: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Line:
    """What is remembered of a task."""

    id: Id
    kind: str
    privacy: str
    came: float
    told: Told | None
    reason: str
    reward: float | None


class Book(Protocol):
    """What the core writes to."""

    def open(self) -> Sequence[Open]:
        """Tasks that are not answered, in the order of their coming."""
        ...

    def unheard(self) -> Sequence[Closed]:
        """Answers that their clients have not confirmed."""
        ...

    def add(self, tasks: Sequence[Open]) -> None: ...

    def close(self, tasks: Sequence[Closed]) -> None: ...

    def heard(self, ids: Iterable[Id]) -> None: ...

    def find(self, id_: Id) -> Line | None:
        """A task; None where it is not remembered."""
        ...

    def newest(self, count: int) -> Sequence[Line]:
        """The tasks that came last, the newest first."""
        ...

    def value(self, id_: Id, reward: float, truth: Buffer) -> None:
        """Feedback on an answered task; what was said of it before counts no more."""
        ...

    def rewards(self) -> Iterable[tuple[str, str, float]]:
        """All feedback in the order of its coming: the version's identity, the kind of task, the reward."""
        ...

    def fed_back(self, kind: str, after: int, most: int, data: bool) -> Sequence[tuple[Recalled, Buffer, Buffer]]:
        """Feedback on a kind of task after a place, in the order of its coming, with inputs and truth.

        `data`: only where both are kept, and no more than fits a message. Otherwise all of it, without them.
        """
        ...

    def put(self, key: str, text: str) -> None:
        """A note; an empty one removes it."""
        ...

    def notes(self) -> dict[str, str]: ...

    def commit(self) -> None: ...

    def end(self) -> None: ...


_SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    place INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL, number INTEGER NOT NULL,
    kind TEXT NOT NULL, model TEXT NOT NULL, items INTEGER NOT NULL, latency REAL NOT NULL, quality REAL NOT NULL,
    privacy TEXT NOT NULL, budget REAL NOT NULL, deadline REAL NOT NULL, came REAL NOT NULL, input BLOB,
    state INTEGER NOT NULL DEFAULT 0, code TEXT, text TEXT, answered_by TEXT, version INTEGER, identity TEXT,
    executor TEXT, seconds REAL, output BLOB, reason TEXT,
    UNIQUE (owner, number)
);
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state, place) WHERE state < 2;
CREATE TABLE IF NOT EXISTS feedback (
    place INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL, number INTEGER NOT NULL,
    kind TEXT NOT NULL, identity TEXT NOT NULL, reward REAL NOT NULL, truth BLOB,
    UNIQUE (owner, number)
);
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
"""
OPEN, UNHEARD, OVER = range(3)
_SIGN = 1 << 64
_TOLD = "number, code, text, answered_by, version, identity, executor, seconds"
_SELECT_OPEN = f"""
SELECT owner, number, kind, model, items, latency, quality, privacy, budget, deadline, input, came FROM tasks
WHERE state = {OPEN} ORDER BY place
"""
_ADD = """
INSERT OR IGNORE INTO tasks
(owner, number, kind, model, items, latency, quality, privacy, budget, deadline, came, input)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_CLOSE = f"""
UPDATE tasks SET state = {UNHEARD}, code = ?, text = ?, answered_by = ?, version = ?, identity = ?, executor = ?,
seconds = ?, output = ?, reason = ?, input = CASE WHEN ? THEN input ELSE NULL END
WHERE owner = ? AND number = ? AND state = {OPEN}
"""
_HEARD = f"UPDATE tasks SET state = {OVER}, output = NULL WHERE owner = ? AND number = ? AND state = {UNHEARD}"
_VALUE = f"""
INSERT OR REPLACE INTO feedback (owner, number, kind, identity, reward, truth)
SELECT owner, number, kind, identity, ?, ? FROM tasks WHERE owner = ? AND number = ? AND state > {OPEN} AND code = ''
"""
_FED_BACK = """
SELECT f.place, f.owner, f.number, f.identity, f.reward, f.truth IS NOT NULL AND t.input IS NOT NULL AS kept, {data}
FROM feedback f LEFT JOIN tasks t ON t.owner = f.owner AND t.number = f.number
WHERE f.kind = ? AND f.place > ? {where} ORDER BY f.place LIMIT ?
"""
_REWARDS = _FED_BACK.format(data="x'', x''", where="")
_EXAMPLES = _FED_BACK.format(data="t.input, f.truth", where="AND kept")
_DROP_TASKS = f"""
DELETE FROM tasks WHERE place IN (SELECT place FROM tasks WHERE state = {OVER} ORDER BY place LIMIT ?)
"""
_DROP_INPUTS = f"""
UPDATE tasks SET input = NULL WHERE state = {OVER} AND place <= (
    SELECT place FROM (
        SELECT place, sum(length(input)) OVER (ORDER BY place DESC) AS upto FROM tasks
        WHERE state = {OVER} AND input IS NOT NULL
    ) WHERE upto > ? ORDER BY place DESC LIMIT 1
)
"""


class SqliteBook:
    """A file.

    Raises:
        ConfigError: it cannot be written, is no such file, or another dispatcher has it.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"tasks cannot be kept in {path.parent}: {error}", hint="--state-dir with a folder of yours"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"another server keeps its tasks in {path}", hint="--state-dir with another folder for this one"
            ) from None
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL").close()
            self._file.execute("PRAGMA synchronous=NORMAL").close()
            self._file.executescript(_SCHEMA).close()
        except sqlite3.Error as error:
            self._file.close()
            os.close(self._lock)
            raise ConfigError(f"{path} is no book of tasks: {error}") from None
        self._writing = False
        self._since = 0

    def end(self) -> None:
        """Close the file."""
        self.commit()
        self._file.close()
        os.close(self._lock)

    def _begin(self) -> sqlite3.Connection:
        if not self._writing:
            self._file.execute("BEGIN IMMEDIATE")
            self._writing = True
        return self._file

    def commit(self) -> None:
        if self._since >= KEEP // 20:
            self._since = 0
            self._forget()
        if self._writing:
            self._file.execute("COMMIT")
            self._writing = False

    def _forget(self) -> None:
        """The oldest, where there is too much."""
        file = self._begin()
        (over,) = file.execute(f"SELECT count(*) FROM tasks WHERE state = {OVER}").fetchone()
        if over > KEEP:
            file.execute(_DROP_TASKS, (over - KEEP,))
        file.execute("DELETE FROM feedback WHERE place <= (SELECT max(place) FROM feedback) - ?", (KEEP,))
        (size,) = file.execute(f"SELECT sum(length(input)) FROM tasks WHERE state = {OVER}").fetchone()
        if size is not None and size > KEEP_BYTES:
            file.execute(_DROP_INPUTS, (KEEP_BYTES // 2,))

    # --- tasks

    def open(self) -> Sequence[Open]:
        rows = self._file.execute(_SELECT_OPEN)
        return [Open((_id(row[0]), _id(row[1])), Asked(_id(row[1]), *row[2:10]), row[10], row[11]) for row in rows]

    def unheard(self) -> Sequence[Closed]:
        rows = self._file.execute(
            f"SELECT owner, {_TOLD}, output, reason FROM tasks WHERE state = {UNHEARD} ORDER BY place"
        )
        return [Closed((_id(row[0]), _id(row[1])), _told(row[1:9]), row[9], row[10], False) for row in rows]

    def add(self, tasks: Sequence[Open]) -> None:
        rows = []
        for task in tasks:
            a = task.asked
            needs = (a.latency, a.quality, a.privacy, a.budget, a.deadline)
            rows.append((*map(_signed, task.id), a.kind, a.model, a.items, *needs, task.came, task.payload))
        self._begin().executemany(_ADD, rows)

    def close(self, tasks: Sequence[Closed]) -> None:
        rows = []
        for task in tasks:
            t = task.told
            told = (t.code, t.text, t.model, t.version, t.identity, t.executor, t.seconds)
            rows.append((*told, task.output, task.reason, task.kept, *map(_signed, task.id)))
        self._begin().executemany(_CLOSE, rows)

    def heard(self, ids: Iterable[Id]) -> None:
        rows = [(_signed(owner), _signed(number)) for owner, number in ids]
        self._begin().executemany(_HEARD, rows)
        self._since += len(rows)

    def find(self, id_: Id) -> Line | None:
        found = self._lines("WHERE t.owner = ? AND t.number = ?", tuple(map(_signed, id_)))
        return found[0] if found else None

    def newest(self, count: int) -> Sequence[Line]:
        return self._lines("ORDER BY t.place DESC LIMIT ?", (count,))

    def _lines(self, where: str, values: tuple[int, ...]) -> list[Line]:
        told = ", ".join(f"t.{name}" for name in _TOLD.split(", "))
        rows = self._file.execute(
            f"SELECT t.owner, t.number, t.kind, t.privacy, t.came, t.state, t.reason, f.reward, {told} FROM tasks t "
            f"LEFT JOIN feedback f ON f.owner = t.owner AND f.number = t.number {where}",
            values,
        )
        return [
            Line((_id(owner), _id(number)), kind, label, came, _told(told) if state else None, reason or "", reward)
            for owner, number, kind, label, came, state, reason, reward, *told in rows
        ]

    # --- feedback

    def value(self, id_: Id, reward: float, truth: Buffer) -> None:
        owner, number = map(_signed, id_)
        self._begin().execute(_VALUE, (reward, bytes(truth) or None, owner, number))

    def rewards(self) -> Iterable[tuple[str, str, float]]:
        found: list[tuple[str, str, float]] = self._file.execute(
            "SELECT identity, kind, reward FROM feedback ORDER BY place"
        ).fetchall()
        return found

    def fed_back(self, kind: str, after: int, most: int, data: bool) -> Sequence[tuple[Recalled, Buffer, Buffer]]:
        found: list[tuple[Recalled, Buffer, Buffer]] = []
        size = 0
        rows = self._file.execute(_EXAMPLES if data else _REWARDS, (kind, min(after, _SIGN // 2 - 1), most))
        for place, owner, number, identity, reward, kept, inputs, truth in rows:
            size += len(inputs) + len(truth)
            if found and size > MOST_RECALLED:
                break
            recalled = Recalled(place, _id(owner), _id(number), identity, reward, bool(kept))
            found.append((recalled, inputs, truth))
        rows.close()
        return found

    # --- notes

    def put(self, key: str, text: str) -> None:
        if text:
            self._begin().execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, text))
        else:
            self._begin().execute("DELETE FROM notes WHERE key = ?", (key,))

    def notes(self) -> dict[str, str]:
        return dict(self._file.execute("SELECT key, text FROM notes").fetchall())


def _signed(number: int) -> int:
    """SQLite's integers have a sign."""
    return number - _SIGN if number >= _SIGN >> 1 else number


def _id(number: int) -> int:
    return number % _SIGN


def _told(row: Sequence[Any]) -> Told:
    number, code, text, model, version, identity, executor, seconds = row
    return Told(_id(number), code, text, model, version, identity, executor, seconds)
