"""The benchmark of overlapping: every variant runs, and the flags do what they say (rung T3)."""

from __future__ import annotations

import json

import pytest

from shoal.bench import overlap


def test_variants_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, few turns, without and with all of it: figures for each; with overlap all gradients leave early."""
    monkeypatch.setattr(overlap, "VARIANTS", {name: overlap.VARIANTS[name] for name in ("neither", "both")})
    assert 0 == overlap.main(width=40, layers=3, steps=1, repeat=3, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert 4 * 3 * 40 * 41 == report["bytes"]
    assert ["real", "emulated"] == list(report["runs"])
    for run in report["runs"].values():
        assert list(overlap.VARIANTS) == list(run["step_seconds"])
        assert all(seconds > 0 for seconds in run["step_seconds"].values())
        assert 1.0 == run["share_early"]
    assert 0.0 == report["runs"]["real"]["compute_seconds"] < report["runs"]["emulated"]["compute_seconds"]
    overlap._show(report)
    assert "emulated" in capsys.readouterr().out
