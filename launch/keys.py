"""The cluster's keys on disk: made on first use, readable by their owner alone (SPEC §10).

Rules
- A secret is never in an argument, a log or an error. A file that others can read is refused.
- Missing or short key material is an error at the start, never an empty key.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from ..protocol.errors import ConfigError
from ..protocol.join import key_text, read_key

FILE = "keys.json"


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """Raw 32-byte CURVE keys: the servers' own pair, and the pair behind the credential in the join string."""

    server_public: bytes
    server_secret: bytes
    enrol_public: bytes
    enrol_secret: bytes


def state_dir(given: str) -> Path:
    """Where state is kept: as given, or the user's state directory."""
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "shoal"


def load_or_make(directory: Path) -> Keys:
    """The keys in `directory`; made if there are none.

    Raises:
        ConfigError: the file is readable by others, or is not a key file; or the directory cannot be written.
    """
    path = directory / FILE
    try:
        if path.exists():
            return _load(path)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _make(path)
    except OSError as error:
        raise ConfigError(
            f"keys cannot be kept in {directory}: {error.strerror}", hint="--state-dir with a folder of yours"
        ) from None


def public_of(secret: bytes) -> bytes:
    """The public half of a raw secret key."""
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def _load(path: Path) -> Keys:
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o})", hint=f"chmod 600 {path}")
    try:
        found = json.loads(path.read_text())
        server, enrol = read_key(found["server"], "server key"), read_key(found["enrol"], "credential")
    except (ValueError, KeyError, TypeError, ConfigError):
        raise ConfigError(
            f"{path} is not a key file of shoal", hint="remove it; new keys are made at the next start"
        ) from None
    return Keys(public_of(server), server, public_of(enrol), enrol)


def _make(path: Path) -> Keys:
    (server_public, server), (enrol_public, enrol) = zmq.curve_keypair(), zmq.curve_keypair()
    keys = Keys(z85.decode(server_public), z85.decode(server), z85.decode(enrol_public), z85.decode(enrol))
    body = json.dumps({"server": key_text(keys.server_secret), "enrol": key_text(keys.enrol_secret)})
    fresh = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(body + "\n")
    try:
        os.link(fresh, path)  # unlike a rename it does not replace what another server has made meanwhile
    except FileExistsError:
        return _load(path)
    finally:
        fresh.unlink()
    return keys
