"""Opening a region that a worker of this machine offers (SPEC §11).

Rules
- What is opened is a sealed memory file of our own user that holds the token that came with the offer, or it is not opened.
- Nothing here has a name: when both processes are gone, however they went, so is the memory.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import stat

from ..protocol.mapping import mapped
from ..protocol.messages import Share
from ..protocol.regions import NAME, PAGE, TOKEN_BYTES

_SEALS = 0x1 | 0x2 | 0x4
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW: its size cannot change under our hands."""
_GET_SEALS = 1034


class Unfit(Exception):
    """The offer cannot be taken; the text says why."""


def attach(offer: Share) -> memoryview:
    """The region, mapped and writable. It is unmapped when nobody holds a view of it.

    Raises:
        Unfit: another machine or user, or not what it says.
    """
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise Unfit("it is no memory file of ours")
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise Unfit(f"it cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != offer.size:
            raise Unfit("it is of another user or size")
        if fcntl.fcntl(file, _GET_SEALS) & _SEALS != _SEALS:
            raise Unfit("its size is not sealed")
        memory = mapped(file, offer.size)
    except OSError as error:
        raise Unfit(f"it cannot be mapped: {error}") from None
    finally:
        os.close(file)
    if not hmac.compare_digest(memory[:TOKEN_BYTES], bytes(offer.buffers[0])) or offer.size % PAGE:
        raise Unfit("it does not hold the token")
    return memory
