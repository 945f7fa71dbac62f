"""Masks: streams of integers from a key of 32 bytes, added to a vector or subtracted from it in its modulus (SPEC §14).

Rules
- The stream is AES-256 in counter mode. Bytes `[256 KiB * c, 256 KiB * (c + 1))` of domain d begin at the counter block
  BE32(d) || BE64(c) || BE32(2), so that any part can be made alone. That is what AES-256-GCM makes of zeros: the quickest way.
- Lanes are little-endian integers as wide as the vector's. A vector's element has one lane, that of its own number.
- The main vector is domain 0, the auxiliary one domain 1: no byte of a stream is used twice.
- Chunk by chunk: what is worked on stays in the processor's cache, whatever the number of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .fixed import Quantiser
from .noise import Array

CHUNK_BYTES = 1 << 18
ALIGN = CHUNK_BYTES // 2
"""Elements, of either width, by which a shard's part is best begun: then no chunk is made twice."""
MAIN, AUXILIARY = 0, 1
"""Domains."""
_BLOCK = 16
_FIRST = 2
"""The counter of a chunk's first block: GCM keeps 1 for its tag."""
_ZEROS = memoryview(bytes(CHUNK_BYTES))


class Masks:
    """The masks of one party in one session. It keeps its working memory.

    Args:
        add, subtract: keys of 32 bytes. domain: of the stream, from 0.
    """

    def __init__(self, add: Sequence[bytes], subtract: Sequence[bytes] = (), domain: int = MAIN) -> None:
        self._keys = [*add, *subtract]
        if any(len(key) != 32 for key in self._keys):
            raise ValueError("a key of a mask has 32 bytes")
        self._ciphers = [AESGCM(key) for key in self._keys]
        self._added, self._domain = len(add), domain
        self._stream = bytearray(CHUNK_BYTES + _BLOCK)

    def apply(self, vector: Array, start: int = 0) -> None:
        """Mask, or unmask.

        Args:
            vector: unsigned integers of 2, 4 or 8 bytes, one-dimensional, in place. start: the number of its first element.
        """
        for begin, end in self._chunks(vector, start):
            self._mask(vector[begin:end], start + begin)

    def encode(self, update: Array, quantiser: Quantiser, out: Array, start: int = 0) -> int:
        """Quantise and mask, in one go.

        Args:
            update: float32 or float64. out: of the quantiser's `dtype`, as long. start: the number of the first element.

        Returns:
            How many elements were cut off at the clip.

        Raises:
            NonFiniteError: the update holds NaN or infinity; `out` may hold anything and MUST NOT be sent.
        """
        clipped = 0
        for begin, end in self._chunks(out, start):
            clipped += quantiser.write(update[begin:end], out[begin:end])
            self._mask(out[begin:end], start + begin)
        return clipped

    def _chunks(self, vector: Array, start: int) -> list[tuple[int, int]]:
        """The parts of a vector that begins at this element, cut where chunks of the stream are."""
        if vector.dtype.kind != "u" or vector.dtype.itemsize not in (2, 4, 8) or start < 0:
            raise ValueError(f"a mask for {vector.dtype} from {start}")
        lanes = CHUNK_BYTES // vector.dtype.itemsize
        cuts = [0, *range(lanes - start % lanes, len(vector), lanes), len(vector)]
        return list(pairwise(cuts)) if len(vector) else []

    def _mask(self, piece: Array, start: int) -> None:
        """A part that lies in one chunk."""
        width = piece.dtype.itemsize
        chunk, offset = divmod(start * width, CHUNK_BYTES)
        nonce = ((self._domain << 64) | chunk).to_bytes(12, "big")
        size = piece.nbytes
        lanes = np.frombuffer(self._stream, piece.dtype.newbyteorder("<"), len(piece))
        zeros, room = _ZEROS[:size], memoryview(self._stream)[: size + _BLOCK]
        for number, cipher in enumerate(self._ciphers):
            if offset:
                room[:size] = _middle(self._keys[number], nonce, offset, size)
            else:
                cipher.encrypt_into(nonce, zeros, None, room)
            (np.add if number < self._added else np.subtract)(piece, lanes, out=piece)

    def __repr__(self) -> str:
        return f"Masks({self._added} added, {len(self._keys) - self._added} subtracted)"


def apply(vector: Array, start: int, add: Sequence[bytes], subtract: Sequence[bytes] = (), domain: int = MAIN) -> None:
    """Add and subtract the masks of these keys, as `Masks.apply`."""
    Masks(add, subtract, domain).apply(vector, start)


def _middle(key: bytes, nonce: bytes, offset: int, size: int) -> bytes:
    """So many bytes of a chunk's stream from an offset that is not its beginning: counter mode, which can begin at any block."""
    block, skipped = divmod(offset, _BLOCK)
    counter = CTR(nonce + (_FIRST + block).to_bytes(4, "big"))
    return Cipher(AES(key), counter).encryptor().update(bytes(skipped + size))[skipped:]
