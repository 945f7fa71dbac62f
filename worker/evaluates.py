"""What a worker offers of held-out evaluation: `evaluation`, `evaluate`, `evaluations` (SPEC §17)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..protocol.errors import ConfigError
from .evaluate import Evaluation, Evaluator, Measure, evaluation_of, results

if TYPE_CHECKING:
    import torch

    from .client import Worker


class Evaluates:
    """A part of `Worker`."""

    _evaluators: list[Evaluator]
    _results: list[tuple[int, Evaluation]]
    """By number, as far as they were asked for."""

    def evaluation(
        self,
        data: Any,
        measure: Measure,
        *,
        model: torch.nn.Module | None = None,
        every: int = 100,
        batch_size: int = 256,
        name: str = "test",
    ) -> Evaluator:
        """From now on, evaluate on held-out data while training goes on; to be said once, by every worker, before `partition`.

        Args:
            data: as in `partition`, the same in every worker; in federated mode this owner's own.
            measure: called with the model (or the weights by name) and a batch; gives sums over the batch, by name.
            model: has the weights of the version while it measures, in `eval` mode and without gradients; None: arrays by name.
            every: so many clocks, or rounds.

        Raises:
            ConfigError: no data, or a number or a name that cannot be.
        """
        worker = cast("Worker", self)
        self._evaluators.append(Evaluator(worker, data, measure, model, every, batch_size, name))
        return self._evaluators[-1]

    def evaluate(
        self,
        data: Any,
        measure: Measure,
        *,
        model: torch.nn.Module | None = None,
        batch_size: int = 256,
        name: str = "test",
        timeout: float | None = None,
    ) -> Evaluation:
        """Evaluate the version of now, together with all workers that ask for it. Arguments as in `evaluation`.

        Raises:
            ConfigError: the cluster makes federated rounds. WaitTimeout: it is not done in time.
        """
        worker = cast("Worker", self)
        if worker.federated:
            raise ConfigError("in federated mode owners measure in rounds", hint="worker.evaluation(…) before them")
        number = Evaluator(worker, data, measure, model, 1, batch_size, name).now(timeout)
        results(worker, self._results, timeout)
        return evaluation_of(self._results, number, name)

    @property
    def evaluations(self) -> list[Evaluation]:
        """All results of the cluster so far, in order. Asks the coordinator."""
        results(cast("Worker", self), self._results, None)
        return [result for _, result in self._results]
