"""SCAFFOLD: control variates against the drift of clients whose data differ (Karimireddy et al. 2020, algorithm 1, option II).

Rules
- The server's control is part of the model: tensors of its own, which rounds average as they average weights, under the same mask.
- A client's control is its own, in memory, and changes when the round that it was told of is complete.
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
        plain = type(optimizer) is torch.optim.SGD and all(not group["momentum"] for group in optimizer.param_groups)
        if not plain:
            raise ConfigError(
                "scaffold is for torch.optim.SGD without momentum", hint="scaffold=False, or that optimizer"
            )
        self._optimizer, self._params = optimizer, params
        self.server = {
            PREFIX + name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in params.items()
        }
        self._own = {name: torch.zeros_like(p) for name, p in params.items()}
        self._next: dict[str, torch.Tensor] = {}
        self._given: dict[str, torch.Tensor] = {}
        self._rates = 0.0

    @torch.no_grad()
    def begin(self) -> None:
        """The weights of a round are here, and the server's control."""
        self._given = {name: p.detach().clone() for name, p in self._params.items()}
        self._next.clear()
        self._rates = 0.0

    @torch.no_grad()
    def correct(self) -> None:
        """Before each step: what the others would have added to these gradients, less what this client always adds."""
        for name, p in self._params.items():
            if p.grad is not None:
                p.grad.add_(self.server[PREFIX + name]).sub_(self._own[name])
        self._rates += float(self._optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def conclude(self) -> None:
        """Training for the round is over: its tensors become what is submitted."""
        if not self._rates:
            return
        for name, p in self._params.items():
            server, own = self.server[PREFIX + name], self._own[name]
            self._next[name] = own - server + (self._given[name] - p) / self._rates
            server.add_(self._next[name] - own)

    def ended(self, applied: bool) -> None:
        """The round that was submitted is over."""
        if applied:
            self._own.update(self._next)
        self._next.clear()
