"""The parameters of one moment, for whoever publishes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tasks.card import Lineage
from .arrays import Array

if TYPE_CHECKING:
    from .client import Worker


def consistent(worker: Worker, timeout: float | None = None) -> tuple[dict[str, Array], Lineage]:
    """All parameters as one version, and what it is of. Raises as `Worker.pull`."""
    core = worker._core
    worker._registered()
    arrays = worker.pull(timeout=timeout)
    run = core.welcome.run if core.welcome else 0
    return arrays, Lineage(run, worker.mode, core.stats.clock)
