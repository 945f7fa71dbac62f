"""The servers of one machine: a coordinator and shards, or shards that join another machine's coordinator.

Rules
- Loopback needs no keys; anything else has them, or the operator said `--insecure`.
- What was started is ended, whatever fails on the way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from ..protocol.errors import ConfigError
from ..protocol.federated import Aggregate
from ..protocol.join import CLEAR, DEFAULT_PORT, JoinAddress, is_name, key_text, read_join
from . import keys
from .children import ServerProcess
from .dispatching import Dispatching
from .identities import load_list
from .models import FOLDER
from .settings import ROUNDS


class Servers:
    """Starts the processes; a context manager.

    Args:
        settings: the settled `SERVER` settings.
        join: the join string of another machine's coordinator; empty to start one here.
        log: takes each line that a server process logs.

    Raises:
        ConfigError: an address or a port that cannot be had, keys that cannot be kept. NoServerError: a process did not start.
    """

    def __init__(
        self, settings: dict[str, Any], join: str = "", log: Callable[[str], None] = lambda line: None
    ) -> None:
        self._settings, self._log = settings, log
        self.coordinator: ServerProcess | None = None
        self.shards: list[ServerProcess] = []
        self.dispatcher: Dispatching | None = None
        bind = settings["bind"]
        self._check_bind(bind)
        self._check_rounds()
        local = is_loopback(bind)
        self.insecure = bool(settings["insecure"]) and not local
        self._keys = None if local or self.insecure else keys.load_or_make(keys.state_dir(settings["state_dir"]))
        self._advertise = settings["advertise"] or advertised(bind)
        if not is_name(self._advertise) or any(c.isspace() for c in self._advertise):
            raise ConfigError(f"--advertise {self._advertise!r} is not a host")
        try:
            if join:
                self.address = read_join(join)
                self._check_join(self.address)
            else:
                self.address = self._start_coordinator()
            self._start_shards()
        except BaseException:
            self.close()
            raise

    @property
    def join(self) -> str:
        """The join string: a secret if it holds keys."""
        return str(self.address)

    @property
    def pids(self) -> dict[str, Any]:
        """Process ids by role."""
        return {
            "coordinator": self.coordinator.pid if self.coordinator else None,
            "shards": [shard.pid for shard in self.shards],
            "dispatcher": self.dispatcher.pid if self.dispatcher else None,
        }

    def died(self, name: str) -> None:
        """Tell the coordinator that the process of the worker of this name has ended."""
        if self.coordinator:
            self.coordinator.tell({"died": name})

    def endings(self) -> list[str]:
        """Which processes have ended by themselves, in words."""
        named = [("the coordinator", self.coordinator), *((f"shard process {s.pid}", s) for s in self.shards)]
        return [f"{name}: {process.ended()}" for name, process in named if process and process.ended()]

    def close(self) -> None:
        if self.dispatcher is not None:
            self.dispatcher.close()
            self.dispatcher = None
        for process in [*self.shards, *([self.coordinator] if self.coordinator else [])]:
            process.close()
        self.shards, self.coordinator = [], None

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- starting

    def _check_bind(self, bind: str) -> None:
        try:
            socket.getaddrinfo(bind, None)
        except (OSError, UnicodeError):
            raise ConfigError(
                f"--bind {bind}: the name does not resolve", hint="an address that `ip address` shows"
            ) from None

    def _check_rounds(self) -> None:
        if self._settings["noise"]:
            try:
                import dp_accounting  # noqa: F401 - the coordinator will need it
            except ImportError:
                raise ConfigError(
                    "--noise needs an accountant, and dp-accounting is not installed",
                    hint="pip install 'shoal[privacy]'",
                ) from None
        aggregate, protection = self._settings["aggregate"], self._settings["protection"]
        if Aggregate.parse(aggregate).name != "mean" and protection != CLEAR:
            raise ConfigError(
                f"--aggregate {aggregate} needs every update as it is, and with --protection {protection} there are only sums",
                hint=f"--protection {CLEAR}, or --aggregate mean",
            )
        if Aggregate.parse(aggregate).name != "mean" and self._settings["noise"]:
            raise ConfigError(
                f"--noise hides one client in a mean, and --aggregate {aggregate} may show far more of one",
                hint="--aggregate mean, or no --noise",
            )

    def _check_join(self, address: JoinAddress) -> None:
        if address.secret and not self._keys:
            raise ConfigError(
                f"--bind {self._settings['bind']}: shards that join another machine must listen where it can reach them",
                hint="--bind with this machine's address on that network",
            )
        if self._keys and not address.secret and not is_loopback(address.host):
            raise ConfigError(
                "the join string has no keys, and this server would demand them", hint="--insecure, if that is meant"
            )

    def _config(self, role: str, port: int, **more: Any) -> dict[str, Any]:
        config = {
            "role": role,
            "bind": self._settings["bind"],
            "port": port,
            "allowed": [],
            "advertise": self._advertise,
        }
        if self._keys:
            secret = self._keys.enrol_secret if role == "coordinator" else self.address.secret
            enrol = keys.public_of(secret)
            config |= {
                "public": key_text(self._keys.server_public),
                "secret": key_text(self._keys.server_secret),
                "allowed": [["enrol", key_text(enrol)]],
                "client_public": key_text(enrol),
                "client_secret": key_text(secret),
            }
        return config | more

    def _start_coordinator(self) -> JoinAddress:
        s = self._settings
        settings = {
            "mode": s["mode"],
            "staleness": s["staleness"],
            "nonfinite": s["nonfinite"],
            "lease": s["lease"],
            "min_workers": s["min_workers"],
            "min_shards": s["min_shards"] or s["shards"],
            "block_bytes": s["block_bytes"],
            "insecure": self.insecure,
            "recipe": {name: s[name] for name in (setting.name for setting in ROUNDS)},
        }
        listed = load_list(s["identities"]) if s["identities"] else {}
        peers = {name: key_text(key) for name, key in listed.items()}
        self.coordinator = ServerProcess(
            self._config("coordinator", s["port"], settings=settings, identities=peers), self._log
        )
        port = self.coordinator.ready()
        if self._keys:
            pair = self._keys.server_public, self._keys.enrol_secret
            return JoinAddress(self._advertise, port, *pair, protection=s["protection"])
        return JoinAddress(self._advertise, port, protection=s["protection"])

    def _start_shards(self) -> None:
        first = self._settings["port"]
        up = {
            "host": self.address.host,
            "port": self.address.port,
            "key": key_text(self.address.server_key) if self.address.server_key else "",
        }

        def start(port: int) -> ServerProcess:
            return ServerProcess(self._config("shard", port, coordinator=up, threads=1), self._log)

        if self.coordinator is not None:
            self.dispatcher = Dispatching(self._dispatcher_config(up), self._log)
        for index in range(self._settings["shards"]):
            self.shards.append(start(first + 1 + index if first else 0))
        for index, shard in enumerate(self.shards):
            try:
                shard.ready()
            except ConfigError:
                if first != DEFAULT_PORT:
                    raise
                shard.close()  # nobody asked for this very port
                self.shards[index] = start(0)
                self.shards[index].ready()
        if self.dispatcher is not None:
            self.dispatcher.ready()

    def _dispatcher_config(self, up: dict[str, Any]) -> dict[str, Any]:
        s = self._settings
        base = keys.state_dir(s["state_dir"])
        settings = {"policy": s["task_policy"], "most_tasks": s["task_queue"], "patience": s["task_patience"]}
        files = {"models": str(base / FOLDER), "book": str(base / "tasks.sqlite")}
        port = s["port"] + 1 + s["shards"] if s["port"] else 0
        return self._config("dispatcher", port, coordinator=up, settings=settings, **files)


def is_loopback(host: str) -> bool:
    """Does every address of this name stay on this machine?"""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address).split("%")[0]).is_loopback for address in found)


def advertised(bind: str) -> str:
    """The address to tell others: as bound, or for a wildcard the one that this machine reaches others from."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(bind)
        if not address.is_unspecified:
            return bind
        family, far = (socket.AF_INET6, "2001:db8::1") if address.version == 6 else (socket.AF_INET, "192.0.2.1")
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((far, 9))  # sends nothing: it only chooses a route
            return str(probe.getsockname()[0])
        return socket.gethostname()
    return bind
