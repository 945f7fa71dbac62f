"""A worker that serves models: `worker.serve({"name": predict})` (DESIGN §8).

Rules
- One thread runs the models; the loop's own drives while it does, so that the lease is kept however long a task takes.
- A version is loaded whole before anything is answered with it, beside the one that answers meanwhile.
- Tasks that came together are run together where their inputs can be joined, and apart where they cannot, or where that fails.
- What a model raises is its task's failure, with the error's text; the executor goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..protocol.errors import ConfigError, ProtocolError, ShapeError, ShoalError, WaitTimeout
from ..protocol.join import JoinAddress, key_text
from ..protocol.records import Place
from ..protocol.schema import Buffer
from ..tasks.card import Card, is_label
from ..tasks.values import Value, alike, cut, join, pack, rows, unpack
from .executor import Ended, Executor, Finished, Gone, Job, NextCalled, OpenCalled, Ready, StopCalled, Unable, Version
from .loop import Loop

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("shoal")

Predict = Callable[[dict[str, "torch.Tensor"], Any], Any]
"""`predict(weights, inputs) -> outputs`, a row of outputs for each row of inputs."""
MOST_OUTPUT = 16 * 1024 * 1024


class Serving:
    """A handle on an executor; a context manager. Made by `Worker.serve`."""

    def __init__(
        self,
        address: JoinAddress,
        name: str,
        incarnation: int,
        models: Mapping[str, Predict],
        data: Collection[str] | None,
        price: float,
        memory: float,
        together: bool,
        timeout: float,
    ) -> None:
        for model, predict in models.items():
            if not is_label(model) or not callable(predict):
                raise ConfigError(f"serve takes functions by the name of a model, not {model!r:.80}: {predict!r:.80}")
        if not models:
            raise ConfigError("serve was given no model")
        if not all(map(is_label, data or ())):
            raise ConfigError("data are labels: printable names of up to 200 characters")
        key = key_text(address.server_key) if address.server_key else ""
        place = Place(0, 0, address.host, address.port, key)
        self._core = Executor(place, incarnation, name, tuple(models), data, float(price), memory)
        self._loop = Loop(self._core, address.secret, inf)
        self._models, self._together = dict(models), together
        self._held: dict[str, tuple[Card, dict[str, torch.Tensor]]] = {}
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal serving", daemon=True)
        try:
            self._loop.result(self._loop.call(OpenCalled), timeout)
        except BaseException:
            self._loop.close()
            raise
        self._thread.start()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The versions that are answered with, as `name number`."""
        held = dict(self._held)
        return tuple(str(held[identity][0]) for identity in self._core.loaded if identity in held)

    def wait(self, timeout: float | None = None) -> None:
        """Until it is stopped; Ctrl-C works.

        Raises:
            WaitTimeout: it still serves. What has ended it, if that was an error.
        """
        deadline = inf if timeout is None else time.monotonic() + timeout
        while not self._over.wait(min(0.2, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise WaitTimeout(f"it still serves after {timeout:g} s")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Serve no more. What is at work here and not done goes to others. Again changes nothing."""
        if not self._loop.closed:
            try:
                if self._loop.usable:
                    self._loop.result(self._loop.call(StopCalled), 5.0)
            except ShoalError:
                pass  # nobody is there to be told
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=10.0)
            self._loop.close()
        self._over.set()

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- the thread

    def _run(self) -> None:
        try:
            while True:
                ticket = self._loop.call(NextCalled)
                thing = ticket.result(inf)
                match thing:
                    case Version(card, data):
                        self._load(card, data)
                    case Gone(identity):
                        self._held.pop(identity, None)
                    case Job():
                        self._work(thing)
        except Ended:
            pass
        except ShoalError as error:
            if not self._loop.closed:
                self._error = error
                logger.error("an executor has ended: %s", error)
        finally:
            self._over.set()

    def _load(self, card: Card, data: bytes) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            weights = load(data)
        except SafetensorError as error:
            self._loop.tell(Unable(card.identity, f"its weights cannot be read: {error}"))
            return
        except MemoryError:
            self._loop.tell(Unable(card.identity, "there is too little memory"))
            return
        self._held[card.identity] = card, weights
        self._loop.tell(Ready(card.identity))

    def _work(self, job: Job) -> None:
        card, weights = self._held[job.identity]
        started = time.perf_counter()
        outcomes = answer(self._models[card.name], weights, job.payloads, self._together)
        seconds = time.perf_counter() - started
        errors = tuple(error for error, _ in outcomes)
        self._loop.tell(Finished(job.batch, seconds, errors, tuple(output for _, output in outcomes)))


def answer(
    predict: Predict, weights: dict[str, torch.Tensor], payloads: Sequence[Buffer], together: bool = True
) -> list[tuple[str, bytes]]:
    """Run tasks. Of each an error or an output."""
    values: list[Value] = []
    outcomes: list[tuple[str, bytes]] = [("", b"")] * len(payloads)
    for number, payload in enumerate(payloads):
        try:
            values.append(unpack(payload))
        except ProtocolError as error:
            values.append(None)
            outcomes[number] = (f"its inputs cannot be read: {error.what}", b"")
    able = [number for number, (error, _) in enumerate(outcomes) if not error]
    joined = _joined(predict, weights, [values[number] for number in able]) if together and len(able) > 1 else None
    for place, number in enumerate(able):
        outcomes[number] = _packed(joined[place]) if joined is not None else _alone(predict, weights, values[number])
    return outcomes


def _joined(predict: Predict, weights: dict[str, torch.Tensor], values: list[Value]) -> list[Value] | None:
    """All at once; None where that cannot be, or fails: then each is run by itself, so that one does not spoil the others."""
    counts = [rows(value) for value in values]
    if None in counts or not all(alike(values[0], value) for value in values[1:]):
        return None
    try:
        outputs = _plain(predict(weights, join(values)))
    except Exception:  # the user's function: whose task it was shows when each is run
        return None
    if rows(outputs) != sum(count or 0 for count in counts):
        return None
    found, at = [], 0
    for count in counts:
        found.append(cut(outputs, at, at + (count or 0)))
        at += count or 0
    return found


def _alone(predict: Predict, weights: dict[str, torch.Tensor], value: Value) -> tuple[str, bytes]:
    try:
        return _packed(_plain(predict(weights, value)))
    except Exception as error:  # the user's function
        return f"{type(error).__name__}: {error}"[:2000] or type(error).__name__, b""


def _plain(outputs: Value) -> Value:
    """A tuple is a list on the wire."""
    return list(outputs) if isinstance(outputs, tuple) else outputs


def _packed(output: Value) -> tuple[str, bytes]:
    try:
        packed = pack(output)
    except ShapeError as error:
        return f"its output cannot be sent: {error.what}", b""
    if len(packed) > MOST_OUTPUT:
        return f"its output has {len(packed):,} bytes, and {MOST_OUTPUT:,} are the most", b""
    return "", packed
