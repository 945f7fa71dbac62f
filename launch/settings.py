"""Every setting, once: its name, how it is read, its default, its help. Flags, environment, `shoal.toml` and `LocalCluster`
share it.

Rules
- Precedence: argument or flag, then `SHOAL_…`, then `shoal.toml`, then the default.
- A wrong value is a `ConfigError` that says where the value came from.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..protocol.codecs import Codec, pull_codec, push_codec
from ..protocol.errors import ConfigError
from ..protocol.federated import Aggregate, ServerRule
from ..protocol.join import CLEAR, DEFAULT_PORT, SECAGG
from ..protocol.layout import BLOCK_BYTES, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES
from ..protocol.phases import MODES


class BadFlag(ConfigError):
    """A flag or an argument has a value that it cannot have."""


TOML = "shoal.toml"
LATER = {
    "replicas": "replicated shards",
}
"""Words of the contract that this version does not serve yet: they are refused, not ignored."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `read` takes what was typed or given and returns the value, or raises ValueError."""

    name: str
    read: Callable[[Any], Any]
    default: Any
    help: str
    metavar: str = ""
    flag: bool = False

    @property
    def env(self) -> str:
        return f"SHOAL_{self.name.upper()}"

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def whole(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(str(value))
        if not low <= number <= high:
            raise ValueError(f"must be from {low} to {high}")
        return number

    return read


def seconds(value: Any) -> float:
    """A duration: 15, 15s, 500ms, 2m, 1h."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h|)\s*", str(value))
    if not found:
        raise ValueError("must be a duration such as 15s, 500ms or 2m")
    number = float(found[1]) * {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}[found[2]]
    if not 0.1 <= number <= 86400:
        raise ValueError("must be from 100ms to 24h")
    return number


def size(value: Any) -> int:
    """A size in bytes: 4194304, 4MiB, 512KiB."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*(B|KiB|MiB|GiB|)\s*", str(value))
    if not found:
        raise ValueError("must be a size such as 4MiB or 512KiB")
    return int(float(found[1]) * {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])


def block_size(value: Any) -> int:
    number = size(value)
    if not MIN_BLOCK_BYTES <= number <= MAX_BLOCK_BYTES:
        raise ValueError("must be from 4KiB to 16MiB")
    return number


def staleness(value: Any) -> float:
    """A number of clocks, or inf."""
    number = float(value)
    if number != math.inf and (number < 0 or number != int(number)):
        raise ValueError("must be 0, a whole number of clocks, or inf")
    return number


def positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError("must be over 0 and finite")
    return number


def fraction(value: Any) -> float:
    number = float(value)
    if not 0 < number < 1:
        raise ValueError("must be between 0 and 1")
    return number


def share(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= 10:
        raise ValueError("must be from 0 to 10")
    return number


def not_negative(value: Any) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError("must be 0 or more, and finite")
    return number


def aggregate(value: Any) -> str:
    try:
        Aggregate.parse(str(value))
    except ConfigError as error:
        raise ValueError(f"must be an aggregate: {error.what}") from None
    return str(value)


def server_optimizer(value: Any) -> str:
    """A name, and numbers if they are not the usual ones: fedadam:lr=0.03,tau=0.01."""
    try:
        ServerRule.parse(str(value))
    except ConfigError as error:
        raise ValueError(f"must be a server optimizer: {error.what}") from None
    return str(value)


def modulus(value: Any) -> int:
    if str(value) not in ("16", "32"):
        raise ValueError("must be 16 or 32")
    return int(value)


def one_of(*allowed: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value in LATER:
            raise ValueError(f"{LATER[value]} are not part of this version")
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return str(value)

    return read


def truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
        "": False,
    }
    if str(value).lower() not in words:
        raise ValueError("must be true or false")
    return words[str(value).lower()]


def text(value: Any) -> str:
    return str(value)


ROUNDS = (
    Setting("rounds", whole(0, 2**31), 0, "Federated rounds to make; 0: as many as workers take part in.", "R"),
    Setting("round_timeout", seconds, 60.0, "A worker that trains for longer than this misses the round.", "TIME"),
    Setting(
        "protection",
        one_of(SECAGG, CLEAR),
        SECAGG,
        "Of federated rounds: secagg, where servers see sums alone, or clear, where they see every update.",
        f"{SECAGG}|{CLEAR}",
    ),
    Setting("cohort", whole(0, 4096), 0, "Workers that are drawn for each round; 0: all.", "N"),
    Setting(
        "over", share, 0.0, "So many more are asked, as a share of the cohort; the first of them are enough.", "SHARE"
    ),
    Setting("minimum", whole(0, 4096), 0, "Updates that a sum must be of; 0: as many as the protection needs.", "N"),
    Setting("threshold", whole(0, 4096), 0, "Workers who together open a sum; 0: two thirds of a round.", "T"),
    Setting(
        "server_optimizer",
        server_optimizer,
        "fedavg",
        "What is done with the average: fedavg, fedavgm, fedadagrad, fedadam or fedyogi, with numbers as fedadam:lr=0.03.",
        "NAME[:X=…,…]",
    ),
    Setting(
        "aggregate",
        aggregate,
        "mean",
        "What is made of the updates: mean; in the clear also median, trimmed:share=0.1, krum:faulty=1, multikrum:faulty=1,keep=3.",
        "NAME[:X=…,…]",
    ),
    Setting("prox", not_negative, 0.0, "FedProx: how much a local step is drawn back to the round's weights.", "MU"),
    Setting(
        "noise", not_negative, 0.0, "Differential privacy: noise in a sum, by the norm of an update; 0: none.", "Z"
    ),
    Setting("norm", positive, 1.0, "With noise: the L2 norm that every update is cut to.", "X"),
    Setting("epsilon", not_negative, 0.0, "With noise: rounds end before epsilon is over this; 0: any.", "E"),
    Setting("delta", fraction, 1e-5, "With noise: the delta of epsilon.", "D"),
    Setting("clip", positive, 1.0, "The largest change of one weight in one round; what is larger is cut off.", "X"),
    Setting("modulus", modulus, 32, "Bits that a masked weight travels in: 32, or 16 for half the bytes.", "32|16"),
)
"""Of federated rounds."""

TASKS = (
    Setting(
        "task_policy",
        one_of("best", "cheapest", "thompson", "assign"),
        "best",
        "Which version does a task: the best, the cheapest that is good enough, the best by draws, or several tasks at once.",
        "best|cheapest|thompson|assign",
    ),
    Setting(
        "task_patience", seconds, 10.0, "A task that nobody can do waits for so long for somebody who can.", "TIME"
    ),
    Setting("task_queue", whole(1, 10_000_000), 100_000, "Tasks that may wait; more are refused for a while.", "N"),
)
"""Of the dispatcher."""

CLUSTER = (
    Setting(
        "mode",
        one_of(*MODES),
        "async",
        "What the servers do with a push: apply it at once, average a step, or none but rounds of local training.",
        "|".join(MODES),
    ),
    Setting(
        "staleness",
        staleness,
        3.0,
        "How many clocks a worker may be ahead of the slowest: 0, a number, or inf.",
        "K|inf",
    ),
    Setting("lease", seconds, 15.0, "A worker that is silent for so long is declared dead.", "TIME"),
    Setting("min_workers", whole(1, 4096), 1, "The first clock begins when so many workers have joined.", "N"),
    Setting(
        "nonfinite",
        one_of("error", "skip"),
        "error",
        "On NaN or infinity in a gradient: raise, or leave the step out.",
        "error|skip",
    ),
    Setting("block_bytes", block_size, BLOCK_BYTES, "The largest block; 4KiB to 16MiB.", "SIZE"),
    *ROUNDS,
    *TASKS,
    Setting("state_dir", text, "", "Where keys, models and tasks are kept; by default ~/.local/state/shoal.", "DIR"),
)

SERVER = (
    Setting(
        "bind",
        text,
        "127.0.0.1",
        "The address to listen on. Anything but loopback uses keys, made on first use.",
        "HOST",
    ),
    Setting(
        "port",
        whole(0, 65535),
        DEFAULT_PORT,
        "The coordinator's port; shards take the next ones. 0: free ones.",
        "PORT",
    ),
    Setting(
        "advertise", text, "", "The address that others reach this machine by, if it is not the one bound.", "HOST"
    ),
    Setting("shards", whole(1, 1024), 1, "Shard processes on this machine.", "S"),
    Setting(
        "min_shards",
        whole(0, 4096),
        0,
        "Shards to wait for, those of other machines included; by default --shards.",
        "N",
    ),
    Setting(
        "identities",
        text,
        "",
        "A list of clients' public keys: federated rounds in which even the servers may lie.",
        "FILE",
    ),
    Setting("insecure", truth, False, "No keys, though the address is not loopback. Every status says so.", flag=True),
    *CLUSTER,
)

RUN = (
    Setting("workers", whole(1, 1024), 2, "Worker processes.", "WORKERS"),
    Setting("servers", whole(1, 1024), 1, "Shard processes.", "S"),
    Setting("report", text, "", "Write one JSON object about the run.", "FILE"),
    *CLUSTER,
)

ATTEMPT = Setting("worker_attempt", whole(0, 2**32 - 1), 0, "How often a supervisor has restarted this worker.", "N")
CODECS = (
    Setting("push_codec", push_codec, Codec(), "How gradients travel to servers of other machines.", "CODEC"),
    Setting("pull_codec", pull_codec, Codec(), "How weights travel from servers of other machines.", "CODEC"),
)
"""A worker's own: `raw`, `bf16`, `fp16`, `int8`, and for pushes `topk` or `topk:FRACTION`."""
JOIN = Setting("join", text, "", "The join string that `shoal server` printed.", "STRING")


def settle(settings: Iterable[Setting], given: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """The value of each setting.

    Args:
        given: by name; None or absent means not given.
        table: the table of `shoal.toml` that counts beside its top level.

    Raises:
        ConfigError: an unknown name, or a value that cannot be read.
    """
    settings = tuple(settings)
    _refuse_unknown(settings, given)
    file = _toml(table)
    values = {}
    for setting in settings:
        if given.get(setting.name) is not None:
            value, origin = given[setting.name], setting.option
        elif os.environ.get(setting.env, "") != "":
            value, origin = os.environ[setting.env], f"${setting.env}"
        elif setting.name in file:
            value, origin = file[setting.name], f"{TOML}: {setting.name}"
        else:
            values[setting.name] = setting.default
            continue
        try:
            values[setting.name] = setting.read(value)
        except (ValueError, TypeError) as error:
            kind = BadFlag if origin == setting.option else ConfigError
            raise kind(f"{origin} is {value!r}: {_reason(error)}") from None
    return values


def _reason(error: Exception) -> str:
    words = str(error)
    return words if words.startswith("must") or "version" in words else "not a value of the right kind"


def _refuse_unknown(settings: Iterable[Setting], given: Mapping[str, Any]) -> None:
    names = [setting.name for setting in settings]
    for name, value in given.items():
        if name in LATER and name not in names:
            if value in (None, 0):
                continue
            raise ConfigError(f"{name}={value!r}: {LATER[name]} are not part of this version")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ConfigError(f"there is no setting {name!r}", hint=near[0] if near else ", ".join(names))


def _toml(table: str) -> dict[str, Any]:
    path = Path(TOML)
    if not path.is_file():
        return {}
    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{TOML} cannot be read: {error}") from None
    known = {setting.name for setting in (*SERVER, *RUN, *CODECS, JOIN)}
    values: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            if name not in ("server", "run", "worker"):
                raise ConfigError(f"{TOML}: there is no table [{name}]", hint="[server], [run] or [worker]")
            for inner in value:
                _known(inner, known, f"[{name}] ")
            if name == table:
                values |= value
        else:
            _known(name, known, "")
            values.setdefault(name, value)
    return values


def _known(name: str, known: set[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, sorted(known), 1)
        raise ConfigError(f"{TOML}: there is no setting {where}{name}", hint=near[0] if near else "")
