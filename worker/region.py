"""Memory that this worker shares with the shards of its machine (SPEC §11).

Rules
- A region is a sealed memory file without a name: when the processes that have it open are gone, so is the memory.
- Its pages are reserved when it is made: too little memory is an error here, not a signal later.
"""

from __future__ import annotations

import fcntl
import os
from itertools import count
from typing import Any

import numpy as np

from ..protocol.layout import Layout
from ..protocol.mapping import mapped
from ..protocol.regions import NAME, TOKEN_BYTES

_ADD_SEALS, _SEALS = 1033, 0x1 | 0x2 | 0x4
_numbers = count(1)

NUMPY = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}


class Region:
    """Flat vectors of a layout, in memory that others can open.

    Raises:
        OSError: there is too little memory, or this system has no memory files.
    """

    def __init__(self, layout: Layout) -> None:
        self.fd = -1
        self.number = next(_numbers)
        """Never used again in this process."""
        self.size = layout.plan.size
        self.token = os.urandom(TOKEN_BYTES)
        self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, self.size)
            fcntl.fcntl(self.fd, _ADD_SEALS, _SEALS)
            memory = mapped(self.fd, self.size)
        except OSError:
            self.close()
            raise
        memory[:TOKEN_BYTES] = self.token
        self.flats: list[np.ndarray[Any, np.dtype[Any]]] = [
            np.frombuffer(memory, NUMPY[flat.dtype], flat.elements, start)
            for flat, start in zip(layout.flats, layout.plan.flats, strict=True)
        ]

    def close(self) -> None:
        """It cannot be opened by anybody any more. Who has it open, and the views of it, keep it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()
