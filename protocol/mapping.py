"""A file's bytes as memory. Unlike `mmap.mmap` it keeps no descriptor of the file, so that a thousand regions cost none.

Rules
- The memory is unmapped when the last view of it is gone.
"""

from __future__ import annotations

import ctypes
import weakref

_READ_WRITE, _SHARED = 0x1 | 0x2, 0x1
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def mapped(file: int, size: int) -> memoryview:
    """The first `size` bytes of an open file, shared with whoever else has mapped them, writable.

    Raises:
        OSError: it cannot be mapped.
    """
    address = _libc.mmap(None, size, _READ_WRITE, _SHARED, file, 0)
    if address is None or address == _FAILED:
        raise OSError(ctypes.get_errno(), "mmap failed")
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False
    return memoryview(memory).cast("B")
