"""Versions of models on disk: immutable, whole or not there, promoted and rolled back in one step (rungs T0, T3)."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoal.protocol.errors import ConfigError
from shoal.tasks import registry as module
from shoal.tasks.card import Cost, Lineage
from shoal.tasks.registry import PROMOTE, ROLLBACK, Registry

QUALITY = {"risk": {"auc": 0.9}}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), value), "b": torch.tensor([value], dtype=torch.bfloat16)}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    ticks = iter(range(1000, 2000))
    with Registry(tmp_path / "models", lambda: float(next(ticks))) as made:
        yield made


def test_a_version_is_kept_with_its_card(registry: Registry) -> None:
    """What comes back is what was published, bit by bit; numbers rise by name; another process sees the same."""
    lineage = Lineage(7, "sync", 40, data=("shared",))
    card = registry.publish("risk", tensors(), quality=QUALITY, cost=Cost(0.01), data=("site:a",), lineage=lineage)
    assert ("risk", 1, 1000.0) == (card.name, card.version, card.published)
    assert (QUALITY, ("site:a",), lineage) == (card.quality, card.data, card.lineage)
    again = registry.publish("risk", tensors(2.0))
    other = registry.publish("other", tensors())
    assert (2, 1) == (again.version, other.version)
    assert card.weights == other.weights != again.weights, "the same parameters are one file"

    with Registry(registry.folder) as second:
        assert ("other", "risk") == second.names()
        assert (card, again) == second.versions("risk")
        found = second.load(second.find("risk", 1))
        assert {"w", "b"} == set(found)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors().items())


def test_promoted_and_rolled_back(registry: Registry) -> None:
    """The history is kept; rolling back twice goes back twice; what was rolled back may be promoted again."""
    for value in (1.0, 2.0, 3.0):
        registry.publish("risk", tensors(value), quality=QUALITY)
    assert registry.promoted("risk") is None
    with pytest.raises(ConfigError, match="no version of 'risk' is promoted"):
        registry.find("risk")
    for version in (1, 2, 3):
        registry.promote("risk", version, "better")
    served = [
        registry.find("risk").version,
        registry.rollback("risk", "worse").version,
        registry.rollback("risk").version,
    ]
    assert [3, 2, 1] == served
    with pytest.raises(ConfigError, match="nothing was promoted before"):
        registry.rollback("risk")
    registry.promote("risk", 3)
    promoted = registry.promoted("risk")
    assert promoted is not None and 3 == promoted.version
    assert [PROMOTE] * 3 + [ROLLBACK] * 2 + [PROMOTE] == [line.what for line in registry.history("risk")]
    assert [1, 2, 3, 2, 1, 3] == [line.version for line in registry.history("risk")]
    assert ("better", "worse") == (registry.history("risk")[0].why, registry.history("risk")[3].why)


def test_only_what_was_evaluated_is_promoted(registry: Registry) -> None:
    """And only what is there."""
    registry.publish("risk", tensors())
    with pytest.raises(ConfigError, match="never evaluated"):
        registry.promote("risk", 1)
    with pytest.raises(ConfigError, match="no version 2"):
        registry.promote("risk", 2)
    assert registry.promoted("risk") is None and () == registry.history("risk")


def test_an_export_opens_anywhere(registry: Registry, tmp_path: Path) -> None:
    """With plain safetensors. What is there is not overwritten."""
    card = registry.publish("risk", tensors())
    registry.export(card, tmp_path / "risk.safetensors")
    assert torch.equal(tensors()["w"], load_file(tmp_path / "risk.safetensors")["w"])
    with pytest.raises(ConfigError, match="is there already"):
        registry.export(card, tmp_path / "risk.safetensors")
    with pytest.raises(ConfigError, match="cannot be written"):
        registry.export(card, tmp_path / "nowhere" / "risk.safetensors")


@pytest.mark.parametrize("part", ["weights", "cards"])
def test_a_flipped_bit_is_found(registry: Registry, part: str) -> None:
    """In what is loaded or exported, and in a card."""
    registry.publish("risk", tensors())
    (file,) = (registry.folder / part).iterdir()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="is not what was published"):
        registry.load(registry.find("risk", 1))
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        registry.load(registry.find("risk", 1))


def test_a_failure_leaves_no_version(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full between the files and the index; nothing unfinished is left lying about."""
    monkeypatch.setattr(module, "_durable", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        registry.publish("risk", tensors())
    monkeypatch.undo()
    assert () == registry.versions("risk")
    assert 1 == registry.publish("risk", tensors()).version
    assert not list(registry.folder.rglob(".unfinished-*"))


def test_what_cannot_be_kept(registry: Registry, tmp_path: Path) -> None:
    """Tensors of one memory, a file that is none, a card that is none, a folder that is none."""
    both = torch.zeros(4)
    with pytest.raises(ConfigError, match="cannot be kept"):
        registry.publish("risk", {"a": both, "b": both})
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="no safetensors file"):
        registry.keep("risk", wrong)
    with pytest.raises(ConfigError, match="whose name"):
        registry.publish("a\nb", tensors())
    with pytest.raises(ConfigError, match="cannot be kept in"):
        Registry(wrong)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "index.sqlite").write_bytes(b"no index " * 200)
    with pytest.raises(ConfigError, match="no index of models"):
        Registry(folder)
    assert () == registry.names()


PUBLISHER = """
import os, sys, torch
from pathlib import Path
from shoal.tasks.registry import Registry
with Registry(Path(sys.argv[1])) as mine:
    for number in range(5):
        card = mine.publish("risk", {"w": torch.full((3,), os.getpid() + number)}, quality={"risk": {"auc": 0.9}})
        mine.promote("risk", card.version)
"""


def test_several_processes_number_their_versions(tmp_path: Path) -> None:
    """Each number once, and every promotion in the history."""
    Registry(tmp_path).close()
    started = [subprocess.Popen([sys.executable, "-c", PUBLISHER, tmp_path]) for _ in range(3)]
    assert [0, 0, 0] == [process.wait(60) for process in started]
    with Registry(tmp_path) as found:
        assert list(range(1, 16)) == [card.version for card in found.versions("risk")]
        assert 15 == len(found.history("risk"))


def test_a_writer_that_does_not_end_is_not_waited_for(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which file."""
    other = sqlite3.connect(registry.folder / "index.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with Registry(registry.folder) as hasty, pytest.raises(ConfigError, match=r"index\.sqlite cannot be written"):
        hasty.publish("risk", tensors())
    other.close()
