"""The benchmark of federated rounds: it measures what it says, and leaves nothing behind. No time is asserted (rungs T0, T3)."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

from shoal.bench import federated, fedtable, scale
from shoal.bench.arena import Arena
from shoal.bench.federated import main, read_parts, secure_sum, whole_rounds
from shoal.launch.settings import BadFlag
from shoal.protocol.errors import ConfigError
from shoal.protocol.rounds import Consent, Deal, Masked, Unmask
from shoal.ps.recipe import Recipe


def arena(clients: int = 5, **settings: Any) -> Arena:
    return Arena(clients, (60, 40), Recipe(**settings), lambda number: np.full(100, number / 10, np.float32))


def test_one_run_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is one JSON object; what is not installed is left out."""
    assert 0 == main("sum, scale", clients=[4], elements=[2000], simulated=[6, 9], rounds=3, repeat=1, as_json=True)
    report = json.loads(capsys.readouterr().out)

    assert {"machine", "repeat", "sum", "scale"} == set(report)
    (size,) = report["sum"]
    assert (4, 2000) == (size["clients"], size["elements"])
    ours = size["shoal"]
    assert ours["error"] < 1e-6
    assert 4 * 2000 < ours["said"] < 4 * 2000 + 5000, "four bytes an element"
    assert min(ours["client"], ours["server"], ours["slowest"]) > 0
    assert [6, 9] == [row["clients"] for row in report["scale"]["growth"]]
    assert all(row["released"] for row in report["scale"]["growth"])
    dropouts = report["scale"]["dropouts"]
    assert 3 == dropouts["released"] + dropouts["abandoned"]


def test_tables_say_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for people: also what was simulated, and that the other library is not here."""
    monkeypatch.setitem(sys.modules, "flwr", None)
    main("sum,scale", clients=[3], elements=[100], simulated=[6], rounds=2, repeat=1)
    shown = capsys.readouterr().out
    assert "3 x 100" in shown and "simulated: clients" in shown
    assert "Flower is not installed here: make bench-federated" in shown


def test_whole_rounds_are_of_a_real_cluster() -> None:
    """Clear and masked, each in processes of its own."""
    found = whole_rounds(3, 100, 2, 1)
    assert {"clear", "secagg"} <= set(found["seconds"])
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_a_simulated_round_is_a_round() -> None:
    """The average is that of the updates; in the clear it is the same, with fewer messages."""
    masked, clear = arena().round(), arena(protection="clear", clip=1.0).round()
    for costs in (masked, clear):
        assert costs.released and (1, 2, 3, 4, 5) == costs.members
        assert np.allclose(costs.average, 0.2, atol=1e-6)
    assert sum(clear.messages.values()) < sum(masked.messages.values())


@pytest.mark.parametrize(("stage", "members"), [(Deal, 4), (Masked, 4), (Unmask, 5)])
def test_who_drops_out_is_silent(stage: type[Any], members: int) -> None:
    """From the message on that it does not say; who has put its update in before is in the sum."""
    costs = arena().round({4: stage})
    assert costs.released and members == len(costs.members)
    assert np.allclose(costs.average, np.mean([0.0, 0.1, 0.2, 0.3, 0.4][:members]), atol=1e-6)


def test_too_few_end_in_no_sum() -> None:
    """Not in a wait; and the arena can go on with the next round."""
    room = arena()
    assert not room.round({2: Masked, 3: Masked, 4: Consent}).released
    assert room.round().released


def test_every_drop_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a chance of one nobody is left, and no round is released."""
    assert 2 == scale.dropouts(2, 5)["released"] + scale.dropouts(2, 5)["abandoned"]
    monkeypatch.setattr(scale, "DROPOUT", 1.0)
    assert (0, 2) == tuple(scale.dropouts(2, 5)[key] for key in ("released", "abandoned"))


def test_turns_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contestant begins as often; the first turn does not count."""
    begun: list[str] = []

    def of(name: str) -> Any:
        def run() -> Any:
            begun.append(name)
            return np.zeros(8), {"client": float(len(begun))}

        return run

    monkeypatch.setattr(federated, "_shoal", lambda updates, weights: of("a"))
    monkeypatch.setattr(federated, "_flower", lambda updates, weights: {"flower": of("b")})
    found = secure_sum(3, 8, 2)
    assert ["a", "b", "b", "a", "a", "b"] == begun
    assert (4.5, 4.5) == (found["shoal"]["client"], found["flower"]["client"])


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is not there, and a plot without what draws it."""
    assert federated.PARTS == read_parts(" ")
    with pytest.raises(BadFlag, match="no part 'speed'"):
        read_parts("sum,speed")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib"):
        main("sum", save="somewhere")


def test_no_plot_of_what_was_not_measured(tmp_path: Any) -> None:
    fedtable.draw({"sum": []}, tmp_path / "federated")
    assert [] == list(tmp_path.iterdir())
