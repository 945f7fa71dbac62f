"""`shoal worker`: one worker process, started again when it fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from ..protocol.join import read_join
from .display import Display
from .signals import Stopper
from .workers import WorkerProcess, check_script, stop

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0


def supervise(join: str, script: str, args: Sequence[str], name: str, restarts: int) -> int:
    """Run the script until it succeeds, or has failed `restarts + 1` times, or a signal comes. Returns the exit code."""
    check_script(script)
    read_join(join)
    name = name or f"{socket.gethostname()}-{os.getpid()}"
    pause, attempt = FIRST_PAUSE, 0
    with Stopper() as stopper, Display("shoal worker", live=False) as display:
        while True:
            worker = WorkerProcess(name, script, args, join, attempt, display.write)
            while worker.code is None and not stopper.wait(0.1):
                pass
            if worker.code is None or stopper.signal:
                stop([worker], stopper.patient)
                return stopper.code
            worker.finish()
            code = worker.code
            if code == 0:
                return 0
            attempt += 1
            if attempt > restarts:
                display.say(f"worker {name} has failed {attempt} times ({worker.ended()}): giving up", "red")
                return code if code > 0 else 128 - code
            display.say(f"worker {name} failed ({worker.ended()}); starting it again in {pause:g} s", "yellow")
            if stopper.wait(pause):
                return stopper.code
            pause = min(2 * pause, LONGEST_PAUSE)
