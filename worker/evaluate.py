"""Held-out evaluation beside training: parts of a held-out set, measured on one version, a part now and then (SPEC §17).

Rules
- Between two batches at most one part is measured here; the other workers go on, and measure other parts.
- What is trained is untouched: a model holds the weights of the version only while a part is measured, without gradients.
- A coordinator that is away ends no training: what was due is evaluated when it is back.
- In federated mode each owner measures its own data on the round's weights, and its sums leave under the mask alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import ConfigError, ServerLost, WaitTimeout
from ..protocol.evaluating import DONE, LATER, MAKE, MOST_RESULTS, Apportioned, Assess, Cut, Review, Sums
from ..protocol.federated import SUM
from . import calls
from .arrays import Array, Cache
from .cut import boundary
from .data import reader

if TYPE_CHECKING:
    import torch

    from .client import Worker
    from .loop import Ticket

logger = logging.getLogger("shoal")

Measure = Callable[[Any, Any], Mapping[str, Any]]
"""(model or weights, batch) -> sums over the batch, by name."""

MAX_NAME = 64
MOST_SUMS = 16
PARTS = 32
"""Parts that a held-out set is cut into, unless that makes them smaller than a batch."""
PATIENCE = 0.5
"""Seconds for which training waits for an answer of the coordinator."""
CUTTING = 10.0
"""Seconds for which it waits for a cut."""
CONCLUDING = 120.0
"""Seconds at the end of the data for the evaluations that are under way."""
PAUSES = 0.02, 0.5
"""Seconds from `later` to the next question: at first, and at most."""
EXAMPLES = "examples"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a version is worth on a held-out set.

    Attributes:
        name: of the set. mode, clock: of the version; every live worker's steps below `clock` are in it. In `federated`, the round.
        examples: how many it was measured on. sums: over all of them, by what `measure` calls them.
    """

    name: str
    mode: str
    clock: int
    examples: int
    sums: Mapping[str, float]

    @property
    def means(self) -> dict[str, float]:
        """The sums by the number of examples."""
        return {what: total / self.examples for what, total in self.sums.items()}


class Evaluator:
    """One held-out set, of one worker; made by `Worker.evaluation`.

    `partition` calls `step` between batches. Who does not use it calls it after each step, and `finish` in the end.
    """

    def __init__(
        self,
        worker: Worker,
        data: Any,
        measure: Measure,
        model: torch.nn.Module | None,
        every: int,
        batch_size: int,
        name: str,
    ) -> None:
        for what, value in (("every", every), ("batch_size", batch_size)):
            if not isinstance(value, int) or not 1 <= value < 2**31:
                raise ConfigError(f"{what} is {value!r}, not a whole number from 1 to 2147483647")
        if not name or len(name) > MAX_NAME or not name.isprintable() or ":" in name:
            raise ConfigError(f"an evaluation's name is printable, without a colon, of at most {MAX_NAME} characters")
        self.name, self._every, self._batch = name, every, batch_size
        self._worker, self._measure = worker, measure
        self._model = getattr(model, "_orig_mod", model)
        self._length, self._take = reader(data)
        if not self._length:
            raise ConfigError(f"the held-out set {name!r} is empty")
        self._size = max(1, -(-self._length // (PARTS * batch_size))) * batch_size
        self._done = 0
        self._held: tuple[int, int] = (0, 0)
        self._cache: Cache | None = None
        self._ticket: Ticket | None = None
        """A question that the coordinator has not answered yet."""
        self._pause, self._ask_at = PAUSES[0], 0.0
        self._names: set[str] = set()

    # --- leased parts

    @property
    def due(self) -> int:
        """The newest clock that an evaluation was wanted at; 0 before the first."""
        return self._worker._core.stats.min_clock // self._every * self._every

    def step(self) -> None:
        """Do what is due, at most one part of it. Costs nothing where nothing is."""
        due = self.due
        if due > self._done and not self._worker._core.federated and time.monotonic() >= self._ask_at:
            try:
                self._turn(due, 0, PATIENCE)
            except (ServerLost, WaitTimeout) as error:
                logger.warning("an evaluation has to wait: %s", error.what)
                self._put_off(PAUSES[1])

    def finish(self, timeout: float | None = None) -> None:
        """Help until everything due is evaluated. Raises as `Worker.pull`."""
        deadline = time.monotonic() + self._worker._loop.patience(timeout)
        while (due := self.due) > self._done and not self._worker._core.federated:
            self._wait(deadline)
            self._turn(due, 0, max(PATIENCE, deadline - time.monotonic()))

    def conclude(self) -> None:
        """`finish`, at the end of the data: what cannot be evaluated is no error there."""
        try:
            self.finish(CONCLUDING)
        except (ServerLost, WaitTimeout) as error:
            logger.warning("an evaluation is not done: %s", error.what)

    def now(self, timeout: float | None) -> int:
        """Help to evaluate the version of now. Returns the number of its result, 0 if it was given up."""
        deadline = time.monotonic() + self._worker._loop.patience(timeout)
        after = self._worker._loop.result(self._call(self._assess(0, 0)), timeout).number + 1
        while True:
            self._wait(deadline)
            number = self._turn(0, after, max(PATIENCE, deadline - time.monotonic()))
            if number is not None:
                return number

    def _wait(self, deadline: float) -> None:
        now = time.monotonic()
        if now >= deadline:
            raise WaitTimeout(
                f"the evaluation of {self.name!r} is not done: others hold parts of it", hint="a longer timeout"
            )
        if self._ask_at > now:
            time.sleep(min(self._ask_at, deadline) - now)

    def _turn(self, due: int, after: int, patience: float) -> int | None:
        """One question and what follows from it. Returns the number of the result if the evaluation is over."""
        answer = self._ask(self._assess(due, after), patience)
        if isinstance(answer, Apportioned):
            self._pause = PAUSES[0]
            self._part(answer)
        elif answer is None or answer.state == LATER:
            self._put_off(self._pause)
            self._pause = min(2 * self._pause, PAUSES[1])
        elif answer.state == MAKE:
            self._make()
        elif answer.state == DONE:
            self._let_go()
            self._done = max(self._done, due)
            return int(answer.number)
        return None

    def _let_go(self) -> None:
        """The cut that is held is of no use any more, here or to others."""
        if self._cache is not None:
            self._worker._loop.tell(calls.CutReleased(*self._held))
        self._cache, self._held = None, (0, 0)

    def _put_off(self, seconds: float) -> None:
        self._ask_at = time.monotonic() + seconds

    def _assess(self, due: int, after: int) -> Callable[[int, int], Any]:
        return lambda inc, request: Assess(inc, request, self.name, self._length, self._size, due, after)

    def _ask(self, make: Callable[[int, int], Any], patience: float) -> Any:
        """The answer, or None if there is none yet: then the next call has it."""
        self._ticket = self._ticket or self._call(make)
        with contextlib.suppress(WaitTimeout):
            self._worker._loop.wait(self._ticket, patience)
        if not self._ticket.over:
            return None
        ticket, self._ticket = self._ticket, None
        return ticket.result()

    def _call(self, make: Callable[[int, int], Any]) -> Ticket:
        return self._worker._loop.call(calls.AskCalled, make)

    def _tell(self, make: Callable[[int, int], Any]) -> None:
        """What the coordinator has to know before anything else is asked."""
        self._ask(make, PATIENCE)

    def _make(self) -> None:
        worker = self._worker
        self._let_go()
        cache = Cache(worker._registered().layout)
        try:
            ticket = worker._loop.call(calls.CutCalled, cache.load, 0, 0, True)
            made: calls.CutMade = worker._loop.result(ticket, CUTTING)
        except (WaitTimeout, ServerLost) as error:
            why = error.what[:256]
            return self._tell(lambda inc, request: Cut(inc, request, self.name, 0, "", 0, "", why))
        found = boundary(worker, made)
        self._cache, self._held = cache, (made.maker, made.number)

        def cut(incarnation: int, request: int) -> Cut:
            why = "" if incarnation == made.maker else "its maker was declared dead"
            return Cut(incarnation, request, self.name, made.number, found.mode, found.clock, found.key, why)

        self._tell(cut)

    def _part(self, part: Apportioned) -> None:
        why, sums = self._load(part.maker, part.cut), dict[str, float]()
        if not why:
            assert self._cache is not None
            weights = self._cache.views(self._worker._exchange.templates)
            for arrive in self._worker._arrivers:
                arrive(CUTTING)
            with installed(self._model, weights):
                sums = self._sums(weights, part.start, part.stop)
        said = tuple(sums.items())
        answer = self._ask(lambda inc, request: Sums(inc, request, part.lease, said, why), PATIENCE)
        if answer is not None and answer.state == DONE:  # it was the last part
            self._let_go()

    def _load(self, maker: int, number: int) -> str:
        """Have the cut. Returns why not, or ""."""
        if self._held == (maker, number) and self._cache is not None:
            return ""
        cache = Cache(self._worker._registered().layout)
        try:
            ticket = self._worker._loop.call(calls.CutCalled, cache.load, maker, number)
            self._worker._loop.result(ticket, CUTTING)
        except (WaitTimeout, ServerLost) as error:
            return error.what[:256]
        self._cache, self._held = cache, (maker, number)
        return ""

    # --- measuring

    def _sums(self, weights: Mapping[str, Array], start: int, stop: int) -> dict[str, float]:
        """Over the examples `[start, stop)`. Whole numbers stay whole."""
        found: dict[str, float] = {}
        subject = self._model if self._model is not None else weights
        for at in range(start, stop, self._batch):
            for what, value in self._measure(subject, self._take(np.arange(at, min(at + self._batch, stop)))).items():
                found[what] = found.get(what, 0) + _number(what, value)
        if len(found) > MOST_SUMS or EXAMPLES in found:
            raise ConfigError(f"measure gives at most {MOST_SUMS} sums, none of them {EXAMPLES!r}: these are counted")
        return {what: float(value) for what, value in found.items()}

    # --- federated rounds

    def names(self) -> set[str]:
        """The metrics that this gives in a round, told by a first batch."""
        if not self._names:
            arrays = self._worker._trainer.arrays
            with installed(self._model, {}):
                sums = self._sums(arrays, 0, min(self._batch, self._length))
            self._names = {f"{SUM}{self.name}:{what}" for what in (*sums, EXAMPLES)}
        return self._names

    def of_round(self, number: int) -> dict[str, float]:
        """This owner's sums on the weights that the model has now."""
        if number % self._every:
            return {}
        with installed(self._model, {}):
            sums = self._sums(self._worker._trainer.arrays, 0, self._length)
        return {f"{SUM}{self.name}:{what}": value for what, value in (sums | {EXAMPLES: float(self._length)}).items()}


def _number(what: str, value: Any) -> float:
    """One of a measure's values; whole numbers as `int`."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float):
        raise ConfigError(f"measure gives {what!r} as a {type(value).__name__}", hint="a number: a sum over the batch")
    return int(value) if isinstance(value, bool) else value


@contextlib.contextmanager
def installed(model: torch.nn.Module | None, weights: Mapping[str, Array]) -> Iterator[None]:
    """The model has these weights, is in `eval` mode and makes no gradients; then all is as it was."""
    if model is None:
        yield
        return
    import torch

    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: mine[name].data for name in weights if name in mine}
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            for name, data in before.items():
                mine[name].data = torch.as_tensor(weights[name]).to(data.device)
            model.eval()
            yield
    finally:
        for name, data in before.items():
            mine[name].data = data
        for module, training in modes:
            module.training = training


def results(worker: Worker, known: list[tuple[int, Evaluation]], timeout: float | None) -> None:
    """Bring what is known of results up to date."""
    while True:
        since = known[-1][0] + 1 if known else 0
        ticket = worker._loop.call(calls.AskCalled, lambda inc, request, since=since: Review(inc, request, since))
        found = worker._loop.result(ticket, timeout).results
        known += [(e.number, Evaluation(e.name, e.mode, e.clock, e.examples, dict(e.sums))) for e in found]
        if len(found) < MOST_RESULTS:
            return


def evaluation_of(known: list[tuple[int, Evaluation]], number: int, name: str) -> Evaluation:
    """The result of this number.

    Raises:
        ServerLost: there is none.
    """
    found = next((result for each, result in known if each == number), None)
    if found is None:
        raise ServerLost(
            f"the evaluation of {name!r} was given up: no version could be read to its end", hint="shoal status"
        )
    return found
