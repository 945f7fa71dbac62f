"""Federated rounds as a training script meets them: `worker.rounds(…)`, and what `partition` does in federated mode (DESIGN §8).

Rules
- The arrays that are trained are the script's own memory; the cache keeps the weights that the round has given.
- Nothing leaves but an `Input`, which the core masks. What a script logs is a metric of the round, summed under the same mask.
- A round that the others give up is no fault of this worker's: the next one is waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..protocol.errors import ConfigError, NonFiniteError, ProtectionError, RoundClosed
from ..protocol.federated import NORM, PROX
from ..protocol.join import CLEAR, SECAGG
from ..protocol.layout import Block
from ..protocol.rounds import MAX_METRICS
from ..protocol.rules import Delta
from ..protocol.secure.plan import Plan, Policy
from ..protocol.session import blocks_digest, model_digest
from ..protocol.stale import Stale
from . import calls
from .arrays import Array, Bits, Cache, write
from .parley import Input, Over

if TYPE_CHECKING:
    import torch

    from .client import Worker

logger = logging.getLogger("shoal")

MISTAKEN = 3
"""Rounds in a row whose weights are not those that were announced, after which the servers are not trusted."""


def policy_of(require: str | Policy) -> Policy:
    """What a worker demands, as a script says it: `secagg`, `clear`, or more exactly.

    Raises:
        ConfigError: there is no such protection.
    """
    if isinstance(require, Policy):
        return require
    if require == SECAGG:
        return Policy()
    if require == CLEAR:
        return Policy(CLEAR, minimum=1)
    raise ConfigError(f"require is {require!r}", hint=f"{SECAGG}, {CLEAR}, or shoal.Policy(…)")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a round.

    Attributes:
        applied: is the average of the updates in the weights now? If not, `why`: the others have given it up.
        clients: whose updates are in it. metrics: averages over them, of those that all had said before the round began.
        capped: of how many the weight was cut off. clipped: how many elements of all updates were.
    """

    applied: bool
    clients: int = 0
    metrics: Mapping[str, float] | None = None
    capped: int = 0
    clipped: int = 0
    why: str = ""


class Round:
    """A round that has begun: the model holds its weights. Made by `Worker.rounds`.

    Attributes:
        number: of the round. protection, clients, minimum, threshold, clip: as its plan says.
        settings: what the servers want of local training, by name.
        private: is there noise, for differential privacy?
    """

    def __init__(self, trainer: Trainer, session: int, plan: Plan, examples: float) -> None:
        self.number, self.protection, self.clients = plan.round, plan.protection, plan.cohort
        self.minimum, self.threshold, self.clip = plan.minimum, plan.threshold, plan.clip
        self.settings: Mapping[str, Any] = dict(plan.training)
        self.private = plan.noise is not None or NORM in self.settings
        self._trainer, self._session, self._plan, self._examples = trainer, session, plan, examples
        self._submitted = False

    def __repr__(self) -> str:
        return f"<shoal.Round {self.number} {self.protection}>"

    @property
    def over(self) -> bool:
        """Does it take nothing more?"""
        return self._submitted or self._trainer.session != self._session

    def submit(
        self,
        *,
        metrics: Mapping[str, float] | None = None,
        examples: float | None = None,
        timeout: float | None = None,
    ) -> Outcome:
        """Put in what the model has learned since the round began, and wait for the round's end.

        Args:
            metrics: numbers to be averaged over all clients, under the same protection. In a round are those whose names every
                client has said before: give their names to `rounds(metrics=…)`, or they count from the next round on.
            examples: how much it weighs; by default what `rounds` was given.
            timeout: in seconds.

        Raises:
            RoundClosed: it came too late, or a second time.
            ProtectionError: the servers wanted what would show more than a sum. NonFiniteError: the update has NaN or infinity.
        """
        if self._submitted:
            raise RoundClosed("this round has had this worker's update already")
        weight = self._examples if examples is None else float(examples)
        for prepare in self._trainer.submits:
            prepare()
        given = self._trainer.input(self._plan, weight, {k: float(v) for k, v in (metrics or {}).items()})
        self._submitted = True
        applied = False
        try:
            outcome = self._trainer.submit(self._session, given, timeout)
            applied = outcome.applied
        finally:
            for end in self._trainer.ends:
                end(applied)
        return outcome

    def draw_back(self) -> None:
        """FedProx (Li et al. 2020): add to the gradients that a torch model has what draws it back to the round's weights.

        To be called between `backward` and `step`; `opt.step()` of a wrapped optimizer does it. It is nothing unless the
        servers were started with `--prox`.
        """
        self._trainer.draw_back(float(self.settings.get(PROX, 0.0)))

    def decline(self, why: str) -> None:
        """Put nothing in."""
        if not self._submitted:
            self._submitted = True
            self._trainer.decline(self._session, why)


class Trainer:
    """Local training, of one worker.

    Args:
        require: what is demanded of rounds unless the script says otherwise.
        signs: has this worker an identity? Then servers that lie are reckoned with, whatever the script demands.
    """

    def __init__(self, worker: Worker, require: str | Policy, signs: bool) -> None:
        self._worker = worker
        self._signs = signs
        self.policy = self.demanded(require)
        self.arrays: Mapping[str, Array] = {}
        """What is trained, by registered name."""
        self.beside: Mapping[str, Array] = {}
        """What of this is not in the model."""
        self.begins: list[Callable[[Round], None]] = []
        """Called when the weights of a round are in the arrays."""
        self.submits: list[Callable[[], None]] = []
        """Called before the arrays are looked at for an update."""
        self.ends: list[Callable[[bool], None]] = []
        """Called when a round that had an update is over: was it applied?"""
        self.round: Round | None = None
        """The one that is trained for."""
        self.metrics: dict[str, float] = {}
        """What was logged since the round began."""
        self._names: set[str] = set()
        self._mine: Cache | None = None
        self._mistaken = 0

    def demanded(self, require: str | Policy | None) -> Policy:
        """
        Raises:
            ConfigError: there is no such protection.
        """
        policy = self.policy if require is None else policy_of(require)
        return replace(policy, active=True) if self._signs else policy

    @property
    def session(self) -> int:
        """The one that is under way, or 0."""
        return self._worker._core.federation.session

    @property
    def active(self) -> bool:
        """Is a round trained for?"""
        return self.round is not None and not self.round.over

    def hold(self, model: torch.nn.Module | Mapping[str, Array], timeout: float | None) -> None:
        """This is what is trained; what is registered, if nothing is yet.

        Raises:
            ConfigError: it is not what was registered, or the cluster is in another mode.
        """
        worker, exchange = self._worker, self._worker._exchange
        arrays = dict(model) if isinstance(model, Mapping) else _floating(model)
        if exchange.cache is None:
            worker._register({name: (array, 0) for name, array in arrays.items()}, (Delta(),), timeout, Stale())
        arrays |= self.beside
        missing = sorted(exchange.templates.keys() - arrays.keys())
        if missing:
            raise ConfigError(f"the model that is registered has {missing[0]!r}, and this one has not")
        if not worker._core.federated:
            raise ConfigError(f"the cluster is in mode {worker.mode}", hint="shoal mode federated")
        self.arrays = {name: arrays[name] for name in exchange.templates}

    def log(self, numbers: Mapping[str, float]) -> None:
        self.metrics.update(numbers)

    # --- rounds

    def rounds(
        self, examples: float, policy: Policy, metrics: tuple[str, ...], count: int | None, timeout: float | None
    ) -> Iterator[Round]:
        """One after the other, until there are no more; then the model has the last weights.

        Args:
            count: until so many were completed by the cluster; None: all that it makes.
        """
        worker = self._worker
        self._names.update(metrics)
        for evaluator in worker._evaluators:
            self._names |= evaluator.names()
        worker._loop.tell(calls.PauseCalled())
        begun = self._enlist(policy, timeout)
        until = None if count is None else begun + count
        try:
            while (round_ := self._next(examples, until, timeout)) is not None:
                self.round = round_
                self.metrics.clear()
                for begins in self.begins:
                    begins(round_)
                for evaluator in worker._evaluators:
                    self.metrics |= evaluator.of_round(round_.number)
                try:
                    yield round_
                finally:
                    round_.decline("nothing was submitted")
                    self.round = None
                self._enlist(policy, timeout)
        finally:
            if worker._loop.usable:
                worker._loop.tell(calls.RetireCalled())
        self.take(timeout)

    @property
    def completed(self) -> int:
        """Rounds of the cluster, as last heard of."""
        return self._worker._core.federation.completed

    def _enlist(self, policy: Policy, timeout: float | None) -> int:
        loop = self._worker._loop
        names = tuple(sorted(self._names))[:MAX_METRICS]
        completed: int = loop.result(loop.call(calls.EnlistCalled, policy, names), timeout)
        return completed

    def _next(self, examples: float, until: int | None, timeout: float | None) -> Round | None:
        loop = self._worker._loop
        while True:
            found = loop.result(loop.call(calls.NextCalled, until), timeout)
            if isinstance(found, calls.NoRound):
                return None
            self.take(timeout)
            if self._digest() == found.plan.model:
                self._mistaken = 0
                return Round(self, found.session, found.plan, examples)
            self._mistaken += 1
            self.decline(found.session, "the weights here are not those of the plan")
            if self._mistaken == MISTAKEN:
                raise ProtectionError(
                    f"{MISTAKEN} rounds in a row were announced with other weights than the servers have given",
                    cause="a server that does not keep to the protocol",
                    hint="shoal status; if it happens again, do not trust this cluster",
                )

    def submit(self, session: int, given: Input, timeout: float | None) -> Outcome:
        loop = self._worker._loop
        end: Over = loop.result(loop.call(calls.TrainedCalled, session, given), timeout)
        if end.result is None:
            why = end.error.what if end.error else ""
            logger.warning("%s", why)
            return Outcome(False, why=why)
        r = end.result
        return Outcome(True, r.survivors, dict(r.metrics), r.capped, r.clipped)

    def decline(self, session: int, why: str) -> None:
        if self._worker._loop.usable:
            self._worker._loop.tell(calls.DeclineCalled(session, why))

    def draw_back(self, mu: float) -> None:
        """As `Round.draw_back`."""
        given = self._worker.buffers.weights if mu else {}
        for name, array in self.arrays.items() if mu else ():
            gradient = getattr(array, "grad", None)
            if gradient is not None:
                weights = array.detach()
                gradient.add_(weights - given[name].to(weights.device), alpha=mu)

    # --- weights in, update out

    def take(self, timeout: float | None) -> None:
        """Bring the arrays to the servers' weights. Raises as `Worker.pull`."""
        exchange = self._worker._exchange
        exchange.be_exact()
        with exchange.fetched(None, timeout) as cache:
            for name, array in self.arrays.items():
                write(array, cache.values(name))

    def _digest(self) -> bytes:
        """Of the weights that were taken (SPEC §14.4)."""
        cache = self._worker._exchange.cache
        assert cache is not None
        shards = [blocks_digest(cache.view(block.index) for block in blocks) for blocks in cache.layout.by_shard]
        return model_digest(bytes.fromhex(cache.layout.digest), shards)

    def input(self, plan: Plan, weight: float, metrics: Mapping[str, float]) -> Input:
        """What was learned since `take`, for a round."""
        cache = self._worker._exchange.cache
        assert cache is not None
        if self._mine is None:
            self._mine = Cache(cache.layout)
        for name, array in self.arrays.items():
            self._mine.set(name, array)
        update, at = np.empty(plan.elements, np.float32), 0
        for block in (block for blocks in cache.layout.by_shard for block in blocks):
            new, old = (_floats(held, block) for held in (self._mine, cache))
            np.subtract(new, old, out=update[at : at + block.elements], casting="same_kind")
            at += block.elements
        said = self.metrics | dict(metrics)
        self._names.update(said)
        return Input(update, weight, {name: said.get(name, 0.0) for name in plan.metrics}, plan.model)


def _floating(model: torch.nn.Module) -> dict[str, Array]:
    """What of a module is averaged."""
    model = getattr(model, "_orig_mod", model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _floats(cache: Cache, block: Block) -> Bits:
    """A block's values, as float32 or float64."""
    values = np.frombuffer(cache.view(block.index), NUMBERS[cache.layout.flats[block.flat].dtype])
    if cache.layout.flats[block.flat].dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if values.dtype == np.float64 else values.astype(np.float32, copy=False)


NUMBERS: Mapping[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
}


def passes(trainer: Trainer, count: int, batches: Callable[[int], Iterator[Any]], examples: int) -> Iterator[Any]:
    """The batches of one local pass a round, until `count` rounds are complete; the update is put in after each.

    Args:
        batches: of the round of this number.
    """
    skip = trainer._worker._core.welcome is not None and trainer._worker._core.welcome.nonfinite == "skip"
    for round_ in trainer.rounds(float(examples), trainer.policy, (), count, None):
        for batch in batches(round_.number):
            if round_.over:
                break
            yield batch
        try:
            if not round_.over:
                round_.submit()
            else:
                logger.warning("a federated round ended while this worker trained for it")
        except RoundClosed as closed:
            logger.warning("%s", closed.what)
        except NonFiniteError:
            if not skip:
                raise
            trainer._worker._core.stats.skipped += 1
