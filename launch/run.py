"""`shoal run`: servers and workers on this machine, from start to report.

Rules
- A script that fails before the first clock ends the run; one that fails later is a lost worker, and the others go on.
- Ctrl-C ends everything in order, a second one at once. Nothing is left: no process, no port, no file.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import Any

from ..protocol.errors import ConfigError, ShoalError
from ..protocol.join import CLEAR, SECAGG
from ..protocol.secure.parameters import LEAST
from . import report
from .display import Display, closing_table
from .inquiry import Inquiry
from .servers import Servers
from .settings import CLUSTER, RUN, SERVER, settle
from .signals import Stopper
from .workers import WorkerProcess, check_script, stop

LOOK_EVERY = 0.5
FORGIVEN = (-signal.SIGKILL, -signal.SIGTERM)
"""How a machine that is taken away ends a worker; it is no fault of the script's."""


class Run:
    """One run. `code` is its exit code once `go` has returned.

    Args:
        given: the `RUN` settings that were typed.
    """

    def __init__(self, given: dict[str, Any], script: str, args: Sequence[str]) -> None:
        self._settings = settle(RUN, given, "run")
        self._script, self._args = script, args
        check_script(script)
        if self._settings["report"]:
            report.check_writable(self._settings["report"])
        self.workers: list[WorkerProcess] = []
        self._running: list[WorkerProcess] = []
        self._status: dict[str, Any] | None = None
        self._trouble = ""
        self._server_died = False

    def go(self) -> int:
        """From start to end. Returns the exit code."""
        s = self._settings
        server = {name: s[name] for name in (setting.name for setting in CLUSTER)}
        server |= {"shards": s["servers"], "port": 0, "bind": "127.0.0.1"}
        server |= {"advertise": "127.0.0.1", "min_shards": s["servers"], "insecure": False}
        if server["min_workers"] == 1:
            server["min_workers"] = s["workers"]
        if s["mode"] == "federated" and s["protection"] == SECAGG and s["workers"] < LEAST:
            raise ConfigError(
                f"{s['workers']} workers cannot make a round in which the servers learn a sum and nothing else",
                cause=f"of fewer than {LEAST} updates, each worker could tell the other's from the sum",
                hint=f"-n {LEAST}, or more; or --protection {CLEAR}, in which servers see every update",
            )
        with Stopper() as stopper, Display(f"shoal run {self._script}") as display:
            with Servers(settle(SERVER, server), log=lambda line: self._server_line(display, line)) as servers:
                if not stopper.signal:
                    self._start(servers, display)
                try:
                    with Inquiry(servers.address) as inquiry:
                        self._watch(stopper, display, servers, inquiry)
                        self._look(inquiry)
                finally:
                    stop(self._running, stopper.patient)
        return self._close(display, stopper)

    def _server_line(self, display: Display, line: str) -> None:
        if not line.startswith("info"):
            display.write(line, True)

    def _start(self, servers: Servers, display: Display) -> None:
        for number in range(self._settings["workers"]):
            worker = WorkerProcess(f"w{number}", self._script, self._args, servers.join, 0, display.write)
            self.workers.append(worker)
            self._running.append(worker)

    def _watch(self, stopper: Stopper, display: Display, servers: Servers, inquiry: Inquiry) -> None:
        """Until every worker has ended, or the run must."""
        look_at = time.monotonic()
        while self._running and not stopper.wait(0.05):
            for worker in [worker for worker in self._running if worker.code is not None]:
                self._ended(worker, display, servers, inquiry)
            if self._trouble:
                display.say(self._trouble, "red")
                return
            if not self._server_died and servers.endings():
                self._server_died = True
                display.say(f"{'; '.join(servers.endings())}. What it held is lost.", "red")
            if time.monotonic() >= look_at:
                self._look(inquiry)
                look_at = time.monotonic() + LOOK_EVERY
                if self._status:
                    display.show(self._status)
        if stopper.signal and self._running:
            display.say("stopping the workers (Ctrl-C again to kill them)")
            stop(self._running, stopper.patient)
            self._running.clear()

    def _look(self, inquiry: Inquiry) -> None:
        if self._server_died:
            return
        try:
            self._status = inquiry.ask("status", timeout=2.0)[0]
        except ShoalError:
            pass  # the coordinator has ended or is busy; the last status stands, and `endings` tells

    def _ended(self, worker: WorkerProcess, display: Display, servers: Servers, inquiry: Inquiry) -> None:
        worker.finish()
        self._running.remove(worker)
        self._look(inquiry)
        begun = self._status is None or not self._status["waiting_for"]
        joined = self._status is not None and any(w["name"] == worker.name for w in self._status["workers"])
        present = self._status is not None and any(w["state"] in ("live", "idle") for w in self._status["workers"])
        if worker.code:
            servers.died(worker.name)
            if not begun:
                self._trouble = f"worker {worker.name} failed before the first step ({worker.ended()})"
            else:
                others = "; the others go on" if self._running else ""
                display.say(f"worker {worker.name} is gone ({worker.ended()}){others}", "yellow")
        elif not begun and not joined and present and self._running:
            self._trouble = f"worker {worker.name} ended without joining, and the others wait for it"

    # --- the end

    def _close(self, display: Display, stopper: Stopper) -> int:
        code = stopper.code if stopper.signal else self.exit_code()
        if self._status:
            found = report.summarise(self._status)
            found["exit_code"] = code
            found["worker_exits"] = {worker.name: worker.code for worker in self.workers}
            closing_table(
                display.console,
                "stopped" if stopper.signal else "finished" if not code else "failed",
                report.rows(found),
            )
            if not found["steps"] and not code:
                display.say("no step was made: does the script call shoal.connect()?", "yellow")
            if self._settings["report"]:
                report.write(self._settings["report"], found)
                display.say(f"the report is in {self._settings['report']}")
        return code

    def exit_code(self) -> int:
        """0 if the work was done; else what the scripts said."""
        if self._server_died:
            return 69
        codes = [worker.code or 0 for worker in self.workers if not worker.stopped]
        failed = {code for code in codes if code and not (code in FORGIVEN and 0 in codes)}
        if not failed:
            return 1 if self._trouble else 0
        if len(failed) > 1:
            return 1
        code = failed.pop()
        return code if code > 0 else 128 - code
