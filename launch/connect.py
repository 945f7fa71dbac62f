"""`shoal.connect`: find the server, join it (DESIGN §8).

Rules
- Looked at in this order: the argument, `$SHOAL_JOIN`, `shoal.toml`, else a server of this process's own.
- A process that is one of several never gets a server of its own: that would be several models, silently.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal, overload

from ..protocol.errors import ConfigError, NoServerError
from ..protocol.join import read_join
from ..protocol.secure.plan import Policy
from ..worker.client import WAIT_TIMEOUT, Worker
from ..worker.taskclient import Client
from ..worker.versions import CONNECT_TIMEOUT
from .settings import ATTEMPT, CODECS, JOIN, settle

logger = logging.getLogger("shoal")

ROLES = ("worker", "client")
_WORLDS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@overload
def connect(
    join: str | None = None,
    *,
    name: str = "",
    timeout: float = CONNECT_TIMEOUT,
    wait_timeout: float = WAIT_TIMEOUT,
    push_codec: str | None = None,
    pull_codec: str | None = None,
    require: str | Policy | None = None,
    identity: str | None = None,
    identities: str | None = None,
    role: Literal["worker"] = "worker",
) -> Worker: ...


@overload
def connect(
    join: str | None = None,
    *,
    timeout: float = CONNECT_TIMEOUT,
    wait_timeout: float = WAIT_TIMEOUT,
    role: Literal["client"],
) -> Client: ...


def connect(
    join: str | None = None,
    *,
    name: str = "",
    timeout: float = CONNECT_TIMEOUT,
    wait_timeout: float = WAIT_TIMEOUT,
    push_codec: str | None = None,
    pull_codec: str | None = None,
    require: str | Policy | None = None,
    identity: str | None = None,
    identities: str | None = None,
    role: str = "worker",
) -> Worker | Client:
    """Join a cluster as a worker, or as a client of its models.

    Args:
        join: the join string that `shoal server` printed, or HOST:PORT of a server without keys; by default `$SHOAL_JOIN`; without
            that, a server is started for this process alone, and ends with it.
        name: of this worker; by default made from host and process.
        timeout: seconds to find the servers in.
        wait_timeout: seconds after which any later call that waits ends in `WaitTimeout`, unless it says otherwise.
        push_codec: how float32 gradients travel to servers of other machines: `raw`, `bf16`, `fp16`, `int8`, or `topk`, which
            sends the largest hundredth of each block and keeps the rest for later (`topk:0.05`: so much of it); by default
            `$SHOAL_PUSH_CODEC`, else `raw`.
        pull_codec: how weights travel back: the same but for `topk`; by default `$SHOAL_PULL_CODEC`, else `raw`.
        require: what is demanded of federated rounds: `secagg` (the servers see sums alone), `clear`, or a `shoal.Policy`; by
            default `$SHOAL_REQUIRE`, else what the join string says, which is `secagg` unless it ends in `:clear`.

        identity, identities: the files with what this worker signs with in federated rounds, and with everybody's public keys
            (`shoal keys identity`); by default `$SHOAL_IDENTITY` and `$SHOAL_IDENTITIES`, else none. With them, servers that lie
            learn no more than servers that do not.

        role: `worker`, or `client` for a `shoal.Client`, which has tasks done; of the others it takes `join` and the times.

    Raises:
        NoServerError: no server answers in time. AuthError: the keys do not fit. VersionError: the server is another shoal.
        ConfigError: the join string is wrong, there is no such codec, or another live worker has this name.
    """
    check_platform()
    if role not in ROLES:
        raise ConfigError(f"role is {role!r}", hint=f"one of {', '.join(ROLES)}")
    found = join or settle([JOIN], {}, "worker")["join"]
    if role == "client":
        if not found:
            raise NoServerError(
                "no server is named; looked at the argument of connect, $SHOAL_JOIN and shoal.toml",
                hint="start `shoal server`, and set SHOAL_JOIN to what it prints",
            )
        return Client(read_join(found), timeout=timeout, wait_timeout=wait_timeout)
    name = name or os.environ.get("SHOAL_WORKER_NAME", "")
    attempt = settle([ATTEMPT], {})["worker_attempt"]
    options: dict[str, Any] = {
        "name": name,
        "timeout": timeout,
        "wait_timeout": wait_timeout,
        "transport": os.environ.get("SHOAL_TRANSPORT", "") or "auto",
        "require": require or os.environ.get("SHOAL_REQUIRE") or None,
        **settle(CODECS, {"push_codec": push_codec, "pull_codec": pull_codec}, "worker"),
    }
    files = identity or os.environ.get("SHOAL_IDENTITY"), identities or os.environ.get("SHOAL_IDENTITIES")
    if any(files):
        options |= _identities(name, *files)
    if found:
        return Worker(read_join(found), attempt=attempt, **options)
    world = next((variable for variable in _WORLDS if os.environ.get(variable, "1") not in ("", "1")), None)
    if world:
        raise NoServerError(
            f"no server is named, and this process is one of several (${world} is {os.environ[world]}); looked at the argument of "
            "connect, $SHOAL_JOIN and shoal.toml",
            hint="start `shoal server` once and set SHOAL_JOIN for every process",
        )
    from .cluster import LocalCluster

    logger.info("no server is named: starting one for this process alone")
    cluster = LocalCluster(min_workers=1)
    try:
        worker = Worker(read_join(cluster.join), **options)
    except BaseException:
        cluster.close()
        raise
    worker._on_exit = cluster.close
    return worker


def _identities(name: str, identity: str | None, identities: str | None) -> dict[str, Any]:
    if not identity or not identities:
        raise ConfigError(
            "identity and identities belong together: what this worker signs with, and the list of all",
            hint="$SHOAL_IDENTITY and $SHOAL_IDENTITIES; shoal keys identity FILE",
        )
    from .identities import load_list, own

    listed = load_list(identities)
    return {"identity": own(name, identity, listed), "identities": listed}


def check_platform() -> None:
    """Linux and macOS, and nothing else.

    Raises:
        ConfigError: this is something else.
    """
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError(f"shoal runs on Linux and macOS, not on {sys.platform}", hint="WSL 2 on Windows")
