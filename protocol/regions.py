"""Where the blocks lie in a region: memory that a worker shares with the shards of its machine (SPEC §11). Pure.

Rules
- A region begins with a page that holds its token; then come the flats, each on a page of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .model import ITEMSIZE

if TYPE_CHECKING:
    from .layout import Block, Flat

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


def plan(flats: Sequence[Flat], blocks: Sequence[Block]) -> Plan:
    """The plan of every region for a model of this layout; `Layout.plan` keeps it."""
    starts, end = [], PAGE
    for flat in flats:
        starts.append(end)
        end += -(-flat.elements * ITEMSIZE[flat.dtype] // PAGE) * PAGE
    spans = [(starts[b.flat] + b.start * b.itemsize, starts[b.flat] + b.stop * b.itemsize) for b in blocks]
    return Plan(end, tuple(starts), tuple(spans))
