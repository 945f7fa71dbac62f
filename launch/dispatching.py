"""The dispatcher's process: started beside the coordinator, and again when it dies (SPEC §16).

Rules
- A cluster trains without it: what keeps it from starting is logged, and told to whoever wants tasks done.
- It is started again at once, and then ever later: who dies at every start shall not keep the machine busy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..protocol.errors import ShoalError
from .children import ServerProcess

MOST_PAUSE = 30.0
STEADY = 60.0
"""Seconds after which a process that has ended had begun well."""


class Dispatching:
    """Starts the process; ends it with `close`.

    Args:
        config: as `shoal.ps.__main__` reads it. log: takes each line that the process logs.
    """

    def __init__(self, config: dict[str, Any], log: Callable[[str], None]) -> None:
        self._config, self._log = config, log
        self._process: ServerProcess | None = ServerProcess(config, log)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ready(self) -> None:
        """Wait until it listens, and watch it from now on."""
        if self._begun():
            self._thread = threading.Thread(target=self._watch, name="shoal dispatcher", daemon=True)
            self._thread.start()

    def _begun(self) -> bool:
        assert self._process is not None
        try:
            self._process.ready()
        except ShoalError as error:
            if self._config["port"] and "in use" in error.what:  # nobody asked for this very port
                self._process.close()
                self._config["port"] = 0
                self._process = ServerProcess(self._config, self._log)
                return self._begun()
            self._log(f"warning tasks are not dispatched here: {error}")
            self._process.close()
            self._process = None
            return False
        return True

    def _watch(self) -> None:
        pause = 0.0
        while self._process is not None:
            began = time.monotonic()
            how = self._process.wait()
            if self._closing.is_set():
                return
            pause = 0.0 if time.monotonic() - began > STEADY else min(MOST_PAUSE, 2 * pause + 0.5)
            self._log(f"warning the dispatcher has ended ({how}); its queue is kept, and it is started again")
            self._process.close()
            if self._closing.wait(pause if pause > 0.5 else 0.0):
                return
            self._process = ServerProcess(self._config, self._log)
            if not self._begun():
                return

    def close(self) -> None:
        self._closing.set()
        if self._process is not None:
            self._process.close()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
            if self._process is not None:
                self._process.close()
