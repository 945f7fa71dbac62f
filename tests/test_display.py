"""What people see while a cluster works: on a terminal a table, elsewhere a line now and then; scripts' output is never lost."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import pytest
from conftest import until
from rich.console import Console

from shoal.launch import display
from shoal.launch.display import Display, Rates


class Time:
    """The display's clock, which the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(display, "time", made)
    return made


def worker(name: str, steps: float | None = 0, state: str = "live", **more: Any) -> dict[str, Any]:
    return {"name": name, "state": state, "clock": 7, "stats": {"steps": steps}, "logged": {}} | more


def status(*workers: dict[str, Any], **changed: Any) -> dict[str, Any]:
    found = {
        "mode": "async", "staleness": 3.0, "seconds": 12.4, "min_clock": 5, "max_clock": 7, "totals": {"steps": 40},
        "insecure": False, "waiting_for": "", "rounds": {}, "logged": {"loss": 0.25}, "workers": workers,
        "shards": [{"index": 0, "state": "live", "counters": {"bytes_in": 2000}}],
    }  # fmt: skip
    return found | changed


class Shown(Display):
    """A display whose console is a text."""

    def __init__(self, live: bool) -> None:
        super().__init__("shoal run train.py", live)
        self.text = io.StringIO()
        self.console = Console(file=self.text, force_terminal=live, width=110, highlight=False, color_system=None)


def test_elsewhere_a_line_now_and_then(clock: Time) -> None:
    """At most one in ten seconds, none while the first step is awaited: logs stay readable."""
    with Shown(live=False) as shown:
        shown.show(status(waiting_for="workers: 1 of 2"))
        assert "" == shown.text.getvalue()
        for _ in range(25):
            shown.show(status(worker("a", clock.now - 1000)))
            clock.now += 1.0
        lines = shown.text.getvalue().splitlines()
        shown.show(status(insecure=True))
        clock.now += 10.0
        shown.show(status(insecure=True))

    assert ["shoal: 12 s  clock 5-7  40 steps (0.0/s)  loss 0.25"] == lines[:1]
    assert [3, True] == [len(lines), all("(1.0/s)" in line for line in lines[1:])]
    assert shown.text.getvalue().endswith("INSECURE\n")


@pytest.mark.parametrize(("wanted", "told"), [(30, "rounds 12 of 30  40 steps"), (0, "rounds 12  40 steps")])
def test_in_federated_mode_rounds_count(clock: Time, wanted: int, told: str) -> None:
    """Nobody makes steps that a clock would count."""
    with Shown(live=False) as shown:
        shown.show(status(mode="federated", rounds={"completed": 12, "wanted": wanted}))
        clock.now += 20
        shown.show(status(mode="federated", rounds={"completed": 12, "wanted": wanted}))
    assert told in shown.text.getvalue()
    assert "clock" not in shown.text.getvalue()


def test_on_a_terminal_a_table(clock: Time) -> None:
    """Each worker with its state, clock, lead and rate; the servers below; the scripts' lines above."""
    with Shown(live=True) as shown:
        shown.write("[w0] a line of a script")
        shown.show(status(worker("w0", 10), worker("w1", 0, "lost")))
        clock.now += 2.0
        shown.show(status(worker("w0", 30, logged={"loss": 0.5}), worker("w1", 0, "lost"), waiting_for="a shard"))
    text = shown.text.getvalue()

    assert text.index("[w0] a line of a script") < text.index("shoal run train.py")
    for words in (
        "async staleness 3  12 s  10.0 steps/s  waiting for a shard",
        "worker  state  clock  ahead  steps/s  logged",
    ):
        assert words in text
    assert ["w0", "live", "7", "2", "10.0", "loss", "0.5"] in [line.split() for line in text.splitlines()]
    assert ["w1", "lost", "7"] in [line.split() for line in text.splitlines()]
    assert "shard 0 live 2.0 kB in 0 B out" in text


def test_a_crowd_is_cut_short(clock: Time) -> None:
    """Sixteen workers and eight shards fit a screen; how many more there are is said. In sync mode there is no bound."""
    shard = {"state": "live", "counters": {}}
    with Shown(live=True) as shown:
        many = [worker(f"w{number}") for number in range(20)]
        shown.show(
            status(*many, mode="sync", insecure=True, shards=[shard | {"index": number} for number in range(12)])
        )
    text = shown.text.getvalue()

    assert ("w15" in text, "w16" in text, "… 4 more" in text) == (True, False, True)
    assert ("shard 7" in text, "shard 8" in text) == (True, False)
    assert "sync  12 s" in text
    assert "INSECURE" in text


def test_a_scripts_output_goes_where_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a table each line goes on at once, to the stream that it came from; our own words go to standard error."""
    with Display("t", live=False) as shown:
        shown.write("out")
        shown.write("err", True)
        shown.say("[words] of ours")  # no markup: a script's name may have brackets
    shown.write("late", True)

    assert ("out\n", "err\nshoal: [words] of ours\nlate\n") == capsys.readouterr()


def test_a_script_that_prints_faster_waits(clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are kept up to a number, then whoever prints waits until they are shown, or the display ends; all come, in order."""
    monkeypatch.setattr(display, "MOST_LINES", 10)
    with Shown(live=True) as shown:
        wait_for = shown._room.wait_for
        monkeypatch.setattr(
            shown._room, "wait_for", lambda ready, timeout: wait_for(ready, 100.0)
        )  # be told, or never know
        thread = threading.Thread(target=lambda: [shown.write(f"line {number}") for number in range(35)])
        thread.start()
        while thread.is_alive():
            until(lambda: len(shown._lines) == 10 or not thread.is_alive())
            assert len(shown._lines) <= 10
            shown.flush()
            thread.join(0.05)

        monkeypatch.setattr(display, "MOST_LINES", 0)
        late = threading.Thread(target=shown.write, args=("late",))
        late.start()
        until(lambda: shown._room._waiters)  # type: ignore[attr-defined]
    late.join(10)

    assert not late.is_alive()
    assert [f"line {number}" for number in range(35)] == re.findall(r"line \d+", shown.text.getvalue())


def test_rates_are_of_the_last_seconds(clock: Time) -> None:
    """By worker and in all; lives of one name count together, a worker that is new, gone or has said nothing counts 0."""
    rates = Rates()
    assert 0.0 == rates.total
    rates.take(status(worker("a", 10), worker("gone", 50)))
    assert 0.0 == rates.total
    for second in range(1, 21):
        clock.now += 1.0
        rates.take(status(worker("a", 10 + 2 * second), worker("a", 5), worker("new", None)))

    assert (2.0, 0.0, 0.0) == (rates.of("a"), rates.of("new"), rates.of("gone"))
    assert 2.0 == rates.total
    assert len(rates._seen) <= Rates.SECONDS + 1
