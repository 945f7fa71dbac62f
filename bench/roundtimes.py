"""Whole federated rounds on a real cluster: a process for each server and worker, over loopback, with nothing to compute.

`python -m shoal.bench.roundtimes NUMBER ELEMENTS` is a worker; the cluster is SHOAL_JOIN. It prints its seconds as JSON.

Rules
- A round's seconds are those from the end of one to the end of the next, as the first worker sees it.
- The first rounds are a warm-up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise

from ..launch.cluster import LocalCluster
from ..protocol.errors import ShoalError

WARM_UP = 5
PATIENCE = 300.0
"""Seconds that a worker may take for all of its rounds."""


def rounds(protection: str, clients: int, elements: int, count: int) -> list[float]:
    """Seconds of each of so many rounds.

    Raises:
        ShoalError: a worker has failed.
    """
    with LocalCluster(
        mode="federated", protection=protection, rounds=count + WARM_UP, min_workers=clients, shards=1
    ) as cluster:
        environment = {**os.environ, "SHOAL_JOIN": cluster.join, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "shoal.bench.roundtimes"]
        workers = [
            subprocess.Popen([*command, str(number), str(elements)], stdout=subprocess.PIPE, env=environment)
            for number in range(clients)
        ]
        try:
            said = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(worker.returncode for worker in workers):
        raise ShoalError("a worker of the benchmark has failed", hint="its messages are above")
    found: list[float] = json.loads(said[0])
    return found[WARM_UP:]


def main() -> None:
    """A worker: it adds a little, and takes part until there are no more rounds."""
    import numpy as np

    from ..launch.connect import connect

    number, elements = int(sys.argv[1]), int(sys.argv[2])
    weights, stamps = {"w": np.zeros(elements, np.float32)}, [time.perf_counter()]
    with connect(name=f"w{number}") as worker:
        for turn in worker.rounds(weights, examples=1 + number):
            weights["w"] += np.float32(0.001)
            turn.submit()
            stamps.append(time.perf_counter())
    print(json.dumps([after - before for before, after in pairwise(stamps)]))


if __name__ == "__main__":
    main()
