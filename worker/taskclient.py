"""Who has tasks done: `shoal.connect(role="client")` gives a `Client` (DESIGN §8).

Rules
- Every call that can wait has a time-out; a client can be used from several threads.
- What is wrong with the arguments is raised in the caller, before anything is sent.
- Versions go out and come in as safetensors, tasks as plain data and arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.asking import Answer as AnswerMessage
from ..protocol.errors import ConfigError, ServerLost, ShoalError
from ..protocol.join import JoinAddress, key_text
from ..protocol.messages import Message
from ..protocol.records import Place
from ..protocol.tasking import (
    Asked,
    Chunk,
    Counted,
    Feedback,
    Fetch,
    Govern,
    Governed,
    Publish,
    Published,
    Recollect,
    Recollected,
    Told,
    Upload,
    Uploaded,
    Valued,
)
from ..tasks.allot import Needs
from ..tasks.card import Card, Cost, Lineage, is_label
from ..tasks.judge import reward as judged
from ..tasks.values import Value, pack, rows, unpack
from .address import check_resolves
from .loop import Loop, Ticket
from .submitter import AskCalled, HearCalled, OpenCalled, Reply, SubmitCalled, Submitter, inquiry

if TYPE_CHECKING:
    import torch

PIECE = 4 * 1024 * 1024
MOST_BYTES = 16 * 1024 * 1024
"""Of a task's inputs, as they travel."""
CONNECT_TIMEOUT = 60.0
WAIT_TIMEOUT = 600.0
GOODBYE = 0.5
"""Seconds in which a client that is closed confirms what it has heard."""
NO_NEEDS = Needs()


@dataclass(frozen=True)
class Answer:
    """What a task came to.

    Attributes:
        outputs: as the model gave them. id: of the task. model, version: that answered. executor: where.
        seconds: from the task's coming to the dispatcher to its answer. privacy: the label of the task's data.
    """

    outputs: Value = field(repr=False)
    id: str
    model: str
    version: int
    identity: str = field(repr=False)
    executor: str
    seconds: float
    privacy: str
    key: tuple[int, int] = field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        found = np.asarray(self.outputs)
        return found.astype(dtype) if dtype is not None else found


@dataclass(frozen=True)
class FedBack:
    """Feedback on a task.

    Attributes:
        place: in the order of its coming. task: its id. identity: of the version that had answered. reward: from 0 to 1.
        kept: are inputs and truth remembered? inputs, truth: they, where they were asked for.
    """

    place: int
    task: str
    identity: str = field(repr=False)
    reward: float
    kept: bool
    inputs: Value = field(default=None, repr=False)
    truth: Value = field(default=None, repr=False)


class Pending:
    """A task that was submitted."""

    __slots__ = ("_privacy", "_ticket")

    def __init__(self, ticket: Ticket, privacy: str = "") -> None:
        self._ticket, self._privacy = ticket, privacy

    def done(self) -> bool:
        """Is it answered, or has it failed? Does not wait."""
        return self._ticket.done()

    def result(self, timeout: float | None = None) -> Answer:
        """The answer.

        Args:
            timeout: in seconds; None for the client's own `wait_timeout`. The task goes on beyond it.

        Raises:
            TaskFailed: no model qualifies (the text says why, of each), the model has failed, or the deadline has passed.
            QueueFull: it was not taken; `retry_after` says when there may be room.
            WaitTimeout, ServerLost: there is no answer in time.
        """
        reply: Reply = self._ticket.result(timeout)
        return _answer(reply, self._privacy)


class Client:
    """A client of a cluster's models; a context manager. Made by `shoal.connect(role="client")`.

    Args:
        address: of the coordinator, with its keys. timeout: seconds to find the dispatcher in.
        wait_timeout: seconds after which any other call ends in `WaitTimeout`, unless it says otherwise.

    Raises:
        NoServerError, ServerLost: nobody is there in time. AuthError: the keys do not fit.
    """

    def __init__(
        self, address: JoinAddress, *, timeout: float = CONNECT_TIMEOUT, wait_timeout: float = WAIT_TIMEOUT
    ) -> None:
        check_resolves(address)
        key = key_text(address.server_key) if address.server_key else ""
        self._core = Submitter(Place(0, 0, address.host, address.port, key), random_incarnation())
        self._loop = Loop(self._core, address.secret, wait_timeout)
        try:
            self._loop.result(self._loop.call(OpenCalled), timeout)
        except BaseException:
            self._loop.close()
            raise

    # --- tasks

    def submit(self, kind: str, inputs: Value, needs: Needs = NO_NEEDS, *, model: str = "") -> Pending:
        """Have a task done. Does not wait.

        Args:
            kind: of task, of which the cards of versions say a quality.
            inputs: an array or a tensor whose axis 0 counts them; a dictionary or a list of such; or any plain data, as one.
            needs: what is asked for; by default nothing. model: only its versions; by default any that was evaluated on the kind.

        Raises:
            ShapeError: the inputs are of a type that cannot be sent. ConfigError: they are too large, or the kind is no name.
        """
        if not is_label(kind) or (model and not is_label(model)):
            raise ConfigError(f"a kind of task is a printable name of up to 200 characters, not {kind!r:.80}")
        payload = pack(inputs)
        if len(payload) > MOST_BYTES:
            raise ConfigError(
                f"a task of {len(payload):,} bytes, and {MOST_BYTES:,} are the most",
                hint="several tasks, of a part each",
            )
        count = rows(inputs)
        items = 1 if count is None else max(1, count)
        latency, quality = float(needs.latency), float(needs.quality)
        asked = Asked(
            0, kind, model, items, latency, quality, needs.privacy, float(needs.budget), float(needs.deadline)
        )
        return Pending(self._loop.leave(SubmitCalled, asked, payload), needs.privacy)

    def feedback(
        self,
        answer: Answer | Collection[Answer],
        *,
        truth: Value = None,
        reward: float | Collection[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Say how good an answer was; or several, with as many truths or rewards. What is said last of a task counts.

        Args:
            truth: what was right: numbers of classes, one for each input; the share that is right is the reward. It is kept with
                the inputs, to be learned from, unless the task had a privacy label: then it stays here.
            reward: from 0 to 1, in place of that or beside it.

        Raises:
            ShapeError: the truth does not fit the outputs. ConfigError: no truth and no reward, or a task that is forgotten.
        """
        answers = [answer] if isinstance(answer, Answer) else list(answer)
        truths = [truth] if isinstance(answer, Answer) else list(truth) if truth is not None else [None] * len(answers)
        given = [reward] if not isinstance(reward, Collection) else list(reward)
        rewards = given * len(answers) if len(given) == 1 and len(answers) != 1 else given
        if len(truths) != len(answers) or len(rewards) != len(answers):
            raise ConfigError(f"{len(answers)} answers, {len(truths)} truths and {len(rewards)} rewards")
        values, buffers = [], []
        for each, right, worth in zip(answers, truths, rewards, strict=True):
            if right is None and worth is None:
                raise ConfigError("feedback without a truth and without a reward", hint="truth=… or reward=…")
            value = judged(each.outputs, right) if worth is None else float(worth)
            if not 0 <= value <= 1:
                raise ConfigError(f"a reward of {value}", hint="from 0, of no use, to 1, right")
            values.append(Valued(*each.key, value))
            buffers.append(pack(right) if right is not None and not each.privacy else b"")
        unknown = 0
        for start in range(0, len(values), 512):
            part, of_part = tuple(values[start : start + 512]), tuple(buffers[start : start + 512])

            def make(client: int, request: int, part: Any = part, of_part: Any = of_part) -> Message:
                return Feedback(client, request, part, of_part)

            counted: Counted = self._ask(make, timeout)
            unknown += counted.unknown
        if unknown:
            raise ConfigError(
                f"{unknown} of {len(values)} tasks are not remembered, or had no answer", cause="it is too long ago"
            )

    def fed_back(
        self, kind: str, after: int = 0, *, data: bool = True, timeout: float | None = None
    ) -> Iterator[FedBack]:
        """What was fed back of a kind of task, after this place in the order of its coming; oldest first.

        Args:
            data: what came with the truth, with inputs and truth, as far back as they are kept; what had a privacy label is not.
                False: all rewards, without them. What is said again of a task comes again at a new place, and no more at the old.
        """
        while True:
            found: Recollected = self._ask(
                lambda client, request, after=after: Recollect(client, request, kind, after, 1024, data),  # type: ignore[misc]
                timeout,
            )
            if not found.values:
                return
            for each, buffer in zip(found.values, found.buffers, strict=True):
                about = (each.place, _task_id(each.owner, each.number), each.identity, each.reward, each.kept)
                view = memoryview(buffer)
                end = 4 + int.from_bytes(view[:4], "little")
                yield FedBack(*about, unpack(view[4:end]), unpack(view[end:])) if data else FedBack(*about)
            after = found.values[-1].place

    # --- versions

    def publish(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor | np.ndarray[Any, Any]],
        metrics: Mapping[str, Any] | None = None,
        *,
        kind: str = "",
        data: Collection[str] = (),
        cost: Cost | None = None,
        lineage: Lineage | None = None,
        promote: bool = False,
        timeout: float | None = None,
    ) -> Card:
        """Bring a version of a model into the cluster's registry.

        Args:
            metrics: by name, the first is its quality; or by kind of task such dictionaries.
            kind: of task that `metrics` are of; by default the model's name.
            data: labels of the data that it may see. cost: by default its memory and parameters are counted.
            promote: serve it from now on.

        Raises:
            ConfigError: a card that cannot be; promotion of what was never evaluated.
        """
        from safetensors.torch import save

        whole = as_tensors(tensors)
        try:
            weights = save(whole)
        except RuntimeError as error:
            raise ConfigError(f"{name}: these tensors cannot be kept: {error}") from None
        digest = hashlib.sha256(weights).hexdigest()
        elements = sum(tensor.numel() for tensor in whole.values())
        cost = cost or Cost(0.0, len(weights), elements)
        quality = by_kind(metrics, kind or name)
        Card(
            name, 1, digest, len(weights), quality, cost, tuple(sorted(data)), lineage or Lineage()
        )  # wrong is said here
        about = {
            "name": name,
            "quality": [[of, [[*pair] for pair in found.items()]] for of, found in quality.items()],
            "cost": asdict(cost),
            "data": sorted(data),
            "lineage": asdict(lineage or Lineage()),
        }
        at = 0
        while at < len(weights):
            upto = self._upload(digest, weights, at, timeout)
            if upto == at and upto < len(weights):
                raise ServerLost(
                    "an upload does not go on", cause="another upload of the same weights", hint="try again"
                )
            at = upto
        body = json.dumps(about).encode()
        published: Published = self._ask(lambda client, request: Publish(client, request, digest, (body,)), timeout)
        card = Card.unpack(bytes(published.buffers[0]))
        if promote:
            self.promote(name, card.version, timeout=timeout)
        return card

    def _upload(self, digest: str, weights: bytes, at: int, timeout: float | None) -> int:
        piece = memoryview(weights)[at : at + PIECE]
        done: Uploaded = self._ask(
            lambda client, request: Upload(client, request, digest, len(weights), at, (piece,)), timeout
        )
        return done.upto

    def download(self, name: str, version: int | None = None, timeout: float | None = None) -> tuple[Card, bytes]:
        """A version's card, and its safetensors file; without a number the promoted one's.

        Raises:
            ConfigError: there is none, or what came is not what its card says.
        """
        found = self.model(name, timeout)
        number = found["promoted"] if version is None else version
        told = next((each for each in found["versions"] if each["version"] == number), None)
        if told is None:
            hint = "shoal models promote" if version is None else "shoal models show"
            raise ConfigError(
                f"no version of {name!r} is promoted"
                if version is None
                else f"there is no version {version} of {name!r}",
                hint=hint,
            )
        card = Card.unpack(told["packed"].encode())
        data = bytearray()
        while len(data) < card.size:
            at = len(data)
            chunk: Chunk = self._ask(lambda client, _, at=at: Fetch(client, card.weights, at), timeout)  # type: ignore[misc]
            data += chunk.buffers[0]
            if len(data) == at:
                break
        if hashlib.sha256(data).hexdigest() != card.weights:
            raise ConfigError(f"what came of {card} is not what was published")
        return card, bytes(data)

    def load(self, name: str, version: int | None = None, timeout: float | None = None) -> dict[str, torch.Tensor]:
        """A version's tensors; without a number the promoted one's. Raises as `download`."""
        from safetensors.torch import load

        return load(self.download(name, version, timeout)[1])

    def promote(
        self, name: str, version: int, *, canary: float = 0.0, why: str = "", timeout: float | None = None
    ) -> int:
        """Serve a version from now on.

        Args:
            canary: try it first, on this share of the tasks: feedback drops it or promotes it.

        Raises:
            ConfigError: there is no such version, or it was never evaluated.
        """
        return self._govern("canary" if canary else "promote", name, version, canary, why, timeout)

    def rollback(self, name: str, *, why: str = "", timeout: float | None = None) -> int:
        """Serve again what was served before; drops a version that is tried, if there is one. Returns the version served.

        Raises:
            ConfigError: nothing was promoted before.
        """
        return self._govern("rollback", name, 0, 0.0, why, timeout)

    def _govern(self, what: str, name: str, version: int, share: float, why: str, timeout: float | None) -> int:
        done: Governed = self._ask(
            lambda client, request: Govern(client, request, what, name, version, float(share), why), timeout
        )
        return done.version

    # --- how things are

    def models(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """A line for each model, as `shoal models ls --json` prints it."""
        found: list[dict[str, Any]] = self.inquire("models", timeout)
        return found

    def model(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """Versions, cards and history of one."""
        found: dict[str, Any] = self.inquire(f"model:{name}", timeout)
        return found

    def tasks(self, timeout: float | None = None) -> list[dict[str, Any]]:
        """The newest tasks, as `shoal tasks ls --json` prints them."""
        found: list[dict[str, Any]] = self.inquire("tasks", timeout)
        return found

    def why(self, task: str | Answer, timeout: float | None = None) -> dict[str, Any]:
        """All that is known of a task: where it went, and why."""
        found: dict[str, Any] = self.inquire(f"task:{task.id if isinstance(task, Answer) else task}", timeout)
        return found

    def status(self, timeout: float | None = None) -> dict[str, Any]:
        """The queue, executors, versions, and what is believed of them."""
        found: dict[str, Any] = self.inquire("status", timeout)
        return found

    def inquire(self, what: str, timeout: float | None = None) -> Any:
        """A question to the dispatcher; JSON.

        Raises:
            ConfigError: what was asked about is not there.
        """
        message: AnswerMessage = self._ask(inquiry(what), timeout)
        found = json.loads(bytes(message.buffers[0]))
        if isinstance(found, dict) and set(found) == {"error"}:
            raise ConfigError(found["error"])
        return found

    def _ask(self, make: Callable[[int, int], Message], timeout: float | None) -> Any:
        return self._loop.result(self._loop.call(AskCalled, make), timeout)

    # --- the rest

    @property
    def waiting(self) -> int:
        """Tasks that are not answered."""
        return self._core.waiting

    def close(self) -> None:
        """Free everything. Tasks under way go on, and nobody hears of them. Again changes nothing."""
        if self._loop.usable and self._core.owes:
            with suppress(ShoalError):  # the answer to any question comes after the dispatcher has heard
                self._loop.tell(HearCalled())
                self._ask(inquiry("task:"), GOODBYE)
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answer(reply: Reply, privacy: str) -> Answer:
    told: Told = reply.told
    outputs = unpack(reply.output)
    name = _task_id(reply.owner, told.number)
    key = (reply.owner, told.number)
    return Answer(outputs, name, told.model, told.version, told.identity, told.executor, told.seconds, privacy, key)


def _task_id(owner: int, number: int) -> str:
    return f"{owner:016x}-{number}"


def as_tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of one's own, on the processor.

    Raises:
        ConfigError: something is neither an array nor a tensor.
    """
    import torch

    found = {}
    for name, array in arrays.items():
        if isinstance(array, torch.Tensor):
            found[name] = array.detach().cpu().contiguous()
        elif isinstance(array, np.ndarray):
            found[name] = torch.from_numpy(np.ascontiguousarray(array))
        else:
            raise ConfigError(f"{name!r} is a {type(array).__name__}", hint="numpy arrays or torch tensors by name")
    return found


def by_kind(metrics: Mapping[str, Any] | None, kind: str) -> dict[str, dict[str, float]]:
    """Metrics by kind of task."""
    if not metrics:
        return {}
    if all(isinstance(value, Mapping) for value in metrics.values()):
        return {of: {name: float(value) for name, value in found.items()} for of, found in metrics.items()}
    try:
        return {kind: {name: float(value) for name, value in metrics.items()}}
    except (TypeError, ValueError):
        raise ConfigError("metrics are numbers by name, or such by kind of task") from None


def random_incarnation() -> int:
    return int.from_bytes(os.urandom(8), "big") | 1
