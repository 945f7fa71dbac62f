"""What a run comes to, as JSON and as rows for people (DESIGN §8)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shoal.launch.report import check_writable, human_bytes, number, rows, summarise, write
from shoal.protocol.errors import ConfigError

HELD = {"name": "test", "mode": "async", "clock": 20, "examples": 8, "means": {"correct": 0.75}}


def status(**changed: Any) -> dict[str, Any]:
    """A cluster's last status: two workers, of which one had two lives, and two shards."""
    totals = {"steps": 100, "bytes_pushed": 3000, "bytes_pulled": 5_000_000, "staleness": {"0": 30, "1": 70}}
    totals |= {"workers_lost": 0, "skipped": 0, "retries": 4} | changed.pop("totals", {})
    found = {
        "mode": "async", "staleness": 3.0, "seconds": 8.0, "insecure": False, "rejected": {}, "totals": totals,
        "workers": [{"name": "a"}, {"name": "b"}, {"name": "a"}], "shards": [{}, {}],
        "data": [{"completed": 6, "lost": 1, "re_leased": 1}, {"completed": 4, "lost": 0, "re_leased": 0}],
        "logged": {"loss": 0.123456789, "diverged": None},
        "rounds": {"protection": "clear", "completed": 3, "abandoned": 1},
        "evaluations": [HELD | {"clock": 10, "means": {"correct": 0.5}}, HELD],
    }  # fmt: skip
    return found | changed


def test_a_report_says_what_was_done() -> None:
    """Every figure of the public contract; a worker with two lives is one worker; bytes are both ways."""
    report = summarise(status())

    assert {
        "mode": "async", "staleness": 3.0, "workers": 2, "servers": 2, "steps": 100, "seconds": 8.0, "steps_per_second": 12.5,
        "bytes": 5_003_000, "bytes_pushed": 3000, "bytes_pulled": 5_000_000, "staleness_histogram": {"0": 30, "1": 70},
        "completed_partitions": 10, "lost_partitions": 1, "re_leased_partitions": 1, "lost_workers": 0, "skipped_steps": 0,
        "retries": 4, "rejected": {}, "insecure": False, "logged": {"loss": 0.123456789, "diverged": None},
        "rounds": {"protection": "clear", "completed": 3, "abandoned": 1},
        "evaluations": [HELD | {"clock": 10, "means": {"correct": 0.5}}, HELD],
    } == report  # fmt: skip
    assert (
        0.0 == summarise(status(seconds=0.0))["steps_per_second"]
    )  # no step was made: no time has passed since the first


def test_rows_for_people() -> None:
    """In order, with units; what did not happen has no row."""
    assert [
        ("mode", "async, staleness 3"),
        ("workers / servers", "2 / 2"),
        ("steps", "100 in 8.0 s (12.5 per second)"),
        ("pushed / pulled", "3.0 kB / 5.0 MB"),
        ("staleness seen", "0: 30%  1: 70%"),
        ("partitions", "10 completed, 1 lost, 1 leased again"),
        ("held out: test", "correct 0.75  (clock 20, 8 examples)"),
        ("loss", "0.123457"),
        ("diverged", "nan"),
    ] == rows(summarise(status()))
    assert ("mode", "federated, clear, 3 rounds complete, 1 abandoned") == rows(summarise(status(mode="federated")))[0]


def test_what_went_wrong_has_a_row() -> None:
    """Lost workers, steps left out, refused messages, no keys; in sync mode there is no bound to name."""
    wrong = status(
        mode="sync", insecure=True, rejected={"garbage": 3, "handshake": 1}, data=[], logged={}, evaluations=[]
    )
    wrong["totals"] |= {"workers_lost": 2, "skipped": 5, "staleness": {}}

    assert [
        ("mode", "sync"),
        ("workers lost", "2"),
        ("steps skipped", "5 (gradients with NaN or infinity)"),
        ("rejected", "garbage: 3  handshake: 1"),
        ("security", "NONE (--insecure)"),
    ] == [row for row in rows(summarise(wrong)) if row[0] not in ("workers / servers", "steps", "pushed / pulled")]


def test_numbers_are_short() -> None:
    """Six figures are enough; None is how a NaN travels in JSON. Bytes are counted in thousands, as networks do."""
    assert ["0.1", "1.23457e+06", "inf", "3", "nan"] == list(map(number, (0.1, 1234567.0, float("inf"), 3, None)))
    assert ["0 B", "999 B", "1.0 kB", "4.2 MB", "2.5 GB", "50000.0 TB"] == [
        human_bytes(count) for count in (0, 999, 1000, 4_194_304, 2.5e9, 5e16)
    ]


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    """One JSON object, over an older one if there is one; nothing else is left in the folder."""
    path = tmp_path / "r.json"
    for steps in (1, 2):
        write(str(path), {"steps": steps})

    assert ({"steps": 2}, True) == (json.loads(path.read_text()), path.read_text().endswith("}\n"))
    assert ["r.json"] == os.listdir(tmp_path)


def test_where_no_report_can_be_is_known_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such folder, a file for a folder, a folder for a file, no right to write: hours are not lost for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for good in ("r.json", str(tmp_path / "file")):
        check_writable(good)
    for bad in ("no/r.json", "file/r.json", str(tmp_path), ".."):
        with pytest.raises(ConfigError, match=f"--report {bad}: no file can be written there"):
            check_writable(bad)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="Try: a file in a folder that exists"):
        check_writable("r.json")
