"""Update rules on a block, run by torch's own optimizers (SPEC §8).

Rules
- A block is one torch tensor with one optimizer, fused where torch offers it. While its numbers stay, and it is stepped as a
  whole, torch's kernel is called directly on the optimizer's state: for a small block the way there costs ten times the update.
- A push of part of a block must leave the rest as torch leaves a parameter whose `grad` is None: value, state and step
  count untouched. So a block begins as one segment, and is split where a push begins or ends inside one; each segment is
  a parameter of the block's optimizer, a view of the block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..protocol.rules import RULES, Rule

Ranges = Sequence[tuple[int, int]]
"""Elements `[start, stop)` of a block, ascending, not touching."""


def _betas(n: dict[str, float]) -> dict[str, Any]:
    return {"betas": (n.pop("beta1"), n.pop("beta2")), **n}


def _same(n: dict[str, float]) -> dict[str, Any]:
    return dict(n)


_TORCH: dict[str, tuple[type[torch.optim.Optimizer], Callable[[dict[str, float]], dict[str, Any]], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, _same, {"fused": True}),
    "adagrad": (torch.optim.Adagrad, _same, {"fused": True}),
    "rmsprop": (torch.optim.RMSprop, _same, {"foreach": False}),
    "adam": (torch.optim.Adam, _betas, {"fused": True}),
    "adamw": (torch.optim.AdamW, _betas, {"fused": True}),
}
_FLAGS = ("nesterov", "maximize", "centered", "amsgrad", "decoupled_weight_decay")


def torch_settings(rule: str, numbers: dict[str, float]) -> dict[str, Any]:
    """The keyword arguments that a torch optimizer takes for a rule's numbers."""
    settings = _TORCH[rule][1](dict(numbers))
    return {name: bool(value) if name in _FLAGS else value for name, value in settings.items()}


Kernel = Callable[[torch.Tensor], None]
"""One step of a whole block, given its gradient."""


def _kernel(rule: str, weights: torch.Tensor, state: dict[str, Any], settings: dict[str, Any]) -> Kernel | None:
    """What `torch.optim` calls when fused, with everything but the gradient bound; None where it is not fused.

    Args:
        state: the optimizer's, of `weights`, after a first step. settings: as `torch_settings` gives them.
    """
    n, w = dict(settings), [weights]
    if rule == "sgd":
        momenta = [state["momentum_buffer"]] if n["momentum"] else []
        return lambda gradient: torch._fused_sgd_(w, [gradient], momenta, is_first_step=False, **n)
    if rule not in ("adagrad", "adam", "adamw"):
        return None
    count = [state["step"]]
    fused: Callable[..., Any] = torch._fused_adagrad_
    if rule == "adagrad":
        del n["initial_accumulator_value"]
        lists = [[state["sum"]], count]
    else:
        n["beta1"], n["beta2"] = n.pop("betas")
        fused = torch._fused_adamw_ if n.pop("decoupled_weight_decay", rule == "adamw") else torch._fused_adam_
        largest = [state["max_exp_avg_sq"]] if n["amsgrad"] else []
        lists = [[state["exp_avg"]], [state["exp_avg_sq"]], largest, count]

    def step(gradient: torch.Tensor) -> None:
        torch._foreach_add_(count, 1)
        fused(w, [gradient], *lists, **n)

    return step


class Updater:
    """Applies one rule to one block.

    Args:
        weights: the block, one-dimensional and contiguous; changed in place.
    """

    def __init__(self, weights: torch.Tensor, rule: Rule) -> None:
        self._weights, self._rule = weights, rule
        self._numbers = rule.numbers
        self._starts = [0]
        self._segments = [weights]
        self._optimizer: torch.optim.Optimizer | None = None
        self._kernel: Kernel | None = None
        self._waiting: torch.Tensor | None = None
        self._waiters = 0
        """Of rule `fedbuff`: the weighted sum of what has come, and of how many."""
        if rule.name in _TORCH:
            make, _, fixed = _TORCH[rule.name]
            if self._loses:
                fixed = {"foreach": False}
            self._optimizer = make([weights], **torch_settings(rule.name, rule.named()), **fixed)

    @property
    def _loses(self) -> bool:
        """torch 2.13's fused SGD leaves float16 and bfloat16 weights as they are (pytorch/pytorch#191763)."""
        return self._rule.name == "sgd" and self._weights.element_size() == 2

    def apply(
        self, gradient: torch.Tensor, ranges: Ranges | None, numbers: tuple[float, ...], workers: int, tau: int = 0
    ) -> bool:
        """One step. True if it has changed the weights.

        Args:
            gradient: of the block's dtype; of its length, or with `ranges` of their total length.
            ranges: what part was pushed; None for the whole.
            numbers: the rule's numbers for this step; empty for those of registration.
            workers: how many are counted in (rule `mean` only).
            tau: updates of the block since what was pushed was computed on it (rule `fedbuff` only).
        """
        if self._rule.name == "fedbuff":
            return self._buffer(gradient, ranges, numbers or self._rule.numbers, tau)
        if self._optimizer is None:
            for target, given in self._parts(gradient, ranges):
                if self._rule.name == "delta":
                    target.add_(given)
                else:
                    target.lerp_(given, 1.0 / max(1, workers))
            return True
        self._set(numbers or self._rule.numbers)
        if ranges is None and len(self._segments) == 1:
            if self._kernel is not None:
                self._kernel(gradient)
                return True
            self._weights.grad = gradient
            self._optimizer.step()
            self._weights.grad = None
            settings = torch_settings(self._rule.name, self._named())
            self._kernel = (
                None
                if self._loses
                else _kernel(self._rule.name, self._weights, self._optimizer.state[self._weights], settings)
            )
            return True
        for start, stop in ranges or ((0, self._weights.numel()),):
            self._split(start)
            self._split(stop)
        at = 0
        for start, stop in ranges or ((0, self._weights.numel()),):
            for segment in self._segments[self._index(start) : self._index(stop)]:
                segment.grad = gradient[at : at + segment.numel()]
                at += segment.numel()
        self._optimizer.step()
        for segment in self._segments:
            segment.grad = None
        return True

    def _buffer(self, delta: torch.Tensor, ranges: Ranges | None, numbers: tuple[float, ...], tau: int) -> bool:
        """Nguyen et al. 2022, algorithm 1, with the weight of their §5: what is stale counts for less."""
        rate, size = numbers
        if self._waiting is None:
            self._waiting = torch.zeros(len(self._weights), dtype=torch.promote_types(delta.dtype, torch.float32))
        for target, given in self._parts(delta, ranges, self._waiting):
            target.add_(given, alpha=(1 + tau) ** -0.5)
        self._waiters += 1
        if self._waiters < size:
            return False
        self._weights.add_(self._waiting.mul_(rate / self._waiters).to(self._weights.dtype))
        self._waiting.zero_()
        self._waiters = 0
        return True

    def _parts(
        self, gradient: torch.Tensor, ranges: Ranges | None, targets: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        targets = self._weights if targets is None else targets
        if ranges is None:
            return [(targets, gradient)]
        parts, at = [], 0
        for start, stop in ranges:
            parts.append((targets[start:stop], gradient[at : at + stop - start]))
            at += stop - start
        return parts

    def _set(self, numbers: tuple[float, ...]) -> None:
        if numbers == self._numbers or self._optimizer is None:
            return
        self._numbers, self._kernel = numbers, None
        self._optimizer.param_groups[0].update(torch_settings(self._rule.name, self._named()))
        if (
            self._rule.name == "rmsprop" and self._named()["momentum"]
        ):  # torch makes this state in the first step or never
            for segment, state in self._optimizer.state.items():
                state.setdefault("momentum_buffer", torch.zeros_like(segment))

    def _named(self) -> dict[str, float]:
        return dict(zip(RULES[self._rule.name], self._numbers, strict=True))

    def _index(self, start: int) -> int:
        return bisect_left(self._starts, start)

    def _split(self, at: int) -> None:
        """Make a segment begin at element `at`."""
        index = self._index(at)
        if at >= self._weights.numel() or (index < len(self._starts) and self._starts[index] == at):
            return
        assert self._optimizer is not None
        whole = self._segments[index - 1]
        cut = at - self._starts[index - 1]
        halves = [whole[:cut], whole[cut:]]
        state = self._optimizer.state.pop(whole, None)
        if state is not None:
            for half, span in zip(halves, (slice(None, cut), slice(cut, None)), strict=True):
                self._optimizer.state[half] = {key: _narrow(key, value, span) for key, value in state.items()}
        if self._rule.name == "sgd":  # fused SGD cannot hold segments with and without a momentum in one list
            self._optimizer.param_groups[0].update(fused=False, foreach=False)
        self._segments[index - 1 : index] = halves
        self._starts.insert(index, at)
        self._optimizer.param_groups[0]["params"] = list(self._segments)


def _narrow(key: str, value: Any, span: slice) -> Any:
    """A part of an optimizer's state. `step` is a count, everything else has an entry an element or is no tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if key == "step" else value[span]
