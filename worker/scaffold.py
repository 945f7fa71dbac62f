"""SCAFFOLD: control variates against the drift of clients whose data differ (Karimireddy et al. 2020, algorithm 1, option II).

Rules
- The server's control is part of the model: tensors of its own, which rounds average as they average weights, under the same mask.
- A client's control is its own, in memory and in the optimizer's state_dict, and changes when the round that it was told of is
  complete.
- The server's control must stay the mean of the clients', or rounds end beside the optimum for ever. So a client's control
  changes by what was put in, as the round's clip leaves it, and not by what it would have liked to put in.
- It holds for plain SGD, whose steps are the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..protocol.errors import ConfigError

PREFIX = "scaffold."


class Scaffold:
    """One client's.

    Args:
        params: what is trained, by name.

    Attributes:
        server: the server's control, by registered name; rounds bring it up to date.

    Raises:
        ConfigError: the optimizer is not plain SGD.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: Mapping[str, torch.Tensor]) -> None:
        plain = type(optimizer) is torch.optim.SGD and not any(
            group["momentum"] or group["maximize"] for group in optimizer.param_groups
        )
        if not plain:
            raise ConfigError(
                "scaffold is for torch.optim.SGD without momentum that minimizes",
                hint="scaffold=False, or that optimizer",
            )
        self._params = params
        places = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._groups = {name: places[id(p)] for name, p in params.items()}
        self.server = {
            PREFIX + name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in params.items()
        }
        self._own = {name: torch.zeros_like(p) for name, p in params.items()}
        self._next: dict[str, torch.Tensor] = {}
        self._given: dict[str, torch.Tensor] = {}
        self._rates: dict[str, float] = {}
        """By name, the sum of the learning rates of the steps that were taken: only what had a gradient was moved."""
        self._clip = 0.0

    @torch.no_grad()
    def begin(self, clip: float) -> None:
        """The weights of a round are here, and the server's control.

        Args:
            clip: the round's: no element that is put in is farther from 0.
        """
        self._given = {name: p.detach().clone() for name, p in self._params.items()}
        self._next.clear()
        self._rates.clear()
        self._clip = clip

    @torch.no_grad()
    def correct(self) -> None:
        """Before each step: what the others would have added to these gradients, less what this client always adds."""
        for name, p in self._params.items():
            if p.grad is not None:
                p.grad.add_(self.server[PREFIX + name]).sub_(self._own[name])
                self._rates[name] = self._rates.get(name, 0.0) + float(self._groups[name]["lr"])

    @torch.no_grad()
    def conclude(self) -> None:
        """Training for the round is over: its tensors become what is submitted."""
        for name, rate in self._rates.items():
            if not rate:
                continue
            server, own = self.server[PREFIX + name], self._own[name]
            change = ((self._given[name] - self._params[name]) / rate - server).clamp_(-self._clip, self._clip)
            self._next[name] = own + change
            server.add_(change)
        self._rates.clear()

    def ended(self, applied: bool) -> None:
        """The round that was submitted is over."""
        if applied:
            self._own.update(self._next)
        self._next.clear()

    @property
    def own(self) -> dict[str, torch.Tensor]:
        """This client's control, copied."""
        return {name: control.clone() for name, control in self._own.items()}

    @torch.no_grad()
    def restore(self, own: Mapping[str, torch.Tensor]) -> None:
        """What `own` gave to an earlier process of the same client.

        Raises:
            ConfigError: it is of other parameters.
        """
        if {name: p.shape for name, p in self._params.items()} != {name: c.shape for name, c in own.items()}:
            raise ConfigError(
                "the scaffold control is not of this model's parameters", hint="load_state_dict of its own"
            )
        for name, control in own.items():
            self._own[name].copy_(control)
