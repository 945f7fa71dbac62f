"""Keys on disk: where, whose, and two servers that begin at the same moment (SPEC §10). The rest is in test_security."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from shoal.launch.keys import FILE, load_or_make, public_of, state_dir
from shoal.protocol.errors import ConfigError
from shoal.protocol.join import key_text


def test_where_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As given, with `~`; else where the user's state goes."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert [Path("/x/y"), Path("/home/me/y"), Path("/home/me/.local/state/shoal")] == [
        state_dir("/x/y"), state_dir("~/y"), state_dir(""),
    ]  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert Path("/var/state/shoal") == state_dir("")


def test_keys_are_pairs_and_differ(tmp_path: Path) -> None:
    """Four keys of 32 bytes, the public ones those of the secret ones; another folder has others."""
    one, other = load_or_make(tmp_path / "a"), load_or_make(tmp_path / "b")
    made = [one.server_public, one.server_secret, one.enrol_public, one.enrol_secret]

    assert (4, {32}) == (len(set(made)), set(map(len, made)))
    assert (one.server_public, one.enrol_public) == (public_of(one.server_secret), public_of(one.enrol_secret))
    assert not {other.server_secret, other.enrol_secret} & set(made)
    assert not any(
        repr(key) in repr(one) for key in made
    )  # nor in a traceback's locals, or a log that prints the object


def test_a_new_folder_is_its_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask says, as the file is; folders on the way are made."""
    before = os.umask(0)
    try:
        load_or_make(tmp_path / "deep" / "state")
    finally:
        os.umask(before)

    assert [0o700, 0o600] == [
        stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep/state", tmp_path / "deep/state" / FILE)
    ]


def test_two_that_begin_at_once_have_the_same_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second finds that a file has come meanwhile, and takes that; no other file is left."""
    first = load_or_make(tmp_path / "first")

    def link(fresh: str, path: Path) -> None:
        (tmp_path / "first" / FILE).rename(path)  # just now
        raise FileExistsError

    monkeypatch.setattr(os, "link", link)
    second = load_or_make(tmp_path / "second")

    assert (first.server_secret, first.enrol_secret) == (second.server_secret, second.enrol_secret)
    assert [FILE] == os.listdir(tmp_path / "second")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o601])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    """Any bit of the group's or the world's; the text says how to mend it, and holds no key."""
    made = load_or_make(tmp_path)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}\)\. Try: chmod 600") as caught:
        load_or_make(tmp_path)

    assert key_text(made.server_secret) not in str(caught.value)


@pytest.mark.parametrize("which", ["server", "enrol"])
def test_short_key_material_is_an_error(tmp_path: Path, which: str) -> None:
    """Never an empty or a padded key: the file is spoilt, says the error, and does not show it."""
    held = {"server": key_text(b"s" * 32), "enrol": key_text(b"e" * 32)} | {which: key_text(b"secret" * 5)}
    (tmp_path / FILE).write_text(str(held).replace("'", '"'))
    (tmp_path / FILE).chmod(0o600)
    with pytest.raises(ConfigError, match="is not a key file of shoal") as caught:
        load_or_make(tmp_path)

    assert key_text(b"secret" * 5) not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_folder_that_cannot_be_had(tmp_path: Path) -> None:
    """Something else is in the way: which folder, why, and what to type."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"keys cannot be kept in .*file/state: Not a directory\. Try: --state-dir"):
        load_or_make(tmp_path / "file" / "state")
