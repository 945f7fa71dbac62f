"""Weights that arrive while the user's loop prepares its next batch (DESIGN §8): `worker.optimizer(…, prefetch=True)`.

Rules
- `step` asks for them and goes on; they are put in place, all at once, just before the model is used again: when one of its modules
  is called, or its state is taken or set. Until then the model has the weights of before, whole.
- Who computes with parameters past all modules cannot be seen. It shows when the next step begins, and from then on weights are
  waited for again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from .loop import Ticket

if TYPE_CHECKING:
    import torch

    from .views import Views

logger = logging.getLogger("shoal")


class Ahead:
    """Of one model.

    Args:
        model: as the user calls it; if it is compiled, only its own call is seen, for what is inside is not Python any more.
        used: the tensors that are trained.
        ended: is told of each step's push once its weights are in place.
    """

    def __init__(
        self, model: torch.nn.Module, used: Collection[torch.Tensor], views: Views, ended: Callable[[Ticket], None]
    ) -> None:
        self._views, self._ended = views, ended
        self._ticket: Ticket | None = None
        self.on = True
        """Is anything asked for ahead?"""
        inside = () if hasattr(model, "_orig_mod") else model.modules()
        ids = {id(tensor) for tensor in used}
        owners = {model, *(m for m in inside if any(id(t) in ids for t in (*m.parameters(False), *m.buffers(False))))}
        whole = getattr(model, "_orig_mod", model)
        self._hooks: list[Any] = [module.register_forward_pre_hook(self._called) for module in owners]
        self._hooks.append(whole.register_state_dict_pre_hook(self._called))
        self._hooks.append(whole.register_load_state_dict_pre_hook(self._called))

    def look_at(self, views: Views) -> None:
        """The model lies in other memory now. Nothing may be under way."""
        self._views = views

    def _called(self, *_: Any) -> None:
        if self._ticket is not None:
            self.arrive()

    def ask(self, ticket: Ticket) -> None:
        """A step has been pushed with `ticket`: ask for the weights after it."""
        self._ticket = ticket
        self._views.ask()

    def arrive(self, timeout: float | None = None) -> None:
        """Put in place what was asked for, waiting for it if need be. Raises as `Worker.pull`."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._views.arrive(timeout)
            self._ended(ticket)

    def step_begins(self) -> None:
        """Gradients were made; by now the weights should be in place."""
        if self._ticket is None:
            return
        self.on = False
        logger.warning(
            "prefetch is off: the model was used without a call of its modules, and has computed with the weights before the newest"
        )
        self.arrive()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
