"""What an owner keeps on disk between rounds and tasks, encrypted with a key of the owner's: feedback, cached partitions.

    FOLDER/NAME.vault     records, each sealed by AES-256-GCM
    FOLDER/NAME.head      how many there are and the last one's tag, under HMAC-SHA256

Rules
- A key is for one thing: from the owner's 32 bytes HKDF-SHA256 (RFC 5869) makes one for each name and each time that its file is
  opened to write, with fresh salt. Under it the nonce is a count: no nonce comes twice, whatever a crash has left.
- A record is bound to its name, its number and the tag of the record before it. A flipped bit, a record that is swapped, left out,
  repeated or of another file is found; so is an end that is cut off, for the head counts.
- Records are made durable before the head counts them. What a crash has left behind that is taken if it is whole; if it is torn, it
  is an error until the caller says to drop it.
- A key that is gone is not made again over what it has locked.

Not found: both files put back as they were at an earlier time, or both removed. Nothing on the disk could tell.
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..protocol.errors import ConfigError, ProtocolError, VaultError
from ..protocol.join import key_text, read_key
from ..protocol.secure.hashing import derive, pack
from ..tasks.values import Value
from ..tasks.values import pack as pack_value
from ..tasks.values import unpack as unpack_value

logger = logging.getLogger("shoal")

MAGIC = b"shoal vault 1\n\0\0"
SALT = 32
TAG = 16
MOST_BYTES = 1 << 30
"""Of a record."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_LENGTH = struct.Struct("<I")
_NEW_KEY = 0xFFFFFFFF
"""In place of a length: a salt follows, and the records behind it are under the key that it makes."""
_HEAD = struct.Struct("<16s32sQQ16s")
_START = len(MAGIC) + SALT


@dataclass(frozen=True, slots=True)
class VaultKey:
    """32 bytes that only their owner has. They are in no `repr` and no error."""

    secret: bytes = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> VaultKey:
        """
        Raises:
            ConfigError: there is no such file, others can read it, or it is no key.
        """
        file = Path(path).expanduser()
        try:
            with file.open() as opened:
                mode = os.fstat(opened.fileno()).st_mode
                if mode & 0o077:
                    raise ConfigError(f"{path} can be read by others (mode {mode & 0o777:o})", hint=f"chmod 600 {path}")
                text = opened.read(1024)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the vault's key {path} cannot be read: {error}",
                hint=f"a copy of it, if you have one; for a new vault: shoal keys vault {path}",
            ) from None
        return cls(read_key(text.strip(), "vault key"))

    @classmethod
    def make(cls, path: str | Path) -> VaultKey:
        """A new one, readable by its owner alone; if another process has just made one there, that one.

        Raises:
            ConfigError: it cannot be written.
        """
        file = Path(path).expanduser()
        fresh = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                out.write(key_text(os.urandom(32)) + "\n")
                out.flush()
                os.fsync(out.fileno())
            try:
                os.link(fresh, file)  # whole or not at all, and never over another
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        except OSError as error:
            raise ConfigError(f"no vault key can be kept in {path}: {error.strerror}") from None
        return cls.load(file)

    @property
    def fingerprint(self) -> str:
        """By which it is told from others; nothing else can be learned from it."""
        return self.of("fingerprint").hex()[:16]

    def of(self, *words: str, salt: bytes = b"") -> bytes:
        """The key for a purpose."""
        return derive(self.secret, salt, pack(["shoal vault", *words]))


class Vault:
    """A folder of sealed files under one key.

    Args:
        folder: made if it is not there. key: the file with the owner's key; made, readable by its owner alone, where neither it nor
            anything in the folder is there.

    Raises:
        VaultError: the key is gone, and what it has locked is here. ConfigError: others can read the key, or it is none; or the
            folder cannot be made.
    """

    def __init__(self, folder: str | Path, key: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not Path(key).expanduser().exists():
            if any(self.folder.glob("*.head")) or any(self.folder.glob("*.vault")):
                raise VaultError(
                    f"the key {key} is gone, and what it has locked in {folder} cannot be read without it",
                    hint="put back a copy of the key; or move the folder away and begin anew",
                )
            VaultKey.make(key)
        self._key = VaultKey.load(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {error.strerror}", hint="a folder of yours") from None

    def open(self, name: str, *, drop_torn: bool = False) -> Sealed:
        """A file of records, to read and to append to; a context manager. It is made if it is not there.

        Args:
            name: a purpose of its own for each: `feedback`, `partition-3`. drop_torn: a last record that a crash has torn is
                dropped, with a warning that says how much; otherwise it is an error.

        Raises:
            VaultError: the key does not fit, the file was changed or cut, its last record is torn, or another process has it open.
            ConfigError: this is no name. OSError: the disk.
        """
        return Sealed(self.folder, self._key, name, drop_torn)

    def cached(self, name: str, make: Callable[[], Value]) -> Value:
        """What was kept under this name; the first time it is made, and kept.

        Raises:
            VaultError: as `open`. ShapeError: it is neither plain data nor arrays.
        """
        with self.open(name, drop_torn=True) as kept:
            for value in kept:
                return value
            kept.append(value := make())
            return value


class Sealed:
    """A file of a vault. For one thread. Iterating reads from the first record on, and checks each."""

    _id: bytes
    _count: int
    _size: int
    """Bytes up to the end of the last record."""
    _tag: bytes

    def __init__(self, folder: Path, key: VaultKey, name: str, drop_torn: bool) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r:.80} is no name for a file of a vault", hint="letters, digits, - _ and .")
        self.name = name
        self._key = key
        self._path, self._head = folder / f"{name}.vault", folder / f"{name}.head"
        self._mac = key.of("head", name)
        self._writer: AESGCM | None = None
        self._written = 0
        self._file = self._claim()
        try:
            self._begin(drop_torn)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        """Records."""
        return self._count

    def __repr__(self) -> str:
        return f"Sealed({self.name}, {self._count} records)"

    def append(self, value: Value) -> None:
        """One record more, durable when this returns. Arguments as `extend`."""
        self.extend((value,))

    def extend(self, values: Iterable[Value]) -> None:
        """Records, made durable together.

        Raises:
            ShapeError: one is neither plain data nor arrays; none is kept then. OSError: the disk is full: this file is closed;
                opened again, it has what was there before, and of these as many as there was room for.
        """
        plain = [pack_value(value) for value in values]
        if any(len(each) > MOST_BYTES - TAG for each in plain):
            raise ConfigError(f"a record of more than {MOST_BYTES:,} bytes")
        if not plain:
            return
        out = bytearray()
        if self._writer is None:
            salt = os.urandom(SALT)
            self._writer, self._written = self._cipher(salt), 0
            out += _LENGTH.pack(_NEW_KEY) + salt
        count, tag = self._count, self._tag
        for each in plain:
            sealed = self._writer.encrypt(self._written.to_bytes(12, "big"), each, self._bound(count, tag))
            self._written += 1
            count, tag = count + 1, sealed[-TAG:]
            out += _LENGTH.pack(len(sealed)) + sealed
        try:
            self._file.seek(self._size)
            self._file.write(out)
            self._durable(self._file)
            self._count, self._tag, self._size = count, tag, self._size + len(out)
            self._save_head()
        except OSError:
            self.close()  # whoever opens it again sees what was kept
            raise

    def __iter__(self) -> Iterator[Value]:
        """The records, oldest first.

        Raises:
            VaultError: a record was changed.
        """
        count, tag, at = 0, bytes(TAG), _START
        reader: AESGCM | None = None
        nonce = 0
        while at < self._size:
            found = self._record(at, count, tag, reader, nonce, self._size)
            if found is None:
                raise VaultError(
                    f"record {count} of {self._path} is not what was kept there",
                    cause="a bit has changed on disk, or somebody has put other records in its place",
                    hint="a copy of the file and its .head, if there is one",
                )
            at, reader, nonce, plain, seal = found
            if plain is None:
                continue
            count, tag = count + 1, seal
            yield self._value(plain, count)
        if (count, tag) != (self._count, self._tag):
            raise VaultError(f"{self._path} ends with another record than it should", cause="it was changed on disk")

    def close(self) -> None:
        """Again changes nothing."""
        self._file.close()

    def __enter__(self) -> Sealed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- opening

    def _claim(self) -> BinaryIO:
        if not self._path.exists() and self._head.exists() and self._read_head()[1]:
            raise VaultError(
                f"{self._path} is gone, and its .head counts records in it", hint="a copy, if there is one"
            )
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise VaultError(
                f"{self._path} is open already", cause="another process, or another place in this one"
            ) from None
        return file

    def _begin(self, drop_torn: bool) -> None:
        length = self._file.seek(0, os.SEEK_END)
        if not self._head.exists():
            if length:
                raise VaultError(f"{self._head} is gone: nobody knows how many records there were")
            self._id, self._count, self._size, self._tag = os.urandom(SALT), 0, _START, bytes(TAG)
            self._save_head()
        else:
            self._id, self._count, self._size, self._tag = self._read_head()
        if not self._count and self._size == _START and length < _START:  # a crash at its making
            self._file.seek(0)
            self._file.write(MAGIC + self._id)
            self._durable(self._file)
            length = _START
        self._file.seek(0)
        if self._file.read(_START) != MAGIC + self._id:
            raise VaultError(f"{self._path} and its .head are not of one another")
        if length < self._size:
            raise VaultError(
                f"{self._path} is cut off: {length:,} bytes are left of {self._size:,} in {self._count} records",
                hint="a copy of the file, if there is one",
            )
        if length > self._size:
            self._adopt(length, drop_torn)

    def _adopt(self, length: int, drop_torn: bool) -> None:
        """What is behind what the head counts, where a crash came before it was written: a salt, or a record under the last key."""
        at, count, tag = self._size, self._count, self._tag
        reader, nonce = self._last_key()
        while at < length:
            found = self._record(at, count, tag, reader, nonce, length)
            if found is None:
                break
            after, reader, nonce, plain, seal = found
            at = after
            if plain is not None:
                count, tag = count + 1, seal
                self._count, self._tag, self._size = count, tag, at
        torn = length - self._size
        if torn:
            what = f"the last record of {self._path} is torn: {torn:,} bytes behind record {self._count}"
            if not drop_torn:
                raise VaultError(what, cause="a crash while it was written", hint="open(…, drop_torn=True) drops it")
            logger.warning("%s; they are dropped", what)
            self._file.truncate(self._size)
            self._durable(self._file)
        self._save_head()

    def _last_key(self) -> tuple[AESGCM | None, int]:
        """The key that the last record is under, and the next nonce; lengths alone are read."""
        at, reader, nonce = _START, None, 0
        while at < self._size:
            self._file.seek(at)
            (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
            if length == _NEW_KEY:
                reader, nonce, length = self._cipher(self._file.read(SALT)), 0, SALT
            else:
                nonce += 1
            at += _LENGTH.size + length
        return reader, nonce

    # --- records

    def _record(
        self, at: int, count: int, tag: bytes, reader: AESGCM | None, nonce: int, end: int
    ) -> tuple[int, AESGCM | None, int, bytes | None, bytes] | None:
        """What is at a place: where the next is, key and nonce for that, the record (None for a salt) and its tag.

        None if it is torn or not authentic.
        """
        if at + _LENGTH.size > end:
            return None
        self._file.seek(at)
        (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
        at += _LENGTH.size
        if length == _NEW_KEY:
            return (at + SALT, self._cipher(self._file.read(SALT)), 0, None, b"") if at + SALT <= end else None
        if reader is None or not TAG <= length <= MOST_BYTES or at + length > end:
            return None
        sealed = self._file.read(length)
        try:
            plain = reader.decrypt(nonce.to_bytes(12, "big"), sealed, self._bound(count, tag))
        except InvalidTag:
            return None
        return at + length, reader, nonce + 1, plain, sealed[-TAG:]

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(self._key.of("records", self.name, salt=salt))

    def _bound(self, count: int, tag: bytes) -> bytes:
        """What a record is bound to."""
        return pack([self.name, self._id, count, tag])

    def _value(self, plain: bytes, count: int) -> Value:
        try:
            return unpack_value(plain)
        except ProtocolError as error:
            raise VaultError(f"record {count} of {self._path} is of another shoal: {error.what}") from None

    # --- the head

    def _save_head(self) -> None:
        body = _HEAD.pack(MAGIC, self._id, self._count, self._size, self._tag)
        fresh = self._head.with_suffix(".head.new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(body + hmac.digest(self._mac, body, "sha256"))
            self._durable(out)
        os.replace(fresh, self._head)
        folder = os.open(self._head.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _read_head(self) -> tuple[bytes, int, int, bytes]:
        found = self._head.read_bytes()
        body, mac = found[: _HEAD.size], found[_HEAD.size :]
        if not hmac.compare_digest(hmac.digest(self._mac, body, "sha256"), mac):
            raise VaultError(
                f"{self._head} does not fit its key",
                cause="another key than it was made with, another name, or a bit that has changed on disk",
                hint="the key file that was used before; shoal keys vault FILE says which key a file is",
            )
        _, id_, count, size, tag = _HEAD.unpack(body)
        return id_, count, size, tag

    @staticmethod
    def _durable(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())
