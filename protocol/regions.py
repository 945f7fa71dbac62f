"""Where the blocks lie in a region: memory that a worker shares with the shards of its machine (SPEC §11). Pure.

Rules
- A region begins with a page that holds its token; then come the flats, each on a page of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .layout import Layout
from .model import ITEMSIZE

PAGE = 4096
TOKEN_BYTES = 32
NAME = "shoal"
"""What the file is called, where the system shows it."""


@dataclass(frozen=True)
class Plan:
    """Bytes: of the region, where each flat begins, and `[start, stop)` of each block."""

    size: int
    flats: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]


@lru_cache(maxsize=4)
def plan(layout: Layout) -> Plan:
    """The plan of every region for a model of this layout."""
    starts, end = [], PAGE
    for flat in layout.flats:
        starts.append(end)
        end += -(-flat.elements * ITEMSIZE[flat.dtype] // PAGE) * PAGE
    spans = [(starts[b.flat] + b.start * b.itemsize, starts[b.flat] + b.stop * b.itemsize) for b in layout.blocks]
    return Plan(end, tuple(starts), tuple(spans))
