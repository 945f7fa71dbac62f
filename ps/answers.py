"""The answer to a pull, as messages (SPEC §6.4).

Rules
- All of one answer is of one moment: it is made before anything else happens. No message is larger than a part, unless a block is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..protocol.messages import Pull, Values
from .store import Store

PART_BYTES = 4 * 1024 * 1024
MOST_BLOCKS = 1024


def in_buffers(pull: Pull, shard: int, store: Store, min_clock: int, counters: Counter[str]) -> Iterator[Values]:
    """What has changed since the reader's version. Counts `bytes_out`.

    Args:
        shard: its incarnation.
    """
    parts = list(_parts(store, store.changed_since(pull.since, pull.blocks)))
    for number, blocks in enumerate(parts):
        buffers = tuple(store.snapshot(block, pull.codec) for block in blocks)
        counters["bytes_out"] += sum(map(len, buffers))
        head = (pull.incarnation, shard, pull.request, number, len(parts), store.version, min_clock, 0, pull.codec)
        yield Values(*head, blocks, buffers)


def _parts(store: Store, blocks: list[int]) -> Iterator[tuple[int, ...]]:
    """At least one, be it empty."""
    part: list[int] = []
    size = 0
    for block in blocks:
        if part and (size + store.nbytes_of(block) > PART_BYTES or len(part) == MOST_BLOCKS):
            yield tuple(part)
            part, size = [], 0
        part.append(block)
        size += store.nbytes_of(block)
    yield tuple(part)
