"""What an operator decides for a run, before it begins. `mode` and `staleness` may change later (ps/switch)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.layout import BLOCK_BYTES
from .recipe import Recipe


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator decides. `lease` is in seconds, `staleness` a number of clocks or inf, `block_bytes` in bytes."""

    mode: str = "async"
    staleness: float = 3.0
    nonfinite: str = "error"
    lease: float = 15.0
    min_workers: int = 1
    min_shards: int = 1
    block_bytes: int = BLOCK_BYTES
    insecure: bool = False
    recipe: Recipe = field(default_factory=lambda: Recipe(measured=True))
    """Of federated rounds."""
