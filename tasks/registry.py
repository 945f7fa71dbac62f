"""Versions of models on disk: immutable files named by what is in them, and an index of which is the one to serve.

    FOLDER/weights/SHA256.safetensors     what a version's parameters are
    FOLDER/cards/SHA256.json              what is known of it (`tasks.card`)
    FOLDER/index.sqlite                   numbers of versions by name, and what was promoted when

Rules
- A file is written whole under another name, made durable, and renamed; then the index has it. A crash leaves a file that nobody
  knows, never a version without its files.
- What is read is checked against its name. A bit that has changed on disk is an error, not a model.
- A version is promoted by a line in the index, and rolled back by another: at no moment are there none or two.
- Only what was evaluated is promoted: a card that has a quality.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..protocol.errors import ConfigError
from .card import Card, Cost, Lineage, Metrics

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"

PATIENCE = 10.0
"""Seconds to wait for another process that writes to the index."""
PROMOTE, ROLLBACK = "promote", "rollback"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS versions (
    name TEXT NOT NULL, version INTEGER NOT NULL, identity TEXT NOT NULL UNIQUE, PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL,
    what TEXT NOT NULL, why TEXT NOT NULL, at REAL NOT NULL,
    CHECK (what IN ('{PROMOTE}', '{ROLLBACK}'))
);
CREATE INDEX IF NOT EXISTS history_of_a_name ON history (name, number);
"""


@dataclass(frozen=True, slots=True)
class Change:
    """A line of a name's history: from `at` on (seconds since 1970) this version is served. `what`: PROMOTE or ROLLBACK."""

    name: str
    version: int
    what: str
    why: str
    at: float


class Registry:
    """A folder of versions. Several processes may use one at once; an object is for one thread.

    Args:
        folder: made if it is not there. now: seconds since 1970.

    Raises:
        ConfigError: the folder cannot be written, or what is in it is no registry.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self.folder, self._now = folder, now
        self._weights, self._cards = folder / "weights", folder / "cards"
        try:
            for part in (self._weights, self._cards):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._index = sqlite3.connect(folder / "index.sqlite", timeout=PATIENCE, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(
                f"models cannot be kept in {folder}: {error}", hint="--state-dir with a folder of yours"
            ) from None
        try:
            self._index.execute("PRAGMA journal_mode=WAL").close()
            self._index.execute("PRAGMA synchronous=FULL").close()
            self._index.executescript(_SCHEMA).close()
        except sqlite3.DatabaseError as error:
            self._index.close()
            raise ConfigError(f"{folder / 'index.sqlite'} is no index of models: {error}") from None

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- versions

    def publish(
        self,
        name: str,
        tensors: Tensors,
        *,
        quality: Mapping[str, Metrics] | None = None,
        cost: Cost | None = None,
        data: tuple[str, ...] = (),
        lineage: Lineage | None = None,
    ) -> Card:
        """Make a new version of these tensors, and number it. Arguments as in `Card`.

        Raises:
            ConfigError: the card would be none, or two names are of the same memory. OSError: the disk is full.
        """
        from safetensors.torch import save_file

        with self._unfinished(self._weights) as path:
            try:
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
            except RuntimeError as error:
                raise ConfigError(f"{name}: these tensors cannot be kept: {error}") from None
            return self.keep(name, path, quality=quality, cost=cost, data=data, lineage=lineage)

    def keep(
        self,
        name: str,
        file: Path,
        *,
        quality: Mapping[str, Metrics] | None = None,
        cost: Cost | None = None,
        data: tuple[str, ...] = (),
        lineage: Lineage | None = None,
    ) -> Card:
        """The same of a safetensors file in this registry's folder, which is moved away.

        Raises:
            ConfigError: the file is no safetensors file, or the card would be none.
        """
        _looked_at(file)
        weights, size = _digest(file), file.stat().st_size
        with self._writing():
            (newest,) = self._index.execute("SELECT max(version) FROM versions WHERE name = ?", (name,)).fetchone()
            made = (quality or {}, cost or Cost(), data, lineage or Lineage(), self._now())
            card = Card(name, (newest or 0) + 1, weights, size, *made)
            _durable(file)
            os.replace(file, self.path(card))
            with self._unfinished(self._cards) as path:
                path.write_bytes(card.packed)
                _durable(path)
                os.replace(path, self._card_path(card.identity))
            for folder in (self._weights, self._cards):
                _durable(folder)
            self._index.execute("INSERT INTO versions VALUES (?, ?, ?)", (name, card.version, card.identity))
        return card

    def names(self) -> tuple[str, ...]:
        """Of models, sorted."""
        return tuple(name for (name,) in self._index.execute("SELECT DISTINCT name FROM versions ORDER BY name"))

    def versions(self, name: str) -> tuple[Card, ...]:
        """Of a model, ascending; empty if there is none of this name."""
        rows = self._index.execute("SELECT identity FROM versions WHERE name = ? ORDER BY version", (name,)).fetchall()
        return tuple(self._read(identity) for (identity,) in rows)

    def find(self, name: str, version: int | None = None) -> Card:
        """A version; without a number the promoted one.

        Raises:
            ConfigError: there is none.
        """
        if version is None:
            promoted = self.promoted(name)
            if promoted is None:
                hint = "shoal models promote" if self.versions(name) else "shoal models ls"
                raise ConfigError(f"no version of {name!r} is promoted", hint=hint)
            return promoted
        row = self._index.execute(
            "SELECT identity FROM versions WHERE name = ? AND version = ?", (name, version)
        ).fetchone()
        if row is None:
            raise ConfigError(f"there is no version {version} of {name!r}", hint="shoal models ls")
        return self._read(row[0])

    # --- which is served

    def promoted(self, name: str) -> Card | None:
        """The version to serve, if there is one."""
        stack = self._stack(name)
        return self.find(name, stack[-1]) if stack else None

    def promote(self, name: str, version: int, why: str = "") -> Card:
        """Serve this one from now on.

        Raises:
            ConfigError: there is none, or it was never evaluated.
        """
        with self._writing():
            card = self.find(name, version)
            if not card.quality:
                raise ConfigError(
                    f"{card} was never evaluated: its card has no quality",
                    hint="publish it with metrics=…, and promote that",
                )
            self._change(Change(name, version, PROMOTE, why, self._now()))
        return card

    def rollback(self, name: str, why: str = "") -> Card:
        """Serve again what was served before the promotion that holds now.

        Raises:
            ConfigError: nothing was.
        """
        with self._writing():
            stack = self._stack(name)
            if len(stack) < 2:
                raise ConfigError(f"nothing was promoted before of {name!r}", hint="shoal models show")
            card = self.find(name, stack[-2])
            self._change(Change(name, card.version, ROLLBACK, why, self._now()))
        return card

    def history(self, name: str) -> tuple[Change, ...]:
        """From the first promotion on."""
        found = self._index.execute(
            "SELECT name, version, what, why, at FROM history WHERE name = ? ORDER BY number", (name,)
        )
        return tuple(Change(*row) for row in found)

    def _change(self, line: Change) -> None:
        self._index.execute(
            "INSERT INTO history (name, version, what, why, at) VALUES (?, ?, ?, ?, ?)",
            (line.name, line.version, line.what, line.why, line.at),
        )

    def _stack(self, name: str) -> list[int]:
        """Versions that are promoted and not rolled back, the newest last."""
        stack: list[int] = []
        for line in self.history(name):
            if line.what == PROMOTE:
                stack.append(line.version)
            else:
                stack.pop()
        return stack

    # --- what is in them

    def path(self, card: Card) -> Path:
        """Of the safetensors file."""
        return self._weights / f"{card.weights}.safetensors"

    def load(self, card: Card) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU.

        Raises:
            ConfigError: the file is gone, or is not what was published.
        """
        from safetensors.torch import load

        data = self._bytes(self.path(card), card.weights)
        return load(data)

    def export(self, card: Card, target: Path) -> None:
        """Write a version's safetensors file, whole or not at all.

        Raises:
            ConfigError: the file is gone or is not what was published, or the target is there or cannot be written.
        """
        data = self._bytes(self.path(card), card.weights)
        if target.exists():
            raise ConfigError(f"{target} is there already", hint="another name, or remove it")
        try:
            with self._unfinished(target.parent) as path:
                path.write_bytes(data)
                _durable(path)
                os.replace(path, target)
        except OSError as error:
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from None

    def _read(self, identity: str) -> Card:
        return Card.unpack(self._bytes(self._card_path(identity), identity))

    def _card_path(self, identity: str) -> Path:
        return self._cards / f"{identity}.json"

    def _bytes(self, path: Path, digest: str) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error.strerror}", hint="a copy of the folder, if there is one"
            ) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise ConfigError(
                f"{path} is not what was published: it was changed on disk", hint="a copy, if there is one"
            )
        return data

    # --- writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, all of it or nothing."""
        try:
            self._index.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"{self.folder / 'index.sqlite'} cannot be written: {error}",
                cause="another process has been writing to it for long, or the disk is full",
            ) from None
        try:
            yield
        except BaseException:
            self._index.execute("ROLLBACK")
            raise
        self._index.execute("COMMIT")

    @staticmethod
    @contextmanager
    def _unfinished(folder: Path) -> Iterator[Path]:
        """A file that is gone afterwards, if it was not renamed."""
        handle, name = tempfile.mkstemp(prefix=".unfinished-", dir=folder)
        os.close(handle)
        path = Path(name)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _looked_at(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:  # torch need not be here
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file.name} is no safetensors file: {error}") from None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _durable(path: Path) -> None:
    """On disk now, and not only in the machine's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
