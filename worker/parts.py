"""How blocks are put together in messages (SPEC §2.3, §7)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from .calls import Part

PART_BYTES = 4 * 1024 * 1024
MOST_PARTS = 64
"""Parts, of at most 1,024 blocks each, in one push out of a region."""


def packed(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
    """Blocks, given as (number, bytes), in runs that fit one message (SPEC §2.3)."""
    run: list[int] = []
    size = 0
    for index, nbytes in blocks:
        if run and (size + nbytes > PART_BYTES or len(run) == 1024):
            yield tuple(run)
            run, size = [], 0
        run.append(index)
        size += nbytes
    if run:
        yield tuple(run)


def without(part: Part, blocks: Collection[int]) -> Part | None:
    """The part without these blocks, all of which are whole; None if nothing is left."""
    kept = [at for at, block in enumerate(part.blocks) if block not in blocks]
    if len(kept) == len(part.blocks) or part.ranges:
        return part
    if not kept:
        return None
    buffers = tuple(part.buffers[at] for at in kept)
    return Part(part.shard, tuple(part.blocks[at] for at in kept), (), buffers, part.codec)


def in_region(parts: Sequence[Part]) -> list[Part]:
    """The same parts for a shard that finds the blocks in the region: as few as may be, and no buffers but the ranges'."""
    found = []
    for start in range(0, len(parts), MOST_PARTS):
        few = parts[start : start + MOST_PARTS]
        blocks = tuple(block for part in few for block in part.blocks)
        ranges: tuple[int, ...] = ()
        spans: tuple[bytes, ...] = ()
        if any(part.ranges for part in few):
            ranges = tuple(n for part in few for n in part.ranges or (0,) * len(part.blocks))
            spans = (b"".join(bytes(part.buffers[0]) for part in few if part.ranges),)
        found.append(Part(few[0].shard, blocks, ranges, spans))
    return found
