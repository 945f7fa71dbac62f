"""`shoal server`: servers until they are stopped, and what to type next."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .servers import Servers, is_loopback
from .settings import SERVER, BadFlag, settle
from .signals import Stopper

WARN_INSECURE_EVERY = 600.0


def serve(given: dict[str, Any], join: str, join_file: str) -> int:
    """Start, print, wait for a signal, end. Returns the exit code.

    Args:
        given: the `SERVER` settings that were typed.
        join: the join string of another machine's server, to add shards to it.
        join_file: where to write the join string, whole, once the server is ready.
    """
    settings = settle(SERVER, given, "server")
    console = Console(stderr=True, highlight=False)

    def log(line: str) -> None:
        console.print(Text(line, style="" if line.startswith("info") else "yellow"), soft_wrap=True)

    with Stopper() as stopper, Servers(settings, join, log) as servers:
        written = write_join(join_file, servers.join) if join_file else None
        try:
            announce(console, settings, servers, joined=bool(join))
            told: list[str] = []
            quiet = 0.0
            while not stopper.wait(0.2):
                for ending in servers.endings():
                    if ending not in told:
                        told.append(ending)
                        log(f"error {ending}; its state is lost, workers that need it will say so")
                quiet += 0.2
                if servers.insecure and quiet >= WARN_INSECURE_EVERY:
                    quiet = 0.0
                    log(
                        "warning this server runs without keys (--insecure): whoever reaches its port can read and change the model"
                    )
                if told and len(told) == len(servers.shards) + bool(servers.coordinator):
                    log("error every server process has ended")
                    return 69
            console.print("shoal: stopping")
            return 69 if told else 0
        finally:
            if written:
                written.unlink(missing_ok=True)


def announce(console: Console, settings: dict[str, Any], servers: Servers, joined: bool) -> None:
    """What runs where, and the exact next commands."""
    bound = f" staleness={settings['staleness']:g}" if settings["mode"] == "async" else ""
    bound += f" protection={settings['protection']}" if settings["mode"] == "federated" else ""
    security = "INSECURE" if servers.insecure else ("loopback only" if is_loopback(settings["bind"]) else "keys")

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    if joined:
        say(f"shoal: {len(servers.shards)} shards have joined the server at {servers.address.address}")
        return
    say(
        f"shoal: server ready at {servers.address.address}  mode={settings['mode']}{bound}  shards={len(servers.shards)}  "
        f"security={security}"
    )
    secret = "   (holds a secret: treat it like a password)" if servers.address.secret else ""
    say(f"  workers      SHOAL_JOIN='{servers.join}' python train.py{secret}")
    say(f"  more shards  shoal server --join '{servers.join}'" + (" --bind ADDRESS" if servers.address.secret else ""))
    say(f"  status       SHOAL_JOIN='{servers.join}' shoal status")
    if servers.insecure:
        console.print(
            Text("  warning      no keys: whoever reaches this port can read and change the model", style="bold red")
        )


def write_join(path: str, join: str) -> Path:
    """Write the join string whole, readable by its owner alone."""
    target = Path(path)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(join + "\n")
        fresh.replace(target)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise BadFlag(f"--join-file is {path!r}: {error.strerror}") from None
    return target
