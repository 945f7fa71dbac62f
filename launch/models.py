"""`shoal models`: what is in this machine's registry, for people and as JSON."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..protocol.errors import ConfigError
from ..tasks.card import Card
from ..tasks.registry import Registry
from .keys import state_dir
from .report import human_bytes, number

FOLDER = "models"


def registry(directory: str = "") -> Registry:
    """The models of this machine: versions are published, promoted, rolled back, loaded. A context manager.

    Args:
        directory: the state directory; by default `$SHOAL_STATE_DIR`, else ~/.local/state/shoal.

    Raises:
        ConfigError: it cannot be written.
    """
    return Registry(state_dir(directory or os.environ.get("SHOAL_STATE_DIR", "")) / FOLDER)


def listing(models: Registry) -> list[dict[str, Any]]:
    """A line for each name."""
    found = []
    for name in models.names():
        promoted, cards = models.promoted(name), models.versions(name)
        found.append(
            {
                "name": name,
                "versions": len(cards),
                "promoted": promoted.version if promoted else None,
                "quality": {kind: dict(metrics) for kind, metrics in (promoted or cards[-1]).quality.items()},
                "bytes": sum({card.weights: card.size for card in cards}.values()),
            }
        )
    return found


def shown(models: Registry, name: str) -> dict[str, Any]:
    """Everything about one name.

    Raises:
        ConfigError: there is none of this name.
    """
    cards, promoted = models.versions(name), models.promoted(name)
    if not cards:
        known = ", ".join(models.names()) or "none yet"
        raise ConfigError(f"there is no model {name!r}; there are: {known}", hint="shoal models ls")
    return {
        "name": name,
        "promoted": promoted.version if promoted else None,
        "versions": [described(card) for card in cards],
        "history": [asdict(line) for line in models.history(name)],
    }


def described(card: Card) -> dict[str, Any]:
    """A card and its identity, as JSON says it."""
    quality = {kind: dict(metrics) for kind, metrics in card.quality.items()}
    return {"identity": card.identity, **asdict(card), "quality": quality}


def print_listing(found: list[dict[str, Any]]) -> None:
    """For people, on standard output."""
    if not found:
        Console().print(Text("no models yet; shoal.registry().publish(name, tensors, quality=…) makes one"))
        return
    table = _table("model", "versions", "promoted", "quality", "size")
    for each in found:
        promoted = str(each["promoted"] or "none")
        cells = (each["name"], str(each["versions"]), promoted, _quality(each["quality"]), human_bytes(each["bytes"]))
        table.add_row(*map(Text, cells))
    Console(highlight=False).print(table)


def print_shown(found: dict[str, Any]) -> None:
    """For people, on standard output."""
    console = Console(highlight=False)
    table = _table("", "version", "quality", "data", "published", "size", "weights")
    for each in found["versions"]:
        mark = "promoted" if each["version"] == found["promoted"] else ""
        data, size = " ".join(each["data"]) or "-", human_bytes(each["size"])
        quality, at = _quality(each["quality"]), _time(each["published"])
        table.add_row(*map(Text, (mark, str(each["version"]), quality, data, at, size, each["weights"][:12])))
    console.print(table)
    for line in found["history"]:
        why = f": {line['why']}" if line["why"] else ""
        console.print(Text(f"{_time(line['at'])}  {line['what']}  version {line['version']}{why}"))


def export(models: Registry, name: str, version: int | None, target: str) -> Card:
    """Write a version to a file; the promoted one without a number.

    Raises:
        ConfigError: there is no such version, or the file cannot be written.
    """
    card = models.find(name, version)
    models.export(card, Path(target))
    return card


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="dim")


def _quality(found: dict[str, dict[str, float]]) -> str:
    said = (f"{kind} {name} {number(value)}" for kind, metrics in found.items() for name, value in metrics.items())
    return ", ".join(said) or "not evaluated"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
