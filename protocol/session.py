"""What is in the buffers of a round's messages, and what is signed in it (SPEC §14.4, §14.6). Pure: both sides use it.

Rules
- What comes in is read strictly: `ProtocolError` and nothing else is raised for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .errors import ProtocolError
from .join import is_name
from .rounds import MAX_MEMBERS
from .schema import Buffer
from .secure.hashing import SIZE, digest, pack, unpack
from .secure.keys import KEY_BYTES, SEAL_BYTES, SIGNATURE_BYTES
from .secure.shares import SHARE_BYTES

MAX_ADVERT = 1024
MAX_COMPLETE = 1024
"""Members where all are neighbours: the keys of all that drop out must fit a buffer."""
ALIGN = 1 << 17
"""A shard's range begins at a multiple of so many elements: chunks of masks, of either width, begin there too."""
PIECE = 4 * 1024 * 1024
"""Bytes of a slice in a message."""
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
LANE_BYTES = 8
ADVERTISE, DEAL, TURN, MASKED, CONSENT, UNMASK, FINISH = range(7)
"""Places in a plan's deadlines."""
STAGES = 7


@dataclass(frozen=True)
class Advert:
    """A client's keys for a session.

    Attributes:
        context: of the plan. name: the client's. sealing, masking: public keys. signature: over both, or empty.
    """

    context: bytes
    name: str
    sealing: bytes
    masking: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """What the signature is of."""
        return digest("adv", pack([self.context, self.name, self.sealing, self.masking]))

    @cached_property
    def packed(self) -> bytes:
        return pack([self.context, self.name, self.sealing, self.masking, self.signature])

    @cached_property
    def leaf(self) -> bytes:
        return digest("advert", self.packed)


def read_advert(data: bytes | bytearray | memoryview, masked: bool) -> Advert:
    """The advert behind `packed`.

    Args:
        masked: are there keys in it? In the clear there are none.

    Raises:
        ProtocolError: `malformed`.
    """
    if len(data) > MAX_ADVERT:
        raise ProtocolError("malformed", f"an advert of {len(data)} bytes")
    found = unpack(bytes(data))
    size = KEY_BYTES if masked else 0
    if (
        type(found) is tuple
        and [type(each) for each in found] == [bytes, str, bytes, bytes, bytes]
        and [len(found[0]), len(found[2]), len(found[3])] == [SIZE, size, size]
        and len(found[4]) in ((0, SIGNATURE_BYTES) if masked else (0,))
        and found[1]
        and is_name(found[1])
    ):
        return Advert(*found)
    raise ProtocolError("malformed", "bytes that are no advert")


@dataclass(frozen=True)
class Members:
    """The members of a session, by rank: names, and leaves of their adverts."""

    names: tuple[str, ...]
    leaves: tuple[bytes, ...]

    def sid(self, context: bytes) -> bytes:
        """By this all know that they speak of the same session: 32 bytes."""
        return digest("session", context, *self.leaves)


def pack_leaves(members: Members) -> bytes:
    """What is the same in everybody's roster: its first buffer."""
    return pack([[name, leaf] for name, leaf in zip(members.names, members.leaves, strict=True)])


def pack_adverts(adverts: Iterable[Advert]) -> bytes:
    """Those of a roster's neighbours, by rank: its second buffer."""
    return pack([advert.packed for advert in adverts])


def read_roster(buffers: Sequence[Buffer], masked: bool) -> tuple[Members, tuple[Advert, ...]]:
    """What `pack_leaves` and `pack_adverts` packed.

    Raises:
        ProtocolError: `malformed`: no such bytes, or names that do not ascend.
    """
    leaves, adverts = (unpack(bytes(buffer)) for buffer in buffers)
    if type(leaves) is not tuple or type(adverts) is not tuple:
        raise ProtocolError("malformed", "bytes that are no roster")
    if len(leaves) > MAX_MEMBERS or len(adverts) > len(leaves):
        raise ProtocolError("malformed", f"a roster of {len(leaves)} members with {len(adverts)} adverts")
    for entry in leaves:
        if type(entry) is not tuple or [type(part) for part in entry] != [str, bytes] or len(entry[1]) != SIZE:
            raise ProtocolError("malformed", "a leaf that is none")
    if any(type(advert) is not bytes for advert in adverts):
        raise ProtocolError("malformed", "an advert that is none")
    names = tuple(name for name, _ in leaves)
    ascending(names, "names")
    return Members(names, tuple(leaf for _, leaf in leaves)), tuple(read_advert(each, masked) for each in adverts)


def ascending(items: Sequence[int] | Sequence[str], what: str) -> None:
    """
    Raises:
        ProtocolError: `malformed`: they do not ascend strictly.
    """
    if any(not before < after for before, after in pairwise(items)):  # type: ignore[operator]
        raise ProtocolError("malformed", f"{what} that do not ascend")


def ends(data: bytes | bytearray | memoryview, size: int, count: int, what: str) -> list[bytes]:
    """Items of equal size that stand end to end.

    Raises:
        ProtocolError: `malformed`: these are not so many.
    """
    if len(data) != size * count:
        raise ProtocolError("malformed", f"{len(data)} bytes, and {count} {what} have {size * count}")
    plain = bytes(data)
    return [plain[at : at + size] for at in range(0, len(plain), size)] if size else []


def by_rank(ranks: Sequence[int], data: bytes | bytearray | memoryview, size: int, what: str) -> dict[int, bytes]:
    """Items that stand end to end, by rank.

    Raises:
        ProtocolError: `malformed`.
    """
    ascending(ranks, "ranks")
    return dict(zip(ranks, ends(data, size, len(ranks), what), strict=True))


def consent(sid: bytes, survivors: Sequence[int]) -> bytes:
    """What a survivor signs, by ranks in ascending order."""
    return digest("consist", digest("u3", sid, pack(list(survivors))))


def blocks_digest(blocks: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Of the values of a shard's blocks, by number: 32 bytes."""
    hashed = hashlib.sha256()
    for block in blocks:
        hashed.update(hashlib.sha256(block).digest())
    return hashed.digest()


def model_digest(layout: bytes, shards: Iterable[bytes]) -> bytes:
    """Of the weights that a round begins with.

    Args:
        layout: the digest of the model's layout. shards: the digest of each shard's blocks, by index.
    """
    return digest("model", layout, *shards)


def ranges(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The range of each shard in a plan, of which the sizes are numbers of elements."""
    found, start = [], 0
    for size in sizes:
        found.append((start, start + size))
        start = -(-(start + size) // ALIGN) * ALIGN
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Slice:
    """Where things are in a slice.

    Args:
        elements: of the shard. width: bytes of one. lanes: of the auxiliary vector.
    """

    elements: int
    width: int
    lanes: int

    @property
    def main(self) -> int:
        """Bytes of the elements."""
        return self.elements * self.width

    @property
    def auxiliary(self) -> int:
        """Where the lanes begin."""
        return -(-self.main // LANE_BYTES) * LANE_BYTES

    @property
    def size(self) -> int:
        return self.auxiliary + self.lanes * LANE_BYTES
