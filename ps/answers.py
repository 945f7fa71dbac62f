"""The answer to a pull, as messages (SPEC §6.4).

Rules
- All of one answer is of one moment, however long its messages take to leave. No message is larger than a part, unless a block is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from ..protocol.messages import Pull, Values
from .store import Store

PART_BYTES = 4 * 1024 * 1024
MOST_BLOCKS = 1024


def in_buffers(pull: Pull, shard: int, store: Store, min_clock: int, counters: Counter[str]) -> Iterator[Values]:
    """What has changed since the reader's version, as it is now. Counts `bytes_out` as it goes.

    Args:
        shard: its incarnation.
    """
    parts = deque(parts_of(store, store.changed_since(pull.since, pull.blocks)))
    shots = {block: store.shot(block, pull.codec) for blocks in parts for block in blocks}
    head, version = (pull.incarnation, shard, pull.request), store.version

    def made() -> Iterator[Values]:
        total = len(parts)
        for number in range(total):
            blocks = parts.popleft()
            buffers = tuple(shots.pop(block).values() for block in blocks)
            counters["bytes_out"] += sum(map(len, buffers))
            yield Values(*head, number, total, version, min_clock, 0, pull.codec, blocks, buffers)

    return made()


def parts_of(store: Store, blocks: list[int]) -> Iterator[tuple[int, ...]]:
    """Blocks in runs that fit one message: at least one, be it empty."""
    part: list[int] = []
    size = 0
    for block in blocks:
        if part and (size + store.nbytes_of(block) > PART_BYTES or len(part) == MOST_BLOCKS):
            yield tuple(part)
            part, size = [], 0
        part.append(block)
        size += store.nbytes_of(block)
    yield tuple(part)
