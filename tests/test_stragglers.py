"""The race of stragglers: what it plans, what it makes of what it sees, one short run of everything (rungs T0 and T3)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from math import inf, isfinite, nan
from pathlib import Path

import psutil
import pytest

from shoal import cli
from shoal.bench import racer, standings, stragglers
from shoal.bench.stragglers import Case, Plan, Race
from shoal.launch.settings import BadFlag
from shoal.protocol.errors import NonFiniteError, ShoalError


@pytest.mark.parametrize(("typed", "read"), [("2", (2,)), ("4,2, 4", (4, 2)), ("2,3,4", (2, 3, 4))])
def test_workers_are_read(typed: str, read: tuple[int, ...]) -> None:
    """Each once, in order."""
    assert read == stragglers.read_workers(typed)


@pytest.mark.parametrize("typed", ["", "1", "5", "2,,3", "two", "-2", "2.0"])
def test_other_workers_are_refused(typed: str) -> None:
    """Two to four."""
    with pytest.raises(BadFlag, match="--workers: .* is not a list of 2, 3, 4"):
        stragglers.read_workers(typed)


def test_rates_are_read() -> None:
    """Numbers above 0, each once."""
    assert (0.5, 0.1) == stragglers.read_rates("0.5,1e-1,0.5")
    for typed in ("", "0", "-1", "inf", "nan", "0.1,x"):
        with pytest.raises(BadFlag, match="--rates: .* is not a list of learning rates"):
            stragglers.read_rates(typed)


@pytest.mark.parametrize("name", ["compute", "seconds", "lr", "target", "slow"])
def test_numbers_that_make_no_sense_are_refused(name: str) -> None:
    """Before anything is started."""
    for number in (0.0, -1.0, inf, nan):
        with pytest.raises(BadFlag, match=f"--{name} must be a number above 0"):
            stragglers.main(Plan(**{name: number}))


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without matplotlib nothing is drawn, and so nothing measured: one line, code 78. A folder that is not there is a bad flag."""
    for flags, code, told in (
        (["--plot", "nowhere/at/all"], 64, "there is no folder for 'nowhere/at/all'"),
        (["--plot", "drawing"], 78, "this benchmark needs matplotlib. Try: pip install 'shoal[bench]'"),
    ):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr(sys, "argv", ["shoal", "bench", "stragglers", *flags])
        monkeypatch.setattr(stragglers, "measure", None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (code, True) == (ended.value.code, told in capsys.readouterr().err)


def test_what_is_averaged_has_a_larger_learning_rate() -> None:
    """Sync and DDP by the number of workers; the remedies are raced by the most workers."""
    plan = Plan(workers=(2, 4), lr=0.25, rates=(0.5, 1.0))
    found = stragglers.cases(plan)

    assert [(n, w) for n in (2, 4) for w in stragglers.BOUNDS] == [(c.workers, c.way) for c in found["bounds"]]
    rates = {(c.workers, c.way): c.lr for c in found["bounds"]}
    assert (0.25, 0.5, 1.0, 1.0) == (rates[4, "0"], rates[2, "sync"], rates[4, "sync"], rates[4, "ddp"])
    assert {(4, "inf")} == {(c.workers, c.way) for c in found["remedies"]}
    assert [(lr, r) for lr in plan.rates for r in stragglers.REMEDIES] == [(c.lr, c.remedy) for c in found["remedies"]]
    assert [] == stragglers.cases(Plan(parts=("remedies",)))["bounds"]


def test_medians_are_over_races() -> None:
    """A race that does not get there counts as infinitely long; the median of most that do not is None; so for the loss."""
    races = [
        Race(10.0, 1.5, [(0.0, 2.0), (1.5, 0.2)], Counter({0: 3}), Counter({1: 2})),
        Race(30.0, inf, [(0.0, 2.0), (1.0, 1.0)], Counter({0: 1, 5: 1}), Counter({70: 1})),
        Race(20.0, inf, [(0.0, 2.0), (1.0, inf)]),
    ]
    found = stragglers.figures(Case(2, "inf", 0.1), races, Plan(seconds=2.0))

    assert (20.0, None, [1.5, None, None]) == (
        found["steps_per_second"],
        found["to_target"],
        found["each_to_target"],
    )
    assert (1.0, [0.2, 1.0, None]) == (found["loss"], found["each_loss"])
    assert ({"0": 4, "5": 1}, {"1": 2, "70": 1}) == (found["staleness"], found["delay"])
    curve = dict(found["curve"])
    assert (2.0, 2.0, 1.0) == (curve[0.0], curve[0.98], curve[2.0]), "1.0, and of 0.2, 1.0, inf the middle one"
    assert 101 == len(curve)
    assert json.dumps(found, allow_nan=False)


def test_histograms_in_words() -> None:
    """Shares that are half a percent or more; the quantile is the least value that so much is at or below."""
    assert "0: 50%, 2: 25%, 4-8: 20%, 64+: 5%" == standings.seen_text({"0": 10, "2": 5, "4": 2, "8": 2, "64": 1})
    assert "" == standings.seen_text({})
    histogram = {0: 5, 1: 4, 9: 1}
    assert [0, 1, 1, 9] == [standings.quantile(histogram, part) for part in (0.5, 0.51, 0.9, 0.91)]


def test_a_racer_that_has_ended_is_an_error() -> None:
    """It says which, at once, whatever the others wait for; and nothing is left running."""
    plan, case = Plan(workers=(2,), seconds=0.1), Case(2, "ddp", 0.1)
    with stragglers.racers(2) as started:
        psutil.Process(started[1].pid).kill()
        with pytest.raises(ShoalError, match="racer 1 of 2 has ended|a racer has ended"):
            stragglers.race(plan, case, 0, started)
        started[0].kill()
    assert all(process.poll() is not None for process in started)


def test_one_run_of_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A bound, DDP and a remedy, with real processes and tiny numbers: every figure is there; the table and the drawing show it."""
    monkeypatch.setattr(stragglers, "BOUNDS", ("1", "ddp"))
    monkeypatch.setattr(stragglers, "REMEDIES", {"none": None, "adaptive": [0.5, 1.0]})
    monkeypatch.setattr(stragglers, "cases", lambda plan, before=stragglers.cases: few(before(plan)))
    plan = Plan(workers=(2,), compute=0.002, seconds=0.4, repeat=1, target=2.25, lr=0.3)
    stragglers.main(plan, as_json=True)

    report = json.loads(capsys.readouterr().out)
    bound, ddp, remedy = [*report["bounds"], *report["remedies"]]
    for case in (bound, ddp, remedy):
        assert 10 < case["steps_per_second"] <= 2 / 0.002
        assert 0 < case["to_target"] <= 0.4
        assert case["loss"] < 2.25 < case["curve"][0][1], "it learns"
    assert set(bound["staleness"]) <= {"0", "1"}
    assert sum(bound["delay"].values()) >= 3
    assert ({}, "adaptive", 0.3) == (ddp["delay"], remedy["remedy"], remedy["lr"])

    standings.show(report)
    said = capsys.readouterr().out
    assert "0: " in said and "\x1b" not in said
    assert ["staleness 1", "DDP, gloo", "adaptive"] == [
        name for name in ("staleness 1", "DDP, gloo", "adaptive") if name in said
    ]
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: nothing was drawn")
    code = "import json, sys, pathlib, shoal.bench.standings as s; s.draw(json.load(sys.stdin), pathlib.Path('drawn'))"
    subprocess.run(  # a process of its own: matplotlib keeps fonts open
        [sys.executable, "-c", code], input=json.dumps(report), text=True, check=True, timeout=60, cwd=tmp_path
    )
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "drawn.svg").read_text()[:2000]


def few(cases: dict[str, list[Case]]) -> dict[str, list[Case]]:
    """All bounds, and the last remedy at the lr of the bounds."""
    last = cases["remedies"][-1]
    return cases | {"remedies": [Case(last.workers, last.way, 0.3, last.remedy)]}


def test_a_racer_computes_what_it_says() -> None:
    """The loss is over all of the data, in the same way for all; the weights depend on the seed alone."""
    one = racer.Racer(0)

    assert (1797, 64) == one.x.shape
    assert sum(p.numel() for p in racer.network(0).parameters()) == 9610
    assert one.loss(racer.network(3)) == one.loss(racer.network(3)) != one.loss(racer.network(4))
    assert isfinite(one.arithmetic) and one.arithmetic > 0


def test_a_racer_that_diverges_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its curve ends in NaN, and the race goes on without it: a large learning rate is what is being compared."""
    steps = iter([None, None])

    def finish() -> None:
        if next(steps, "no more") == "no more":
            raise NonFiniteError("the gradient of '0.weight' holds NaN or infinity")

    monkeypatch.setattr(racer, "_shoal", lambda number, net, order, stack: (net, finish, dict))
    order = {"way": "shoal", "seed": 0, "lr": 1.0, "compute": 0.0, "seconds": 60.0}

    found = racer.Racer(0).race(order)
    assert 2 == found["steps"]
    assert math.isnan(found["curve"][-1][1])
    assert math.isfinite(found["curve"][0][1])
