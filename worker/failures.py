"""What shards fail with, as the errors that callers see.

Rules
- Whose fault it is decides the type: a server that is silent or was restarted is `ServerLost`; a payload that does not fit is
  the caller's.
"""

from __future__ import annotations

from ..protocol.errors import NonFiniteError, ServerLost, ShapeError, ShoalError, WorkerEvicted


def lost_error(what: str, address: str, age: float) -> ServerLost:
    return ServerLost(
        f"{what} at {address} has not answered for {age:.1f} s",
        address=address,
        age=age,
        cause="its process has ended or its host cannot be reached",
        hint="shoal status, shoal doctor",
    )


def refusal(code: str, text: str) -> ShoalError:
    """A shard's refusal as the error that the caller sees."""
    if code == "nonfinite":
        return NonFiniteError(f"a push was refused: {text}")
    if code == "unfilled":
        return ServerLost(f"a push was refused: {text}", cause="a shard was restarted and has lost its state")
    return ShapeError(f"a push was refused ({code}): {text}")


def evicted_error() -> WorkerEvicted:
    """For what a life that has ended had not had acknowledged."""
    return WorkerEvicted(
        "this worker was declared dead and joins again; this update is lost",
        cause="it was stopped, or cut off, for longer than its lease",
    )
