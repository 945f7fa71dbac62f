"""`shoal models` and `shoal.registry`: what people type about versions of models (rungs T0, T3)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import shoal
from shoal import cli


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with two versions of a model, and one of another."""
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path))
    with shoal.registry() as models:
        for value in (1.0, 2.0):
            models.publish(
                "risk", {"w": torch.full((4,), value)}, quality={"risk": {"auc": value / 4}}, data=("site:a",)
            )
        models.publish("raw", {"w": torch.zeros(4)})
    return tmp_path


def typed(*words: str) -> Result:
    return CliRunner().invoke(cli.shoal, ["models", *words], standalone_mode=False)


def test_promote_show_roll_back_export(state: Path) -> None:
    """Each command by its name; what was promoted is what is exported."""
    assert "raw" in typed("ls").output and "not evaluated" in typed("ls").output
    assert "risk 1 is promoted\n" == typed("promote", "risk", "1").output
    assert "risk 2 is promoted\n" == typed("promote", "risk", "2", "--why", "better by 0.01").output
    found = json.loads(typed("show", "risk", "--json").output)
    assert (2, [1, 2]) == (found["promoted"], [card["version"] for card in found["versions"]])
    assert {"risk": {"auc": 0.5}} == found["versions"][1]["quality"] and ["site:a"] == found["versions"][1]["data"]
    assert "version 2: better by 0.01" in typed("show", "risk").output
    assert "risk 1 is promoted again\n" == typed("rollback", "risk").output
    assert [("raw", None), ("risk", 1)] == [
        (e["name"], e["promoted"]) for e in json.loads(typed("ls", "--json").output)
    ]

    assert "risk 1:" in typed("export", "risk", str(state / "one.safetensors")).output
    typed("export", "risk", str(state / "two.safetensors"), "--version", "2")
    assert [1.0, 2.0] == [load_file(state / f"{name}.safetensors")["w"][0].item() for name in ("one", "two")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("show", "rsik"), "no model 'rsik'; there are: raw, risk"),
        (("promote", "raw", "1"), "never evaluated"),
        (("promote", "risk", "3"), "no version 3 of 'risk'"),
        (("rollback", "risk"), "nothing was promoted before"),
        (("export", "risk", "file"), "no version of 'risk' is promoted"),
    ],
)
def test_mistakes_are_told(state: Path, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(shoal.ConfigError, match=told):
        raise typed(*words).exception or AssertionError("no error")


def test_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty registry says how the first version is made."""
    monkeypatch.setenv("SHOAL_STATE_DIR", str(tmp_path))
    assert "no models yet" in typed("ls").output
    assert [] == json.loads(typed("ls", "--json", "--state-dir", str(tmp_path / "other")).output)
