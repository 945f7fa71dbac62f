"""All parameters as they are at one boundary of versions, while others go on training (SPEC §15).

Rules
- Of every live worker exactly the steps below one clock are in it, on every shard; a federated round is in it or not.
- The worker's own weights, gradients and place in the clocks are untouched.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..protocol.phases import at
from . import calls
from .arrays import Array, Cache

if TYPE_CHECKING:
    from .client import Worker


@dataclass(frozen=True, slots=True)
class Boundary:
    """Which version it is.

    Attributes:
        run: of the cluster, a 64-bit number. mode: in which its last step was made.
        clock: every live worker's steps below it are in it; of faster ones more, in `async`. In `federated`, completed rounds.
        key: a digest of the shards' versions: where it is the same, the parameters are.
    """

    run: int
    mode: str
    clock: int
    key: str


def consistent(worker: Worker, timeout: float | None = None) -> tuple[dict[str, Array], Boundary]:
    """Read all registered arrays as they are at one boundary.

    Args:
        timeout: seconds; by default the worker's own. Servers hold still for 2 s at most in each attempt, usually for milliseconds.

    Returns:
        Arrays of the registered shape, dtype and kind, by name, and which version they are.

    Raises:
        ConfigError: nothing is registered.
        WaitTimeout: no boundary was found in time; the text says whom it waited for. A step that a worker pushes in several calls,
            this one's too, must be ended by `clock` first.
        ServerLost: a shard does not answer.
    """
    cache = Cache(worker._registered().layout)
    ticket = worker._loop.call(calls.CutCalled, cache.load)
    made: calls.CutMade = worker._loop.result(ticket, timeout)
    return dict(cache.views(worker._exchange.templates)), boundary(worker, made)


def boundary(worker: Worker, made: calls.CutMade) -> Boundary:
    """Of a cut that this worker has made."""
    core = worker._core
    mode = at(core.phases, made.clock).mode
    clock = {"sync": made.closed, "federated": made.round}.get(mode, made.clock)
    versions = sorted((index, *version) for index, version in made.versions.items())
    run = core.welcome.run if core.welcome else 0
    return Boundary(run, mode, clock, hashlib.sha256(repr(versions).encode()).hexdigest())
