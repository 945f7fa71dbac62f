"""A registry as a dispatcher uses it: versions in pieces, in and out, and which of them are promoted.

Rules
- What executors fetch is read from the file it lies in. It was checked when it was published, and is by who fetches it.
- What is uploaded is a file that nobody knows until all of it is there and its SHA-256 is right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..protocol.errors import ConfigError
from ..protocol.schema import Buffer
from .card import HEX, Card, Cost, Lineage
from .registry import Registry

PIECE = 4 * 1024 * 1024
MAX_WEIGHTS = 1 << 40
MAX_UPLOADS = 16
"""Files that are uploaded at once."""
_FIELDS = {"name", "quality", "cost", "data", "lineage"}


class Library(Protocol):
    """What the core reads and writes versions with. Whatever is wrong raises `ConfigError`."""

    def names(self) -> Sequence[str]: ...

    def versions(self, name: str) -> Sequence[Card]: ...

    def promoted(self, name: str) -> Card | None: ...

    def find(self, name: str, version: int | None = None) -> Card: ...

    def promote(self, name: str, version: int, why: str = "") -> Card: ...

    def rollback(self, name: str, why: str = "") -> Card: ...

    def history(self, name: str) -> Sequence[Mapping[str, Any]]: ...

    def piece(self, weights: str, offset: int) -> tuple[int, bytes]:
        """How many bytes the file has, and those from here on: at most `PIECE`."""
        ...

    def take(self, weights: str, total: int, offset: int, piece: Buffer) -> int:
        """A piece of an upload. Returns how many bytes are there."""
        ...

    def publish(self, weights: str, about: Buffer) -> Card:
        """Make a version of what was uploaded."""
        ...

    def end(self) -> None: ...


class Shelf:
    """A `Library` of a folder.

    Raises:
        ConfigError: as `Registry`.
    """

    def __init__(self, folder: Path) -> None:
        self._registry = Registry(folder)
        self._folder = folder
        self._uploads: dict[str, Path] = {}

    def end(self) -> None:
        """Close it; what was not uploaded whole is gone."""
        for path in self._uploads.values():
            path.unlink(missing_ok=True)
        self._registry.close()

    def names(self) -> Sequence[str]:
        return self._registry.names()

    def versions(self, name: str) -> Sequence[Card]:
        return self._registry.versions(name)

    def promoted(self, name: str) -> Card | None:
        return self._registry.promoted(name)

    def find(self, name: str, version: int | None = None) -> Card:
        return self._registry.find(name, version)

    def promote(self, name: str, version: int, why: str = "") -> Card:
        return self._registry.promote(name, version, why)

    def rollback(self, name: str, why: str = "") -> Card:
        return self._registry.rollback(name, why)

    def history(self, name: str) -> Sequence[Mapping[str, Any]]:
        return [
            {"name": line.name, "version": line.version, "what": line.what, "why": line.why, "at": line.at}
            for line in self._registry.history(name)
        ]

    def piece(self, weights: str, offset: int) -> tuple[int, bytes]:
        try:
            with self._file(weights).open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                file.seek(offset)
                return total, file.read(PIECE)
        except OSError as error:
            raise ConfigError(f"the weights {weights[:12]} cannot be read: {error.strerror}") from None

    def _file(self, weights: str) -> Path:
        if len(weights) != HEX or not set(weights) <= set("0123456789abcdef"):
            raise ConfigError("weights are named by a SHA-256 in hex")
        return self._folder / "weights" / f"{weights}.safetensors"

    def take(self, weights: str, total: int, offset: int, piece: Buffer) -> int:
        known = self._file(weights)
        if known.exists():
            return total
        if not 0 < total <= MAX_WEIGHTS:
            raise ConfigError(f"weights of {total} bytes")
        path = self._uploads.get(weights)
        if path is None:
            if len(self._uploads) >= MAX_UPLOADS:
                _, oldest = self._uploads.popitem()
                oldest.unlink(missing_ok=True)
            path = self._uploads[weights] = known.with_name(f".unfinished-{weights}")
            path.write_bytes(b"")
        size = path.stat().st_size
        if offset == size and size + len(piece) <= total:
            try:
                with path.open("ab") as file:
                    size += file.write(piece)
            except OSError as error:
                path.unlink(missing_ok=True)
                del self._uploads[weights]
                raise ConfigError(
                    f"weights cannot be kept: {error.strerror}", hint="room on the server's disk"
                ) from None
        return size

    def publish(self, weights: str, about: Buffer) -> Card:
        told = _about(about)
        known, path = self._file(weights), self._uploads.get(weights)
        if path is not None:
            with path.open("rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == weights
            if not right:
                path.unlink()
                del self._uploads[weights]
                raise ConfigError("what was uploaded is not what was said: another SHA-256", hint="publish it again")
        elif known.exists():
            path = known.with_name(f".unfinished-{weights}")
            path.unlink(missing_ok=True)
            os.link(known, path)
        else:
            raise ConfigError("nothing was uploaded under this SHA-256", hint="publish it again")
        try:
            card = self._registry.keep(told.pop("name"), path, **told)
        finally:
            path.unlink(missing_ok=True)
            self._uploads.pop(weights, None)
        return card


def _about(about: Buffer) -> dict[str, Any]:
    """What is to be on a card, from JSON."""
    try:
        told = json.loads(bytes(about))
        if type(told) is not dict or set(told) != _FIELDS or type(told["name"]) is not str:
            raise ConfigError(f"a version is told by {', '.join(sorted(_FIELDS))}")
        quality = {kind: dict(metrics) for kind, metrics in told["quality"]}
        lineage = Lineage(**{**told["lineage"], "data": tuple(told["lineage"]["data"])})
        return {
            **told,
            "quality": quality,
            "cost": Cost(**told["cost"]),
            "data": tuple(told["data"]),
            "lineage": lineage,
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"what was told of a version cannot be read: {error}") from None
