"""Every error that shoal raises, in one tree. Whose fault it is decides the type.

Rules
- A user's mistake is a `ConfigError`, `ShapeError` or `NonFiniteError`, raised in the caller before anything is sent.
- A peer can make us raise `ProtocolError` and nothing else; loops count it, users never see it.
- The text says what happened, then where, the likely cause, and what to type next.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of everything below.

    Args:
        what: one clause, what happened, with names and numbers.
        cause: the likely cause, if one can be named.
        hint: what to do or type next.
    """

    def __init__(self, what: str, *, cause: str = "", hint: str = "") -> None:
        self.what, self.cause, self.hint = what, cause, hint
        text = what
        if cause:
            text += f" (likely: {cause})"
        if hint:
            text += f". Try: {hint}"
        super().__init__(text)


class ConfigError(ShoalError):
    """A setting, an argument or the order of calls is wrong."""


class NoServerError(ShoalError):
    """No server could be found or reached."""


class AuthError(ShoalError):
    """A server was reached, and the keys do not fit."""


class VersionError(ShoalError):
    """The other side speaks another version of the protocol."""


class ServerLost(ShoalError):
    """A server that this worker was using stopped answering.

    Attributes:
        address: `host:port` of the server.
        age: seconds since it was last heard.
    """

    def __init__(self, what: str, *, address: str = "", age: float = 0.0, cause: str = "", hint: str = "") -> None:
        super().__init__(what, cause=cause, hint=hint)
        self.address, self.age = address, age


class WorkerEvicted(ShoalError):
    """This worker was declared dead; what it had not had acknowledged is lost. It joins again by itself."""


class ShapeError(ShoalError):
    """A name, shape or dtype does not fit what was registered."""


class NonFiniteError(ShoalError, ValueError):
    """A gradient holds NaN or infinity."""


class RoundClosed(ShoalError):
    """A federated round no longer takes submissions."""


class ProtectionError(ShoalError):
    """The server offers less protection than this worker demands."""


class VaultError(ShoalError):
    """What an owner keeps encrypted cannot be read: its key is another or gone, or it was changed, cut or torn on disk."""


class WaitTimeout(ShoalError, TimeoutError):
    """A wait ended at its time-out; the servers were alive."""


class TaskFailed(ShoalError):
    """A task has no answer: no model qualifies, its model failed on it, or its deadline has passed."""


class QueueFull(ShoalError):
    """No more tasks are taken for now.

    Attributes:
        retry_after: seconds in which there may be room.
    """

    def __init__(self, what: str, *, retry_after: float = 0.0, cause: str = "", hint: str = "") -> None:
        super().__init__(what, cause=cause, hint=hint)
        self.retry_after = retry_after


class ProtocolError(ShoalError):
    """A peer sent what no encoder of ours would write.

    Attributes:
        reason: the counter it goes to (SPEC §2.2).
    """

    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.reason = reason
