"""Identities of clients in federated rounds, on disk: a private key each, and one list of all public ones (SPEC §14.5).

Rules
- With identities even servers that lie learn nothing but sums: clients know each other's keys from a list that no server has made.
- A private key is readable by its owner alone. A list is public; who shares it must not be the server's operator alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..protocol.errors import ConfigError
from ..protocol.join import is_name, key_text, read_key
from ..protocol.secure.keys import Identity, is_weak

_LIST_HINT = "a line for each client, NAME KEY, as `shoal keys identity` prints it"


def load_or_make(path: str) -> Identity:
    """The identity in a file; a new one if there is no such file.

    Raises:
        ConfigError: it can be read by others, is no identity, or cannot be written.
    """
    file = Path(path).expanduser()
    try:
        if file.exists():
            return load(path)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity = Identity.fresh()
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(key_text(identity.private_bytes) + "\n")
    except OSError as error:
        raise ConfigError(f"no identity can be kept in {path}: {error.strerror}") from None
    return identity


def load(path: str) -> Identity:
    """
    Raises:
        ConfigError: there is no such file, it can be read by others, or it is no identity.
    """
    file = Path(path).expanduser()
    try:
        mode = file.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o})", hint=f"chmod 600 {path}")
        return Identity.of(read_key(file.read_text().strip(), "identity"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the identity {path} cannot be read: {error}", hint="shoal keys identity FILE") from None


def load_list(path: str) -> dict[str, bytes]:
    """Public keys by the names of clients.

    Raises:
        ConfigError: it cannot be read, or a line is wrong: the text says which.
    """
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of identities {path} cannot be read: {error}", hint=_LIST_HINT) from None
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        where = f"line {number} of {path}"
        if len(words) != 2 or not is_name(words[0]):
            raise ConfigError(f"{where} is not NAME KEY", hint=_LIST_HINT)
        name, key = words[0], read_key(words[1], f"key in {where}")
        if is_weak(key):
            raise ConfigError(f"{where} has a key with which anybody can sign", cause="it is no key that was drawn")
        if name in found or key in found.values():
            raise ConfigError(f"{where} has a name or a key for the second time", hint="each client has one of its own")
        found[name] = key
    if not found:
        raise ConfigError(f"{path} lists no identity", hint=_LIST_HINT)
    return found


def own(name: str, path: str, peers: dict[str, bytes]) -> Identity:
    """A worker's identity, which must be the one that is listed under its name.

    Raises:
        ConfigError: it is not.
    """
    identity = load(path)
    if name not in peers:
        raise ConfigError(
            f"the list of identities has no {name!r}", hint="the name in the list: shoal.connect(name=…), --name"
        )
    if peers[name] != identity.public:
        raise ConfigError(
            f"the identity that is listed for {name!r} is not the one in {path}", hint="shoal keys identity FILE"
        )
    return identity
