"""Server optimizers: what a shard does with the average of a round's updates (Reddi et al. 2021, algorithm 2).

Rules
- The average is taken for a step uphill: weights move along it, by its history.
- Its state is the federation's own: the optimizer of the other modes keeps its own, and finds it again.
- Moments are float32 whatever the weights are. There is no correction of bias, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..protocol.federated import ServerRule


@dataclass(slots=True)
class _State:
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None


@dataclass(slots=True)
class FedOpt:
    """One shard's, for one rule."""

    rule: ServerRule
    _states: dict[int, _State] = field(default_factory=dict)

    def change(self, block: int, average: torch.Tensor) -> torch.Tensor:
        """What to add to a block's weights.

        Args:
            average: float32; not kept, but may be returned.
        """
        n, name = self.rule.named, self.rule.name
        if name == "fedavg":
            return average if n["lr"] == 1.0 else average * n["lr"]
        state = self._states.setdefault(block, _State())
        if name == "fedavgm":
            first = state.first = (
                average.clone() if state.first is None else state.first.mul_(n["momentum"]).add_(average)
            )
            return first * n["lr"]
        if state.first is None or state.second is None:
            state.first = torch.zeros_like(average)
            state.second = torch.full_like(average, n["tau"] ** 2)  # as in the paper: v_-1 >= tau^2
        first, second = state.first, state.second
        first.mul_(n["beta1"]).add_(average, alpha=1 - n["beta1"])
        square = average * average
        if name == "fedadagrad":
            second.add_(square)
        elif name == "fedadam":
            second.mul_(n["beta2"]).add_(square, alpha=1 - n["beta2"])
        else:
            second.sub_((1 - n["beta2"]) * square * torch.sign(second - square))
        return first * n["lr"] / (second.sqrt() + n["tau"])

    @property
    def nbytes(self) -> int:
        """Of the moments."""
        held = [
            tensor for state in self._states.values() for tensor in (state.first, state.second) if tensor is not None
        ]
        return sum(tensor.nbytes for tensor in held)
