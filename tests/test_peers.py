"""The benchmark beside others: everybody does the work, in turns, and who does not is found out (rungs T0 and T3)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.bench import peers, rivals
from shoal.protocol.errors import ShoalError


def honest(step: float) -> Any:
    """One that moves its weights by `step` a push."""

    @contextmanager
    def contestant(nbytes: int) -> Iterator[rivals.Calls]:
        weights = np.zeros(nbytes // 4, np.float32)
        yield {"push": lambda: np.subtract(weights, step, out=weights), "pull": lambda: weights}

    return contestant


@contextmanager
def missing(nbytes: int) -> Iterator[rivals.Calls]:
    raise ImportError("No module named 'rival'")
    yield {}


def test_who_does_not_do_the_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights must be those that the pushes have made; who is not installed is named, with the reason."""
    everybody = {"shoal": honest(rivals.LR), "absent": missing}
    monkeypatch.setattr(rivals, "CONTESTANTS", everybody)
    found = peers.measured(400, 3)
    assert ({"shoal"}, {"absent": "No module named 'rival'"}) == (set(found["seconds"]), found["absent"])
    assert all(found["seconds"]["shoal"][way] > 0 for way in ("push", "pull"))

    monkeypatch.setattr(rivals, "CONTESTANTS", everybody | {"lazy": honest(0.0)})
    with pytest.raises(ShoalError, match="lazy: 250 pushes have made 0.0"):
        peers.measured(400, 3)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """As PNG and as SVG, with a line for each; one that is missing at a size has a gap."""
    pytest.importorskip("matplotlib")
    rows = [
        {"bytes": 400, "seconds": {"shoal": {"push": 1e-3, "pull": 1e-3}, "other": {"push": 2e-3, "pull": 2e-3}}},
        {"bytes": 4000, "seconds": {"shoal": {"push": 1e-3, "pull": 1e-3}}},
    ]
    peers.draw({"sizes": rows}, str(tmp_path / "peers"))
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "peers.svg").read_text()


def test_everybody_takes_part() -> None:
    """Real processes, once round: each that is installed has figures."""
    command = [sys.executable, "-m", "shoal.cli", "bench", "peers", "--sizes", "400", "--repeat", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert 0 == done.returncode, done.stderr
    report = json.loads(done.stdout)
    (size,) = report["sizes"]
    assert set(rivals.CONTESTANTS) == set(size["seconds"]) | set(size["absent"])
    assert {"shoal", "shoal over TCP", "raw ZeroMQ", "gloo", "torch RPC"} <= set(size["seconds"])
    assert bool(report["versions"]["ray"]) == ("Ray actor" in size["seconds"])
    assert report["versions"]["torch"]
