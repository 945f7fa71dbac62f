"""The benchmarks of codecs: they measure what they say, and leave nothing behind. No time is asserted (rungs T0, T3)."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal import cli
from shoal.bench import accuracy, codecs
from shoal.launch.settings import BadFlag
from shoal.protocol.codecs import TOPK, Codec
from shoal.protocol.errors import ConfigError


def test_one_run_gives_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is one JSON object: by codec bytes, errors and four times; each codec once."""
    assert 0 == codecs.main(5000, ["int8", "topk", "int8"], 1, True)
    report = json.loads(capsys.readouterr().out)

    assert (5000, 1) == (report["elements"], report["repeat"])
    assert ["int8", "topk:0.01"] == [row["codec"] for row in report["codecs"]]
    int8, topk = report["codecs"]
    assert [1.016, 0.08] == [row["bytes_per_element"] for row in (int8, topk)]
    assert 0.003 < int8["rms_error"] < 0.01 < 0.9 < topk["rms_error"] < 1
    assert int8["max_error"] < 0.005 < 0.3 < topk["max_error"] < 1
    for row in report["codecs"]:
        assert {"encode", "decode", "push", "pull"} == set(row["seconds"])
        assert all(seconds > 0 for seconds in row["seconds"].values())


def test_the_loss_is_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the vector were one where blocks do not matter; the largest error is that of the worst block."""
    values = np.random.default_rng(1).standard_normal(3000, dtype=np.float32)
    whole = codecs.loss(Codec(1), values)
    monkeypatch.setattr(codecs, "BLOCK_BYTES", 4096)

    assert [1024, 1024, 952] == [len(block) for block in codecs.blocks(values)]
    assert whole == pytest.approx(codecs.loss(Codec(1), values))


def test_what_is_timed_travels_encoded() -> None:
    """Over a socket, in the codec; a pull of topk is raw."""
    values, codec = np.random.default_rng(1).standard_normal(3000, dtype=np.float32), Codec(TOPK, 0.1)
    with codecs.wire(codec, values) as calls:
        calls["push"]()
        out = calls["pull"]()
        worker = next(
            cell.cell_contents for cell in calls["push"].__closure__ or () if hasattr(cell.cell_contents, "stats")
        )
        stats = worker.stats

    assert codec.size(3000) * 4 == stats.bytes_pushed
    assert 12_000 == stats.bytes_pulled
    assert np.any(out["w"])


def test_a_codec_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake of usage: one line that lists them, before anything is started."""
    monkeypatch.setattr(sys, "argv", ["shoal", "bench", "codecs", "--codecs", "raw,int9"])
    monkeypatch.setattr(codecs, "wire", None)
    with pytest.raises(BadFlag):
        codecs.main(1000, ["topk:9"], 1, True)
    with pytest.raises(SystemExit) as ended:
        cli.main()

    said = capsys.readouterr()
    assert (64, "") == (ended.value.code, said.out)
    assert "shoal: --codecs must be one of raw, bf16, fp16, int8, topk, topk:FRACTION\n" == said.err


def test_the_report_can_be_read_by_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A head, and a line a codec."""
    row = {"codec": "int8", "bytes_per_element": 1.0156, "rms_error": 0.00694, "max_error": 0.00391}
    seconds = {"encode": 0.018, "decode": 0.0081, "push": 0.05, "pull": 0.03}
    about = {"cpus": 2, "platform": "Linux", "torch": "2", "shoal": "0.1.0"}
    codecs.show({"machine": about, "elements": 10_000_000, "repeat": 9, "codecs": [row | {"seconds": seconds}]})
    lines = capsys.readouterr().out.splitlines()

    assert "10,000,000 float32, 1 shard, 1 worker, TCP on loopback, medians of 9" == lines[1]
    assert ["int8", "1.016", "0.0069", "0.0039", "18.0", "ms", "8.10", "ms", "50.0", "ms", "30.0", "ms"] == lines[
        -1
    ].split()


# --- accuracy


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The four files, with a few images that are easy to tell apart."""
    labels = np.arange(400, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 60, (400, 784), np.uint8)
    images[np.arange(400), labels * 7] = 255
    for part in ("train", "t10k"):
        for what, head, array in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            (tmp_path / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + array.tobytes()))
    return str(tmp_path)


def test_the_images_are_read(folder: str, tmp_path: Path) -> None:
    """Behind their heads, from 0 to 1; what is not there is named, with where to get it."""
    images, labels = accuracy.load(folder, "t10k")
    assert ((400, 784), 1.0, list(range(10))) == (images.shape, images.max(), labels[:10].tolist())

    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        accuracy.load(str(tmp_path / "elsewhere"), "train")


def test_two_workers_train_over_the_codecs(folder: str) -> None:
    """Both do their part, and what is counted has travelled encoded."""
    found = accuracy.run("int8", "bf16", folder, "sgd")

    assert accuracy.EPOCHS * 400 / accuracy.BATCH == found["steps"]
    assert found["bytes_pushed"] == pytest.approx(269_322 * (1 + 4 / 256) * found["steps"], rel=1e-3)
    assert found["bytes_pulled"] <= 269_322 * 2 * (found["steps"] + 6)
    assert 0.0 <= found["accuracy"] <= 1.0
