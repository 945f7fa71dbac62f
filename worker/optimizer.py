"""The torch optimizer that pushes: `worker.optimizer(opt, model)` (DESIGN §8). The one place of the library that imports
torch by itself.

Rules
- It is a real `torch.optim.Optimizer`: hooks, schedulers, `param_groups` and GradScaler find what they expect.
- Whitelisted optimizers run on the shards, by name and numbers; the groups' numbers of the moment travel with each push.
- Any other runs here, and what it changed is pushed as a delta.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..protocol.errors import ConfigError, ServerLost, WorkerEvicted
from ..protocol.federated import PROX
from ..protocol.rules import FLAGS, RULES, Rule
from ..protocol.stale import Stale
from .ahead import Ahead
from .arrays import Array
from .loop import Ticket
from .rounds import Round
from .scaffold import Scaffold
from .views import Views

if TYPE_CHECKING:
    from .client import Worker

logger = logging.getLogger("shoal")

_ON_SHARDS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adagrad: "adagrad",
    torch.optim.RMSprop: "rmsprop",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}
_BUFFERS = ("local", "mean")


class Optimizer(torch.optim.Optimizer):
    """Wraps `optimizer`; made by `Worker.optimizer`.

    Buffers (BatchNorm statistics): with `local`, each worker keeps its own; with `mean`, each step pushes this worker's and
    takes the mean over the workers. Integer buffers are always local.
    """

    # GradScaler then calls `step` always, and says in `found_inf` whether the step is to be skipped.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        worker: Worker,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        buffers: str,
        overlap: bool,
        prefetch: bool,
        stale: Stale,
        scaffold: bool,
    ) -> None:
        if isinstance(optimizer, Optimizer):
            raise ConfigError("this optimizer is wrapped already")
        if buffers not in _BUFFERS:
            raise ConfigError(f"buffers is {buffers!r}", hint=f"one of {', '.join(_BUFFERS)}")
        called, model = model, getattr(model, "_orig_mod", model)
        self._ready = False
        self._ahead: Ahead | None = None
        self._views: Views | None = None
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._worker, self._inner, self._overlap = worker, optimizer, overlap
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._params = _named(optimizer, model)
        self._averaged = {n: b for n, b in model.named_buffers() if b.is_floating_point()} if buffers == "mean" else {}
        self._scaffold = Scaffold(optimizer, self._params) if scaffold else None
        rule = _ON_SHARDS.get(type(optimizer))
        self._rules = tuple(Rule(rule, _numbers(rule, group)) for group in self.param_groups) if rule else ()
        if rule is None:
            logger.warning(
                "%s is not one of the optimizers that run on the servers (%s): it runs here, and its weight deltas are pushed",
                type(optimizer).__name__,
                ", ".join(kind.__name__ for kind in _ON_SHARDS),
            )
        elif self.state:
            logger.warning(
                "the state that %s has gathered stays here; the servers begin with fresh state",
                type(optimizer).__name__,
            )
        self._register(stale)
        if prefetch:
            self._ahead = Ahead(called, self._all().values(), self._seen(), self._ended)
            self._worker._arrivers.append(self._ahead.arrive)
            self._worker._closers.append(self._ahead.close)
        self._ready = True

    def _register(self, stale: Stale) -> None:
        groups = {name: number for number, group in enumerate(self.param_groups) for name in self._names_of(group)}
        arrays: dict[str, tuple[Array, int]] = {name: (self._params[name], groups[name]) for name in groups}
        rules = self._rules or tuple(Rule("delta") for _ in self.param_groups)
        controls = self._scaffold.server if self._scaffold else {}
        if self._averaged or controls:
            arrays |= {name: (tensor, len(rules)) for name, tensor in (self._averaged | controls).items()}
            rules = (*rules, Rule("mean"))
        self._worker._register(arrays, rules, None, stale)
        trainer = self._worker._trainer
        trainer.arrays, trainer.beside = self._all() | controls, controls
        trainer.begins.append(self._round_begins)
        if self._scaffold is not None:
            trainer.submits.append(self._scaffold.conclude)
            trainer.ends.append(self._scaffold.ended)
        self._worker._closers.append(self._part)
        self._worker._refreshers.append(self._refresh)
        self._refresh()

    def _seen(self) -> Views:
        """The model on shoal's memory: while nothing is trained here."""
        if self._views is None:
            # Only where nobody steps here: a delta is told from what was pulled, and buffers change in forward passes.
            self._views = Views(
                self._worker,
                self._params if self._rules else {},
                self._averaged if self._rules else self._all(),
                self._overlap and not self._averaged,
            )
            if self._ahead is not None:
                self._ahead.look_at(self._views)
        return self._views

    def _part(self) -> None:
        """The model on its own memory."""
        if self._ahead is not None:
            self._ahead.arrive()
        if self._views is not None:
            self._views.part()
            self._views = None

    def _names_of(self, group: dict[str, Any]) -> Iterator[str]:
        names = {id(parameter): name for name, parameter in self._params.items()}
        return (names[id(parameter)] for parameter in group["params"])

    # --- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Push the gradients, end the step, take weights within the staleness bound.

        Raises:
            NonFiniteError: a gradient holds NaN or infinity and the server's policy is `error`; nothing was sent.
            ServerLost, WaitTimeout: as `Worker.pull`.
            ConfigError: in federated mode, outside of a round.
        """
        if self._worker.federated:
            return self._local(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._ahead is not None:
            self._ahead.step_begins()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf):
            self._worker.clock(examples=0)
            self._refresh()
            return loss
        pushed = self._gradients() if self._rules else self._deltas()
        early = self._seen().left_early(pushed)
        ticket = self._worker._push(pushed, advance=True, examples=None, hyper=self._hyper(), timeout=None, early=early)
        if self._ahead is not None and self._ahead.on:
            self._ahead.ask(ticket)
        else:
            self._seen().pull()
            self._ended(ticket)
        return loss

    @staticmethod
    def _ended(ticket: Ticket) -> None:
        try:
            ticket.result()
        except (WorkerEvicted, ServerLost) as error:
            logger.warning("a step was lost: %s", error.what)

    def _all(self) -> dict[str, torch.Tensor]:
        return {**self._params, **self._averaged}

    def _gradients(self) -> Mapping[str, Array]:
        scale = getattr(self, "grad_scale", None)
        if scale is None and not self._averaged:
            return self._seen().gradients()
        found = {name: p.grad for name, p in self._params.items() if p.grad is not None}
        if scale is not None:
            found = {name: gradient / scale for name, gradient in found.items()}
        return found | self._averaged

    def _deltas(self) -> dict[str, Array]:
        """Let the optimizer step here; what it changed, against the weights that were pulled last."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for parameter in self._params.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        before = self._worker.buffers.weights
        self._inner.step()
        return {name: p.detach() - before[name].to(p.device) for name, p in self._params.items()} | self._averaged

    def _hyper(self) -> tuple[tuple[float, ...], ...]:
        """The groups' numbers of the moment; empty if they are those of registration."""
        if not self._rules:
            return ()
        now = tuple(_numbers(rule.name, group) for rule, group in zip(self._rules, self.param_groups, strict=True))
        if all(numbers == rule.numbers for numbers, rule in zip(now, self._rules, strict=True)):
            return ()
        for index, (numbers, rule) in enumerate(zip(now, self._rules, strict=True)):
            if not rule.accepts(numbers):
                raise ConfigError(
                    f"group {index} of {rule.name} has {numbers}: numbers must be finite, and flags stay as registered"
                )
        return (*now, ()) if self._averaged or self._scaffold else now

    def _refresh(self) -> None:
        """Take the newest weights that the staleness rule allows."""
        if self._ahead is not None:
            self._ahead.arrive()
        if self._worker.federated:
            self._part()
            return self._worker._trainer.take(None)
        self._seen().pull()

    # --- federated rounds

    def _round_begins(self, round_: Round) -> None:
        self._part()
        self._inner.state.clear()  # momenta of other weights
        if self._scaffold is not None:
            if round_.private:
                raise ConfigError(
                    "scaffold's controls would be cut and made noisy with the weights: this round has --noise",
                    hint="scaffold=False, or rounds without --noise",
                )
            self._scaffold.begin(round_.clip)

    def _local(self, closure: Callable[[], float] | None) -> float | None:
        """A step of the user's own optimizer, between the weights of a round and its update."""
        round_ = self._worker._trainer.round
        if round_ is None:
            raise ConfigError(
                "in federated mode a step belongs to a round, and none is trained for",
                cause="opt.step() outside of worker.partition(…) and worker.rounds(…)",
                hint="for x, y in worker.partition(data, batch_size=…): …",
            )
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return None
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for parameter in self._params.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        if closure is not None and (self._scaffold is not None or round_.settings.get(PROX)):
            raise ConfigError(
                "a closure makes its own gradients, and prox and scaffold change them", hint="opt.step() without"
            )
        round_.draw_back()
        if self._scaffold is not None:
            self._scaffold.correct()
        return self._inner.step(closure)

    # --- being an optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while wrapping: the model's layout over the shards is fixed."""
        if getattr(self, "_ready", False):
            raise ConfigError(
                "a parameter group cannot be added after wrapping",
                hint="add it to the optimizer before worker.optimizer(…)",
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with this worker's clock and scaffold control under `shoal`.

        What the shards hold (momenta and the like) is not in it.
        """
        own = {"scaffold": self._scaffold.own} if self._scaffold is not None else {}
        return super().state_dict() | {"shoal": {"clock": self._worker.stats.clock, **own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hyperparameters, for an optimizer that runs here its state, and the scaffold control if there is one.

        Raises:
            ConfigError: the scaffold control is of other parameters.
        """
        own = state_dict.get("shoal", {}).get("scaffold")
        if self._scaffold is not None and own is not None:
            self._scaffold.restore(own)
        state = {key: value for key, value in state_dict.items() if key != "shoal"}
        if self._rules and state.get("state"):
            logger.warning("optimizer state is not loaded: it lives on the servers; hyperparameters are")
            state["state"] = {}
        super().load_state_dict(state)
        self._inner.param_groups, self._inner.state = self.param_groups, self.state

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ConfigError("an optimizer that is connected to servers cannot be copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise ConfigError("an optimizer that is connected to servers cannot be pickled", hint="state_dict()")


def _named(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters by their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, torch.nn.Parameter] = {}
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise ConfigError(
                    f"parameter {place} of the optimizer's group {index} is not in the model",
                    hint="pass the model whose parameters the optimizer was made with",
                )
            found[names[id(parameter)]] = parameter
    return found


def _numbers(rule: str, group: dict[str, Any]) -> tuple[float, ...]:
    """A parameter group's numbers in the order of the rule's."""
    values = dict(group)
    if "betas" in values:
        values["beta1"], values["beta2"] = values["betas"]
    with contextlib.suppress(KeyError):
        return tuple(float(bool(values[name])) if name in FLAGS else float(values[name]) for name in RULES[rule])
    missing = [name for name in RULES[rule] if name not in values]
    # Older torch lacks the newest flags; absent means off.
    return tuple(0.0 if name in missing else float(values[name]) for name in RULES[rule])
