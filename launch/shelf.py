"""Where `shoal models` looks: a cluster's registry where a server is named, else the folder of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..protocol.errors import ConfigError
from ..protocol.join import read_join
from ..tasks.card import Card
from ..tasks.registry import Registry
from ..worker.taskclient import Client
from . import models
from .settings import JOIN, settle

TIMEOUT = 10.0


class Shelf(Protocol):
    """What the command does with either."""

    def listing(self) -> list[dict[str, Any]]: ...

    def shown(self, name: str) -> dict[str, Any]: ...

    def promote(self, name: str, version: int, why: str, canary: float) -> str: ...

    def rollback(self, name: str, why: str) -> str: ...

    def export(self, name: str, version: int | None, target: str) -> Card: ...


class Local:
    """This machine's folder."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def listing(self) -> list[dict[str, Any]]:
        return models.listing(self._registry)

    def shown(self, name: str) -> dict[str, Any]:
        return models.shown(self._registry, name)

    def promote(self, name: str, version: int, why: str, canary: float) -> str:
        if canary:
            raise ConfigError("a version is tried by a cluster's tasks", hint="--join with the cluster's join string")
        return str(self._registry.promote(name, version, why))

    def rollback(self, name: str, why: str) -> str:
        return str(self._registry.rollback(name, why))

    def export(self, name: str, version: int | None, target: str) -> Card:
        return models.export(self._registry, name, version, target)


class Remote:
    """A cluster's."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def listing(self) -> list[dict[str, Any]]:
        return self._client.models()

    def shown(self, name: str) -> dict[str, Any]:
        return self._client.model(name)

    def promote(self, name: str, version: int, why: str, canary: float) -> str:
        return f"{name} {self._client.promote(name, version, canary=canary, why=why)}"

    def rollback(self, name: str, why: str) -> str:
        return f"{name} {self._client.rollback(name, why=why)}"

    def export(self, name: str, version: int | None, target: str) -> Card:
        path = Path(target)
        if path.exists():
            raise ConfigError(f"{target} is there already", hint="another name, or remove it")
        card, data = self._client.download(name, version)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.write_bytes(data)
            fresh.replace(path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
        return card


def named_server(join: str | None) -> str:
    """The join string that was given, or is in the environment or in `shoal.toml`; or empty."""
    return str(settle([JOIN], {"join": join}, "worker")["join"])


@contextmanager
def shelf(state_dir: str, join: str | None) -> Iterator[Shelf]:
    """Opens it. A folder that was named comes first, then a server.

    Raises:
        NoServerError, ServerLost: the cluster has no dispatcher that answers. ConfigError: the folder cannot be used.
    """
    server = "" if state_dir else named_server(join)
    if server:
        with Client(read_join(server), timeout=TIMEOUT, wait_timeout=60.0) as client:
            yield Remote(client)
    else:
        with models.registry(state_dir) as registry:
            yield Local(registry)


@contextmanager
def patron(join: str | None) -> Iterator[Client]:
    """A client of the named cluster, else of the one on this machine. Raises as `Client`."""
    with Client(read_join(named_server(join) or "127.0.0.1"), timeout=TIMEOUT, wait_timeout=60.0) as client:
        yield client
