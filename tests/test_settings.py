"""Settings: where a value may come from, which one counts, and what a wrong one is told (DESIGN §8)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import exit_code
from shoal.launch.settings import CLUSTER, CODECS, JOIN, RUN, SERVER, BadFlag, settle
from shoal.protocol.codecs import BF16, INT8, TOPK, Codec
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import BLOCK_BYTES


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder without a `shoal.toml`, unless the test writes one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shoal.toml"


def one(name: str, value: Any = None, table: str = "") -> Any:
    return settle((*SERVER, *CODECS, JOIN), {name: value}, table)[name]


def test_argument_before_environment_before_file_before_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place covers those after it; in the file the command's own table covers the top, and another's does not count."""
    assert 15.0 == one("lease")
    folder.write_text("lease = 1\n[run]\nlease = 2\n")
    assert [1.0, 1.0, 2.0] == [one("lease"), one("lease", table="server"), one("lease", table="run")]
    monkeypatch.setenv("SHOAL_LEASE", "3s")
    assert 3.0 == one("lease", table="run")
    assert 4.0 == one("lease", 4, table="run")
    monkeypatch.setenv("SHOAL_LEASE", "")  # set to nothing is not set
    assert 2.0 == one("lease", table="run")


def test_the_defaults() -> None:
    """What a newcomer gets; a change of these changes what the pages say."""
    cluster = {"mode": "async", "staleness": 3.0, "lease": 15.0, "min_workers": 1, "nonfinite": "error"}
    cluster |= {"block_bytes": BLOCK_BYTES, "state_dir": ""}
    cluster |= {"task_policy": "best", "task_queue": 100_000, "task_patience": 10.0}
    cluster |= {
        "rounds": 0,
        "round_timeout": 60.0,
        "protection": "secagg",
        "cohort": 0,
        "clip": 1.0,
        "modulus": 32,
        "over": 0.0,
        "minimum": 0,
        "threshold": 0,
        "server_optimizer": "fedavg",
        "prox": 0.0,
        "aggregate": "mean",
        "noise": 0.0,
        "norm": 1.0,
        "epsilon": 0.0,
        "delta": 1e-5,
    }
    server = {"bind": "127.0.0.1", "port": 7450, "advertise": "", "shards": 1, "min_shards": 0, "insecure": False}
    server |= {"identities": ""}

    assert cluster == settle(CLUSTER, {})
    assert cluster | server == settle(SERVER, {})
    assert cluster | {"workers": 2, "servers": 1, "report": ""} == settle(RUN, {})


@pytest.mark.parametrize("setting", {s.name: s for s in (*SERVER, *RUN, *CODECS, JOIN)}.values(), ids=lambda s: s.name)
def test_a_default_can_be_typed(setting: Any) -> None:
    """Every default is a value that its own reader takes, and leaves as it is."""
    assert setting.default == setting.read(setting.default) == setting.read(str(setting.default))
    assert setting.help.endswith(".")


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("lease", "500ms", 0.5), ("lease", "2m", 120.0), ("lease", " 1 h ", 3600.0), ("lease", 7, 7.0), ("lease", "0.1", 0.1),
        ("staleness", "inf", math.inf), ("staleness", "0", 0.0), ("staleness", 8, 8.0), ("staleness", math.inf, math.inf),
        ("block_bytes", "512KiB", 2**19), ("block_bytes", "0.5 MiB", 2**19), ("block_bytes", 4096, 4096),
        ("block_bytes", "16MiB", 2**24),
        ("port", "0", 0), ("port", 65535, 65535), ("mode", "sync", "sync"), ("nonfinite", "skip", "skip"),
        ("push_codec", "int8", Codec(INT8)), ("push_codec", "topk:0.05", Codec(TOPK, 0.05)), ("pull_codec", "bf16", Codec(BF16)),
        ("insecure", True, True), ("insecure", "Yes", True), ("insecure", "off", False), ("insecure", 0, False),
    ],
)  # fmt: skip
def test_values_as_people_type_them(name: str, typed: Any, value: Any) -> None:
    """Units, spaces, words, and what a Python caller gives."""
    assert value == one(name, typed)


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        ("lease", "soon", "must be a duration such as 15s, 500ms or 2m"), ("lease", "99ms", "must be from 100ms to 24h"),
        ("lease", "25h", "must be from 100ms to 24h"), ("lease", "1.2.3", "not a value of the right kind"),
        ("lease", -1, "must be a duration"), ("lease", "", "must be a duration"), ("lease", [1], "must be a duration"),
        ("staleness", "-1", "must be 0, a whole number of clocks, or inf"), ("staleness", "1.5", "must be 0, a whole"),
        ("staleness", "-inf", "must be 0, a whole"), ("staleness", "nan", "not a value of the right kind"),
        ("staleness", "few", "not a value of the right kind"), ("staleness", [], "not a value of the right kind"),
        ("block_bytes", "4095", "must be from 4KiB to 16MiB"), ("block_bytes", "17MiB", "must be from 4KiB to 16MiB"),
        ("block_bytes", "4MB", "must be a size such as 4MiB or 512KiB"), ("block_bytes", ".", "not a value of the right kind"),
        ("port", "65536", "must be from 0 to 65535"), ("port", "-1", "must be from 0 to 65535"), ("port", "http", "not a value"),
        ("port", 1.5, "not a value of the right kind"), ("port", True, "not a value of the right kind"),
        ("shards", 0, "must be from 1 to 1024"),
        ("min_workers", 4097, "must be from 1 to 4096"), ("min_shards", -1, "must be from 0 to 4096"),
        ("mode", "turbo", "must be one of async, sync, federated"), ("protection", "none", "must be one of secagg, clear"),
        ("clip", "0", "must be over 0 and finite"), ("clip", "inf", "must be over 0"), ("modulus", "24", "must be 16 or 32"),
        ("mode", ["async"], "not a value of the right kind"), ("nonfinite", "ignore", "must be one of error, skip"),
        ("push_codec", "int9", "must be one of raw, bf16, fp16, int8, topk, topk:FRACTION"),
        ("push_codec", "topk:2", "must be topk:FRACTION with a fraction over 0 and up to 0.5"),
        ("pull_codec", "int9", "must be one of raw, bf16, fp16, int8"),
        ("pull_codec", "topk", "must be one of raw, bf16, fp16, int8: topk leaves numbers out"),
        ("insecure", "maybe", "must be true or false"), ("insecure", 2, "must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_where_it_came_from(
    name: str, typed: Any, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag's mistake is one of usage (64), the environment's and the file's are of configuration (78); each with its place."""
    with pytest.raises(BadFlag) as caught:
        one(name, typed)
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} is {typed!r}: {told}")
    assert 64 == exit_code(caught.value)
    if not isinstance(typed, str) or not typed:
        return
    monkeypatch.setenv(f"SHOAL_{name.upper()}", typed)
    with pytest.raises(ConfigError) as caught_there:
        one(name)
    monkeypatch.delenv(f"SHOAL_{name.upper()}")
    folder.write_text(f'{name} = "{typed}"\n')
    with pytest.raises(ConfigError) as caught_in_file:
        one(name)

    assert f"$SHOAL_{name.upper()} is {typed!r}: {told}" in str(caught_there.value)
    assert f"shoal.toml: {name} is {typed!r}: {told}" in str(caught_in_file.value)
    assert [78, 78] == [exit_code(caught_there.value), exit_code(caught_in_file.value)]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stalenes": 3}, r"there is no setting 'stalenes'\. Try: staleness"),
        ({"zzz": 3}, "there is no setting 'zzz'. Try: bind, port"),
        ({"replicas": 1}, "replicas=1: replicated shards are not part of this version"),
    ],
)
def test_unknown_words_are_refused(given: dict[str, Any], told: str) -> None:
    """A typing mistake is not ignored, and what this version does not do is not promised."""
    with pytest.raises(ConfigError, match=told) as caught:
        settle(SERVER, given)
    assert 78 == exit_code(caught.value)
    assert settle(SERVER, {}) == settle(SERVER, {"replicas": 0, "rounds": None, "protection": "secagg"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lease = ", "shoal.toml cannot be read"),
        ("\udcff", "shoal.toml cannot be read"),
        ("stalenes = 3", "shoal.toml: there is no setting stalenes. Try: staleness"),
        ("[run]\nleese = 3", r"shoal.toml: there is no setting \[run\] leese. Try: lease"),
        ("[sever]\nlease = 3", r"there is no table \[sever\]. Try: \[server\], \[run\] or \[worker\]"),
        ("lease = 2020-01-01", "shoal.toml: lease is datetime.date"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(folder: Path, text: str, told: str) -> None:
    """Whether or not it is the value that is asked for; the whole file is looked at."""
    folder.write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(ConfigError, match=told):
        settle(SERVER, {}, "server")
