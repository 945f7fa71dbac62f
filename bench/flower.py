"""Flower's part of `shoal bench federated`: its SecAgg+ between its own functions, and rounds of its gRPC server.

What runs
- `Sum`: `SecAggPlusWorkflow` with all clients as neighbours, and `secaggplus_mod` for each client, as they are shipped; what stands
  between them here is a list. Messages are serialised as Flower does it; that is not timed, and their bytes are counted.
- `rounds`: `start_server` and a process with `start_client` for each client, over loopback, with `FedAvg` and nothing to compute.

Rules
- Imported only where flwr is installed: it is no dependency of shoal's.
- `python -m shoal.bench.flower ADDRESS ELEMENTS` is a client.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np

from ..protocol.secure.noise import Array
from .rivals import free_port

NODE = 1
ATTEMPT = 60.0
"""Seconds until clients have come and gone."""


class Sum:
    """A secure sum of these updates, weighted.

    Attributes:
        clients: processor seconds of each, by number from 1. server: the server's. said, heard: bytes, by client.
    """

    def __init__(self, updates: list[Array], weights: list[int], clip: float) -> None:
        from flwr.common import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        logging.getLogger("flwr").setLevel(logging.ERROR)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = NODE, NODE, NODE
        self._updates, self._weights, self._clip = updates, weights, clip
        self._contexts = {i: Context(NODE, i, {}, RecordDict(), {}) for i in range(1, len(updates) + 1)}
        self._forget()

    def _forget(self) -> None:
        self.clients: dict[int, float] = dict.fromkeys(self._contexts, 0.0)
        self.server = self._inside = 0.0
        self.said: Counter[int] = Counter()
        self.heard: Counter[int] = Counter()

    def run(self) -> Array:
        """One round; returns the average."""
        from flwr.common import ConfigRecord, Context, RecordDict, ndarrays_to_parameters, parameters_to_ndarrays
        from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
        from flwr.server import LegacyContext
        from flwr.server.workflow import SecAggPlusWorkflow
        from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

        self._forget()
        strategy = self._strategy()
        context = LegacyContext(Context(NODE, 0, {}, RecordDict(), {}), strategy=strategy)
        context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
        zeros = ndarrays_to_parameters([np.zeros_like(self._updates[0])])
        context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(zeros, True)
        workflow = SecAggPlusWorkflow(1.0, 0.6, max_weight=float(max(self._weights)), clipping_range=self._clip)
        started = time.perf_counter()
        workflow(self, context)
        self.server = time.perf_counter() - started - self._inside
        average: Array = parameters_to_ndarrays(strategy.result)[0]
        return average

    def _strategy(self) -> Any:
        from flwr.common import FitIns
        from flwr.server.strategy import FedAvg

        clients = list(self._contexts)

        class Keeps(FedAvg):  # type: ignore[misc]
            result: Any = None

            def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
                return [(_Proxy(number), FitIns(parameters, {})) for number in clients]

            def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
                self.result = results[0][1].parameters
                return None, {}

        return Keeps()

    def send_and_receive(self, messages: list[Any], *, timeout: float | None = None) -> list[Any]:
        """What the workflow takes for its network."""
        started = time.perf_counter()
        answers = [self._ask(message.metadata.dst_node_id, message) for message in messages]
        self._inside += time.perf_counter() - started
        return answers

    def _ask(self, number: int, message: Any) -> Any:
        from flwr.client.mod import secaggplus_mod
        from flwr.common import Message
        from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

        wire = recorddict_to_proto(message.content)
        self.heard[number] += wire.ByteSize()
        about = message.metadata
        asked = Message(
            recorddict_from_proto(wire), dst_node_id=number, message_type=about.message_type, group_id=about.group_id
        )
        trained = 0.0

        def app(asked: Any, _: Any) -> Any:
            nonlocal trained
            started = time.perf_counter()
            answer = self._fitted(number, asked)
            trained = time.perf_counter() - started
            return answer

        started = time.perf_counter()
        answer = secaggplus_mod(asked, self._contexts[number], app)
        self.clients[number] += time.perf_counter() - started - trained
        wire = recorddict_to_proto(answer.content)
        self.said[number] += wire.ByteSize()
        return _Answer(number, recorddict_from_proto(wire))

    def _fitted(self, number: int, asked: Any) -> Any:
        from flwr.common import Code, FitRes, Message, Status, ndarrays_to_parameters
        from flwr.compat.common.recorddict_compat import fitres_to_recorddict

        parameters = ndarrays_to_parameters([self._updates[number - 1]])
        found = FitRes(Status(Code.OK, ""), parameters, self._weights[number - 1], {})
        return Message(fitres_to_recorddict(found, True), reply_to=asked)


class _Proxy:
    def __init__(self, number: int) -> None:
        self.node_id = number


class _Answer:
    """What the workflow looks at of a message."""

    def __init__(self, number: int, content: Any) -> None:
        self.content, self.metadata = content, self
        self.src_node_id = number

    def has_error(self) -> bool:
        return False


def rounds(clients: int, elements: int, count: int) -> list[float]:
    """Seconds from the end of a round to the end of the next, of so many rounds."""
    import flwr

    stamps: list[float] = []

    class Stamps(flwr.server.strategy.FedAvg):  # type: ignore[misc]
        def aggregate_fit(self, *given: Any) -> Any:
            found = super().aggregate_fit(*given)
            stamps.append(time.perf_counter())
            return found

    logging.getLogger("flwr").setLevel(logging.ERROR)
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "shoal.bench.flower", address, str(elements)]
    children = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(clients)]
    try:
        strategy = Stamps(min_fit_clients=clients, min_available_clients=clients, fraction_evaluate=0.0)
        config = flwr.server.ServerConfig(num_rounds=count + 1, round_timeout=ATTEMPT)
        flwr.server.start_server(server_address=address, config=config, strategy=strategy)
    finally:
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(ATTEMPT)
            child.kill()
            child.wait()
    return [after - before for before, after in pairwise(stamps)]


def main() -> None:
    """A client: it adds a hundredth to what it is given."""
    import flwr

    class Adds(flwr.client.NumPyClient):  # type: ignore[misc]
        def get_parameters(self, config: Any) -> list[Array]:
            return [np.zeros(int(sys.argv[2]), np.float32)]

        def fit(self, parameters: list[Array], config: Any) -> tuple[list[Array], int, dict[str, Any]]:
            return [parameters[0] + np.float32(0.01)], 1, {}

    flwr.client.start_client(server_address=sys.argv[1], client=Adds().to_client())


if __name__ == "__main__":
    main()
