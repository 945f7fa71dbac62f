"""shoal: an asynchronous parameter server with bounded staleness, over ZeroMQ.

Nothing heavy is imported before it is used: each name below is loaded from the file that defines it when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .launch.cluster import LocalCluster
    from .launch.connect import connect
    from .launch.improve import improve
    from .launch.models import registry
    from .protocol.errors import (
        AuthError,
        ConfigError,
        NonFiniteError,
        NoServerError,
        ProtectionError,
        QueueFull,
        RoundClosed,
        ServerLost,
        ShapeError,
        ShoalError,
        TaskFailed,
        VaultError,
        VersionError,
        WaitTimeout,
        WorkerEvicted,
    )
    from .protocol.rules import SGD, Adagrad, Adam, AdamW, Delta, FedBuff, RMSprop
    from .protocol.secure.plan import Policy
    from .protocol.stale import Compensate
    from .tasks.allot import Needs
    from .tasks.improve import Rule
    from .worker.client import Worker
    from .worker.split import split
    from .worker.taskclient import Answer, Client
    from .worker.vault import Vault

_HOMES = {
    "connect": "launch.connect",
    "LocalCluster": "launch.cluster",
    "Worker": "worker.client",
    **dict.fromkeys(("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Delta", "FedBuff"), "protocol.rules"),
    "Compensate": "protocol.stale",
    "registry": "launch.models",
    "Policy": "protocol.secure.plan",
    "split": "worker.split",
    **dict.fromkeys(("Client", "Answer"), "worker.taskclient"),
    "Needs": "tasks.allot",
    "Rule": "tasks.improve",
    "improve": "launch.improve",
    "Vault": "worker.vault",
    **dict.fromkeys(
        (
            "AuthError",
            "ConfigError",
            "NoServerError",
            "NonFiniteError",
            "ProtectionError",
            "QueueFull",
            "RoundClosed",
            "ServerLost",
            "ShapeError",
            "ShoalError",
            "TaskFailed",
            "VaultError",
            "VersionError",
            "WaitTimeout",
            "WorkerEvicted",
        ),
        "protocol.errors",
    ),
}

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Answer",
    "AuthError",
    "Client",
    "Compensate",
    "ConfigError",
    "Delta",
    "FedBuff",
    "LocalCluster",
    "Needs",
    "NoServerError",
    "NonFiniteError",
    "Policy",
    "ProtectionError",
    "QueueFull",
    "RMSprop",
    "RoundClosed",
    "Rule",
    "ServerLost",
    "ShapeError",
    "ShoalError",
    "TaskFailed",
    "Vault",
    "VaultError",
    "VersionError",
    "WaitTimeout",
    "Worker",
    "WorkerEvicted",
    "__version__",
    "connect",
    "improve",
    "registry",
    "split",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
