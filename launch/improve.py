"""`shoal.improve`: the loop of `tasks.improve` around a client's feedback, in threads of the user's process.

Rules
- One thread listens and decides, another does what takes time, one thing after the other. Both end with `stop`; what is being
  trained then is not waited for beyond the time-out, and nothing comes of it.
- What training is given and what evaluation is given are apart, by the place of each example, in every attempt.
- A new version may see what its parent may see, and says what it was made of: its parent, and which feedback.
- Functions of the user's that raise end the attempt, not the loop. A dispatcher that is away is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..protocol.errors import NoServerError, ServerLost, ShoalError, WaitTimeout
from ..tasks import improve as loop
from ..tasks.card import Card, Lineage
from ..tasks.improve import Improve, Outcome, Rule, is_held_out
from ..worker.taskclient import Client, FedBack, as_tensors

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("shoal")

Weights: TypeAlias = "dict[str, torch.Tensor]"
Train: TypeAlias = Callable[[Weights, list[FedBack]], Mapping[str, Any]]
Evaluate: TypeAlias = Callable[[Weights, list[FedBack]], "float | Mapping[str, float]"]
PATIENCE = 10.0
"""Seconds for a look at the feedback."""
REMEMBERED = 20_000
"""Tasks of which is known that they were heard of: what is said of one again is no news of the model."""
MODE = "feedback"
"""In the lineage of what is made here."""


class Improving:
    """A loop that runs; a context manager. Made by `improve`.

    Attributes:
        outcomes: of the attempts that are over, the first one first.
    """

    def __init__(
        self,
        client: Client,
        kind: str,
        train: Train,
        evaluate: Evaluate,
        rule: Rule,
        model: str,
        private: bool,
        poll: float,
    ) -> None:
        self._client, self._kind, self._name = client, kind, model
        self._train_with, self._evaluate_with = train, evaluate
        self._rule, self._private, self._poll = rule, private, poll
        self._core = Improve(rule)
        self.outcomes: list[Outcome] = []
        self._after = 0
        self._heard: OrderedDict[str, None] = OrderedDict()
        self._cards: dict[str, Card] = {}
        self._parent: Weights = {}
        self._new: Weights = {}
        self._metrics: dict[str, float] = {}
        self._used: tuple[int, int, int] = (0, 0, 0)
        self._done: list[loop.Event] = []
        self._changed = threading.Condition()
        self._over = False
        self._away = False
        self._error: ShoalError | None = None
        self._look()  # what is wrong with the model's name is said to the caller
        self._thread = threading.Thread(target=self._run, name=f"shoal improves {model}", daemon=True)
        self._worker: threading.Thread | None = None
        self._thread.start()

    @property
    def state(self) -> str:
        """`watching`, `gathering`, `training`, `evaluating`, `publishing`, `promoting` or `resting`."""
        return self._core.state

    @property
    def quality(self) -> float | None:
        """The mean of the served version's last rewards; None while there are too few."""
        return self._core.quality

    def wait(self, outcomes: int = 1, timeout: float = 600.0) -> list[Outcome]:
        """Until so many attempts are over.

        Args:
            timeout: in seconds.

        Raises:
            WaitTimeout: they are not. What has ended the loop, if that was an error.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(self.outcomes) < outcomes:
                if self._error is not None:
                    raise self._error
                left = deadline - time.monotonic()
                if left <= 0 or self._over:
                    raise WaitTimeout(f"{len(self.outcomes)} of {outcomes} attempts are over; it is {self.state}")
                self._changed.wait(min(left, 0.5))  # short, so that Ctrl-C works
            return list(self.outcomes)

    def stop(self, timeout: float = 30.0) -> None:
        """Watch no more. What is under way is given so many seconds. Again changes nothing."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for thread in (self._thread, self._worker):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout)

    def __enter__(self) -> Improving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- the thread that decides

    def _run(self) -> None:
        while not self._over:
            try:
                self._turn()
                self._away = False
            except (ServerLost, NoServerError, WaitTimeout) as error:
                if not self._away and not self._over:
                    logger.warning("feedback on %s cannot be read for now: %s", self._kind, error)
                self._away = True
            except ShoalError as error:
                logger.error("%s is not improved any more: %s", self._name, error)
                with self._changed:
                    self._error, self._over = error, True
                    self._changed.notify_all()
            with self._changed:
                until = min(self._poll, max(0.0, self._core.wake_at - time.monotonic()))
                if not self._over and (self._away or not self._done):
                    self._changed.wait(until)

    def _turn(self) -> None:
        """Hear what there is, and have done what follows from it."""
        self._say(loop.Serving(self._look()))
        for each in self._client.fed_back(self._kind, self._after, data=False, timeout=PATIENCE):
            self._after = each.place
            if each.task not in self._heard:
                self._say(loop.FedBack(each.place, each.identity, each.reward, each.kept or self._private))
            self._heard[each.task] = None
            self._heard.move_to_end(each.task)
            if len(self._heard) > REMEMBERED:
                self._heard.popitem(last=False)
        with self._changed:
            done, self._done = self._done, []
        for event in (*done, loop.Tick()):
            self._say(event)

    def _look(self) -> str:
        """The identity of the promoted version, or nothing."""
        found = self._client.model(self._name, timeout=PATIENCE)
        promoted = next((each for each in found["versions"] if each["version"] == found["promoted"]), None)
        if promoted is None:
            return ""
        identity: str = promoted["identity"]
        if identity not in self._cards:
            self._cards = {identity: Card.unpack(promoted["packed"].encode())} | self._cards
        return identity

    def _say(self, event: loop.Event) -> None:
        for effect in self._core.handle(event, time.monotonic()):
            match effect:
                case Outcome():
                    self._ended(effect)
                case _:
                    self._worker = threading.Thread(
                        target=self._do, args=(effect,), name=f"shoal improves {self._name}: {self.state}", daemon=True
                    )
                    self._worker.start()

    def _ended(self, outcome: Outcome) -> None:
        self._parent, self._new = {}, {}
        logger.info("%s, attempt %d: %s: %s", self._name, outcome.attempt, outcome.end, outcome.text)
        with self._changed:
            self.outcomes.append(outcome)
            self._changed.notify_all()

    # --- the thread that works

    def _do(self, effect: loop.Effect) -> None:
        acts: dict[type[Any], Callable[[Any], loop.Event]] = {
            loop.Train: self._train,
            loop.Evaluate: self._evaluate,
            loop.Publish: self._publish,
            loop.Promote: self._promote,
        }
        try:
            event = acts[type(effect)](effect)
        except ShoalError as error:
            event = loop.Failed(effect.attempt, str(error))
        except Exception as error:  # the user's function
            logger.warning("%s: %s failed", self._name, self.state, exc_info=error)
            event = loop.Failed(effect.attempt, f"{type(error).__name__}: {error}")
        with self._changed:
            self._done.append(event)
            self._changed.notify_all()

    def _train(self, effect: loop.Train) -> loop.Event:
        card = self._cards[effect.parent]
        self._parent = self._client.load(card.name, card.version)
        examples = self._examples(effect.after, held_out=False)
        places = [each.place for each in examples] or [0]
        self._used = len(examples), places[0], places[-1]
        given = {name: tensor.clone() for name, tensor in self._parent.items()}
        self._new = as_tensors(self._train_with(given, examples))
        return loop.Trained(effect.attempt)

    def _evaluate(self, effect: loop.Evaluate) -> loop.Event:
        examples = self._examples(effect.after, held_out=True)
        if not examples and not self._private:
            return loop.Failed(effect.attempt, "no example was held out")
        before = measured(self._evaluate_with(dict(self._parent), examples))
        self._metrics = measured(self._evaluate_with(dict(self._new), examples))
        return loop.Evaluated(effect.attempt, first(before), first(self._metrics))

    def _publish(self, effect: loop.Publish) -> loop.Event:
        parent = self._cards[effect.parent]
        count, start, end = self._used
        made_of = (
            "feedback that stayed with its owners" if self._private else f"feedback {start} to {end}: {count} tasks"
        )
        lineage = Lineage(
            parent.lineage.run, MODE, parent.lineage.clock, effect.parent, (f"{made_of} of {self._kind}",)
        )
        card = self._client.publish(
            self._name, self._new, {self._kind: self._metrics}, data=parent.data, lineage=lineage
        )
        return loop.Published(effect.attempt, card.version)

    def _promote(self, effect: loop.Promote) -> loop.Event:
        if self._look() != effect.parent:
            return loop.Overtaken(effect.attempt)
        self._client.promote(self._name, effect.version, why=effect.why)
        return loop.Promoted(effect.attempt)

    def _examples(self, after: int, held_out: bool) -> list[FedBack]:
        if self._private:
            return []
        share = self._rule.held_out
        found = self._client.fed_back(self._kind, after)
        return [each for each in found if is_held_out(each.place, share) == held_out][-self._rule.most :]


def improve(
    client: Client,
    kind: str,
    *,
    train: Train,
    evaluate: Evaluate,
    rule: Rule | None = None,
    model: str = "",
    private: bool = False,
    poll: float = 1.0,
) -> Improving:
    """Watch the feedback on a kind of task; when the rule says so, train on it, and promote what is better.

    Args:
        train: `train(weights, examples) -> weights`: tensors by name of the version that is served, and what was fed back with the
            truth, less what is held out (`.inputs`, `.truth`, `.reward`, oldest first). It may start a cluster of its own.
        evaluate: `evaluate(weights, examples)`: a quality, higher is better, or metrics by name of which the first is one. It is
            asked about both versions, with the same examples, which were held out.
        rule: when to train and what is better; by default `Rule()`. model: by default of the kind's name.
        private: what was right stays with its owners: every reward counts as an example, and the functions are given none; they go
            to where the data are, in rounds.
        poll: seconds between looks.

    Returns:
        A handle, which `stop` or leaving it ends.

    Raises:
        ConfigError: there is no such model; or river is needed and not installed.
    """
    return Improving(client, kind, train, evaluate, rule or Rule(), model or kind, private, poll)


def measured(found: Any) -> dict[str, float]:
    """Metrics by name, of what an evaluation has returned.

    Raises:
        TypeError, ValueError: these are no numbers.
    """
    metrics = found if isinstance(found, Mapping) else {"quality": found}
    if not metrics:
        raise ValueError("an evaluation that says nothing")
    return {str(name): float(value) for name, value in metrics.items()}


def first(metrics: Mapping[str, float]) -> float:
    return next(iter(metrics.values()))
