"""A server process: `python -m shoal.ps`. It is started by `shoal server`, `shoal run` and `LocalCluster`, never by hand.

Rules
- The first line of standard input is its configuration, as JSON: secrets are never in arguments. The end of standard input
  is the end of the process: no parent, no child.
- The first line of standard output says that it is ready, or why it is not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from ..protocol.errors import ShoalError
from ..protocol.join import key_text, read_key
from .loop import Core, Door, Listener, Loop

if TYPE_CHECKING:
    from ..tasks.dispatcher import Dispatcher


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    config = json.loads(_first_line())
    door = _door(config)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        listener = Listener(context, door)
    except ShoalError as error:
        _say({"error": error.what, "hint": error.hint})
        return 69
    wall = time.time() - time.monotonic()
    core: Core
    if config["role"] == "coordinator":
        from .coordinator import Coordinator
        from .recipe import recipe
        from .settings import Settings

        listed, given = config["identities"], dict(config["settings"])
        given["recipe"] = recipe(active=bool(listed), **given["recipe"])
        peers = {name: _key(key) for name, key in listed.items()} or None
        core, label = Coordinator(_random(), Settings(**given), wall, peers=peers), "coordinator"
    elif config["role"] == "dispatcher":
        try:
            core, label = _dispatcher(config, listener.port, wall), "dispatcher"
        except ShoalError as error:
            _say({"error": error.what, "hint": error.hint})
            return 69
    else:
        import torch

        from .shard import Shard
        from .uncompiled import compile_nothing

        compile_nothing()
        torch.set_num_threads(int(config["threads"]))
        key = key_text(door.public) if door.public else ""
        core, label = Shard(_random(), config["advertise"], listener.port, key, wall), "shard"
    loop = Loop(context, listener, core, label)
    if config["role"] != "coordinator":
        up = config["coordinator"]
        loop.join(up["host"], up["port"], _key(up["key"]), door)
    _say({"port": listener.port, "pid": os.getpid()})
    loop.run()
    loop.close()
    end = getattr(core, "end", None)
    if end is not None:
        end()
    context.term()
    return 0


def _dispatcher(config: dict[str, Any], port: int, wall: float) -> Dispatcher:
    from ..tasks.book import SqliteBook
    from ..tasks.dispatcher import Dispatcher, Settings
    from ..tasks.library import Shelf

    key = config.get("public", "")
    here = config["advertise"], port, key
    book, shelf = SqliteBook(Path(config["book"])), Shelf(Path(config["models"]))
    settings = Settings(**config["settings"])
    draw = random.SystemRandom().betavariate
    return Dispatcher(_random(), book, shelf, settings, here, wall, draw)


def _first_line() -> bytes:
    """Standard input up to the first newline, and not a byte more: the rest is the loop's."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            raise SystemExit(0)  # the parent is gone already
        line += byte
    return line


def _door(config: dict[str, Any]) -> Door:
    allowed = tuple((name, _key(key)) for name, key in config["allowed"])
    keys = {name: _key(config.get(name, "")) for name in ("public", "secret", "client_public", "client_secret")}
    return Door(config["bind"], config["port"], allowed=allowed, **keys)


def _key(text: str) -> bytes:
    return read_key(text, "key") if text else b""


def _random() -> int:
    return int.from_bytes(os.urandom(8), "big") | 1


def _say(words: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
