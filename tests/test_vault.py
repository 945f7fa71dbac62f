"""What an owner keeps encrypted: read as it was written, and every change found (rung T0)."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shoal
from shoal import cli
from shoal.protocol.errors import ConfigError, ShapeError, VaultError
from shoal.worker import vault as vault_module
from shoal.worker.vault import Vault, VaultKey

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
again = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def kept(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "vault", tmp_path / "key")


def rows(vault: Vault, name: str = "feedback") -> list[Any]:
    with vault.open(name) as file:
        return list(file)


def until_wrong(vault: Vault, words: str | None = None) -> list[Any]:
    """What a changed file gives out before it is found out, which it must be."""
    got: list[Any] = []

    def read() -> None:
        with vault.open("feedback") as opened:
            got.extend(opened)

    with pytest.raises(VaultError, match=words):
        read()
    return got


def filled(vault: Vault, name: str = "feedback", lives: tuple[int, ...] = (2, 1, 3)) -> list[str]:
    """A file that was opened so many times, with so many records each time."""
    said = []
    for life, count in enumerate(lives):
        with vault.open(name) as file:
            for number in range(count):
                file.append(f"secret {life}.{number}")
                said.append(f"secret {life}.{number}")
    return said


def path(vault: Vault, name: str = "feedback") -> Path:
    return vault.folder / f"{name}.vault"


@again
@given(lives=st.lists(st.lists(st.lists(plain, max_size=3), max_size=3), max_size=4), number=st.integers(0, 10**9))
def test_what_was_kept_is_read(tmp_path: Path, lives: list[list[list[Any]]], number: int) -> None:
    """In order, over several openings, one by one or many at once; nothing of it is on the disk in clear."""
    vault = Vault(tmp_path / f"v{number}", tmp_path / "key")
    said: list[Any] = []
    for life in lives:
        with vault.open("x") as file:
            for together in life:
                file.extend(together)
                said += together
                assert len(said) == len(file)
        assert said == rows(vault, "x")
    for name in (path(vault, "x"), vault.folder / "x.head"):
        if lives:
            name.unlink()


def test_arrays_and_tensors_are_kept(kept: Vault) -> None:
    """As tasks have them; what cannot be kept leaves the file as it was."""
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), torch.tensor([1, 2])
    with kept.open("partition") as file:
        file.append([x, y])
        with pytest.raises(ShapeError):
            file.extend([1, object()])
        assert 1 == len(file) and "Sealed(partition, 1 records)" == repr(file)
    ((found_x, found_y),) = rows(kept, "partition")
    assert (found_x == x).all() and torch.equal(found_y, y)
    assert x.tobytes() not in path(kept, "partition").read_bytes()


def test_any_flipped_bit_is_found(kept: Vault) -> None:
    """In either file, at any place: reading says so, or opening does, and nothing is given out that was not kept."""
    said = filled(kept)
    for file in (path(kept), kept.folder / "feedback.head"):
        whole = file.read_bytes()
        for place in range(len(whole)):
            file.write_bytes(whole[:place] + bytes((whole[place] ^ 1 << place % 8,)) + whole[place + 1 :])
            assert said[: len(got := until_wrong(kept))] == got
        file.write_bytes(whole)
    assert said == rows(kept)


def test_an_end_that_is_cut_off_is_found(kept: Vault) -> None:
    """Wherever; also between two records, and at the very beginning."""
    said = filled(kept)
    whole = path(kept).read_bytes()
    for length in range(len(whole)):
        path(kept).write_bytes(whole[:length])
        with pytest.raises(VaultError, match="cut off|not of one another"):
            kept.open("feedback")
    path(kept).unlink()
    with pytest.raises(VaultError, match=r"feedback.vault is gone"):
        kept.open("feedback")
    path(kept).write_bytes(whole)
    assert said == rows(kept)
    (kept.folder / "feedback.head").unlink()
    with pytest.raises(VaultError, match="nobody knows how many"):
        kept.open("feedback")


def pieces(whole: bytes) -> list[bytes]:
    """The salts and records of a file."""
    at, found = 48, []
    while at < len(whole):
        length = int.from_bytes(whole[at : at + 4], "little")
        size = 4 + (32 if length == 0xFFFFFFFF else length)
        found.append(whole[at : at + size])
        at += size
    return found


@pytest.mark.parametrize("seed", range(30))
def test_records_in_another_order_are_found(kept: Vault, seed: int) -> None:
    """Swapped, repeated, left out, whole openings exchanged: no arrangement but the right one is read."""
    said = filled(kept)
    draw = random.Random(seed)
    whole = path(kept).read_bytes()
    there = pieces(whole)
    other = list(there)
    while other == there:
        match draw.randrange(3):
            case 0:
                draw.shuffle(other)
            case 1:
                other[draw.randrange(len(other))] = draw.choice(there)
            case _:
                del other[draw.randrange(len(other))]
    body = b"".join(other)[: len(whole) - 48]
    path(kept).write_bytes(whole[:48] + body + bytes(len(whole) - 48 - len(body)))
    got = until_wrong(kept, "not what was kept|another record")
    assert said[: len(got)] == got


def test_a_file_of_another_name_or_time_is_found(kept: Vault) -> None:
    """Records are for one purpose; and one file's head is not another's, of the same name and key, either."""
    filled(kept, "feedback")
    filled(kept, "partition")
    for ending in ("vault", "head"):
        (kept.folder / f"partition.{ending}").write_bytes((kept.folder / f"feedback.{ending}").read_bytes())
    with pytest.raises(VaultError, match="does not fit its key"):
        kept.open("partition")
    before = path(kept).read_bytes()
    path(kept).unlink()
    (kept.folder / "feedback.head").unlink()
    filled(kept, "feedback")
    path(kept).write_bytes(before)
    with pytest.raises(VaultError, match="not of one another"):
        kept.open("feedback")


@pytest.mark.parametrize(("lives", "words"), [((1, 1), "record 3 of"), ((1,), "ends with another record")])
def test_an_old_end_is_not_put_in_place_of_a_new_one(kept: Vault, lives: tuple[int, ...], words: str) -> None:
    """From a copy that was made before: records that were authentic once, of the same numbers."""
    filled(kept, lives=(2,))
    copies = {file: file.read_bytes() for file in kept.folder.iterdir()}
    filled(kept, lives=(1,))
    old = path(kept).read_bytes()
    for file, data in copies.items():
        file.write_bytes(data)
    filled(kept, lives=lives)
    new = path(kept).read_bytes()
    start = len(copies[path(kept)])
    path(kept).write_bytes(new[:start] + old[start:] + new[len(old) :])
    with pytest.raises(VaultError, match=words):
        rows(kept)


@pytest.mark.parametrize("torn", [True, False])
def test_what_a_crash_tears_is_dropped_when_that_is_said(
    kept: Vault, torn: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """After a death before the head counts a record: whole, it is kept; torn at any place, it is an error first, and then dropped.

    What is written next is under a key that nothing was written under.
    """
    said = filled(kept, lives=(2,))
    head, length = (kept.folder / "feedback.head").read_bytes(), path(kept).stat().st_size
    with kept.open("feedback") as file:
        file.extend(["third", "fourth"])
    whole = path(kept).read_bytes()
    third = length + 36 + len(pieces(whole)[-2])
    if not torn:
        (kept.folder / "feedback.head").write_bytes(head)
        assert [*said, "third", "fourth"] == rows(kept)
        return
    for end in range(length + 1, len(whole)):
        path(kept).write_bytes(whole[:end])
        (kept.folder / "feedback.head").write_bytes(head)
        more = ["third"] if end >= third else []
        if end != third:
            with pytest.raises(VaultError, match="the last record of .* is torn"):
                kept.open("feedback")
            caplog.clear()
        with kept.open("feedback", drop_torn=True) as file:
            assert end == third or "they are dropped" in caplog.text
            file.append("next")
        assert [*said, *more, "next"] == rows(kept)
        salts = [piece for piece in pieces(path(kept).read_bytes()) if piece[:4] == b"\xff" * 4]
        assert len(set(salts)) == len(salts) and salts[-1] not in whole


def test_a_writer_that_is_killed_loses_nothing_that_it_was_told_is_kept(tmp_path: Path) -> None:
    """A process that appends, ended with SIGKILL wherever it is: what it had said is there, and at most a little more."""
    code = (
        "import sys; from shoal.worker.vault import Vault\n"
        "with Vault(sys.argv[1], sys.argv[2]).open('x') as kept:\n"
        "    while True:\n"
        "        kept.append([len(kept), bytes(20_000)]); print(len(kept), flush=True)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "v"), str(tmp_path / "key")]
    said = 0
    for _ in range(2):
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert process.stdout
        for _ in range(30):
            said = int(process.stdout.readline())
        process.kill()
        process.stdout.close()
        process.wait()
        with Vault(tmp_path / "v", tmp_path / "key").open("x", drop_torn=True) as kept:
            assert len(kept) >= said
            assert [number for number, _ in kept] == list(range(len(kept)))


def test_a_crash_at_the_making(kept: Vault) -> None:
    """The head is there, and the file is empty or begun: it is made."""
    with kept.open("feedback"):
        pass
    whole = path(kept).read_bytes()
    for length in range(len(whole)):
        path(kept).write_bytes(whole[:length])
        assert [] == rows(kept)
        assert whole == path(kept).read_bytes()


def test_no_nonce_comes_twice(kept: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over openings, crashes and files: no pair of key and nonce is used for two records."""
    used: list[tuple[bytes, bytes]] = []

    class Watched:
        def __init__(self, key: bytes) -> None:
            self.key, self.cipher = key, AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            used.append((self.key, nonce))
            return self.cipher.encrypt(nonce, data, bound)

        def decrypt(self, nonce: bytes, data: bytes, bound: bytes) -> bytes:
            return self.cipher.decrypt(nonce, data, bound)

    monkeypatch.setattr(vault_module, "AESGCM", Watched)
    for round_ in range(4):
        filled(kept, "a")
        filled(kept, "b")
        whole = path(kept, "a").read_bytes()
        path(kept, "a").write_bytes(whole + whole[-20:])  # torn
        with kept.open("a", drop_torn=True) as file:
            file.extend([round_, round_])
    assert len(set(used)) == len(used) == 4 * (6 + 6 + 2)


def test_a_full_disk_loses_nothing_that_was_kept(kept: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    said = filled(kept)
    real: Callable[[int], None] = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with kept.open("feedback") as file:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            file.append("more")
        monkeypatch.setattr(os, "fsync", real)
        with pytest.raises(ValueError, match="closed"):
            file.append("more")
    assert said == rows(kept)[: len(said)]


def test_one_at_a_time(kept: Vault) -> None:
    """Two that append would use a nonce twice."""
    with kept.open("feedback"):
        with pytest.raises(VaultError, match="is open already"):
            kept.open("feedback")
    assert [] == rows(kept)


def test_a_lost_or_wrong_key_is_said(tmp_path: Path, kept: Vault) -> None:
    """It is not made again over what it has locked; the right one put back opens everything."""
    said = filled(kept)
    right = (tmp_path / "key").read_text()
    (tmp_path / "key").unlink()
    with pytest.raises(VaultError, match=r"the key .* is gone, and what it has locked .*put back a copy"):
        Vault(kept.folder, tmp_path / "key")
    assert not (tmp_path / "key").exists()
    VaultKey.make(tmp_path / "key")
    with pytest.raises(VaultError, match="does not fit its key .*another key"):
        Vault(kept.folder, tmp_path / "key").open("feedback")
    (tmp_path / "key").write_text(right)
    assert said == rows(Vault(kept.folder, tmp_path / "key"))


def test_a_key_is_its_owners(tmp_path: Path, kept: Vault) -> None:
    """Made once, readable by nobody else, never shown."""
    file = tmp_path / "key"
    assert 0o600 == stat.S_IMODE(file.stat().st_mode)
    filled(kept)
    assert {0o600} == {stat.S_IMODE(each.stat().st_mode) for each in kept.folder.iterdir()}
    key = VaultKey.load(file)
    assert key == VaultKey.make(file), "what is there is not replaced"
    assert [file.name] == [each.name for each in tmp_path.glob("key*")]
    assert "VaultKey()" == repr(key) and key.fingerprint not in file.read_text()
    assert VaultKey.load(file).fingerprint == key.fingerprint
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others.*chmod 600"):
        VaultKey.load(file)
    file.chmod(0o600)
    file.write_text("something")
    with pytest.raises(ConfigError, match="vault key"):
        VaultKey.load(file)
    with pytest.raises(ConfigError, match="cannot be read.*shoal keys vault"):
        VaultKey.load(tmp_path / "none")
    with pytest.raises(ConfigError, match="no vault key can be kept"):
        VaultKey.make(file / "below")
    with pytest.raises(ConfigError, match="cannot be made"):
        Vault(file / "below", tmp_path / "key2")


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a b", "ä", "x" * 101])
def test_names(kept: Vault, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a file"):
        kept.open(name)


def test_what_is_cached_is_made_once(kept: Vault) -> None:
    """And again, if a crash has torn it."""
    made: list[int] = []

    def make() -> dict[str, np.ndarray[Any, Any]]:
        made.append(1)
        return {"x": np.arange(5)}

    for _ in range(3):
        assert [0, 1, 2, 3, 4] == kept.cached("part", make)["x"].tolist()
    assert 1 == len(made)
    with kept.open("torn"):
        pass
    with path(kept, "torn").open("ab") as file:
        file.write(b"\xff\xff\xff\xff half a salt")
    assert 5 == len(kept.cached("torn", make)["x"]) and 2 == len(made)


def test_the_command(tmp_path: Path) -> None:
    """`shoal keys vault` makes one, and then says which it is; the face has the rest."""
    file = str(tmp_path / "deep" / "key")
    first, second = (CliRunner().invoke(cli.shoal, ["keys", "vault", file]) for _ in range(2))
    key = VaultKey.load(file)
    assert f"vault key {key.fingerprint} in {file}, new: keep a copy elsewhere\n" == first.output
    assert f"vault key {key.fingerprint} in {file}\n" == second.output
    assert shoal.Vault is Vault and shoal.VaultError is VaultError
