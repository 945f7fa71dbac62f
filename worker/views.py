"""A torch model on shoal's own memory: parameters that are views of what was pulled, gradients that are views of what is pushed.

Rules
- A parameter stays the user's: whoever replaces its data, moves it or changes it in place gets the servers' weights with the next
  pull as before; from then on they are copied there.
- A gradient is moved to where it is pushed from while it is warm: when backward has made it.
- What lies on an accelerator stays there. Its gradients are copied while backward goes on, and count if nobody has changed them
  since; its weights are copied while the loop goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from .arrays import Array
from .devices import Lanes, lanes_for
from .early import Early

if TYPE_CHECKING:
    from .client import Worker


class Views:
    """The tensors of one optimizer.

    Args:
        viewed: parameters that become views. copied: tensors that pulls are copied to. Both by name, all registered.
        overlap: do gradients leave while backward runs?
    """

    def __init__(
        self, worker: Worker, viewed: Mapping[str, torch.Tensor], copied: Mapping[str, torch.Tensor], overlap: bool
    ) -> None:
        self._worker = worker
        exchange = worker._exchange
        assert exchange.cache is not None
        self._early = Early(exchange.cache.layout, exchange.remote) if overlap and viewed and exchange.remote else None
        self._targets = [*viewed.items(), *copied.items()]
        self._devices = {device: lanes_for(device) for device in {target.device for _, target in self._targets}}
        afar = {name: t for name, t in viewed.items() if self._devices[t.device] is not None}
        self._taken: dict[str, tuple[torch.Tensor, int]] = {}
        """By name, which gradient of an accelerator was copied, and its version then."""
        self._viewed = {
            name: t for name, t in viewed.items() if name not in afar and t.device.type == "cpu" and t.is_contiguous()
        }
        self._at: dict[str, int] = {}
        """Where each viewed parameter's data were when it was last seen, and are unless somebody has replaced them."""
        self._versions: dict[str, int] = {}
        self._lent: Mapping[str, Array] = {}
        self._hooks = [_when_made(t, self._hook(name)) for name, t in self._viewed.items()]
        self._hooks += [_when_made(t, self._hook_afar(name)) for name, t in afar.items()]
        weights = worker.buffers.weights
        for name, target in self._viewed.items():
            self._view(name, target, weights[name])

    # --- weights

    def pull(self) -> None:
        """Take the newest weights that the staleness rule allows. Raises as `Worker.pull`."""
        self._look_for_changes()
        self._settle()
        with torch.no_grad(), self._worker._exchange.fetched(None, None):
            self._show()

    def ask(self) -> None:
        """Ask for them, and go on."""
        self._settle()
        self._worker._exchange.prefetch()

    def arrive(self, timeout: float | None) -> None:
        """Put in place what was asked for. Raises as `Worker.pull`."""
        self._look_for_changes()
        self._worker._exchange.arrive(timeout)
        with torch.no_grad():
            self._show()

    def _look_for_changes(self) -> None:
        if any(self._viewed[name]._version != version for name, version in self._versions.items()):
            cache = self._worker._exchange.cache
            assert cache is not None
            cache.held.clear()  # changed in place by somebody: also what has not changed on the servers is wanted

    def _lanes(self) -> Iterator[Lanes]:
        return (lanes for lanes in self._devices.values() if lanes is not None)

    def _settle(self) -> None:
        """What was brought to an accelerator has been read: the cache may be written."""
        for lanes in self._lanes():
            lanes.settle()

    def _show(self) -> None:
        """Let the parameters be what the cache holds."""
        weights, cache = self._worker.buffers.weights, self._worker._exchange.cache
        assert cache is not None
        for lanes in self._lanes():
            lanes.lock(cache.memory)
        for name, target in self._targets:
            view, afar = weights[name], self._devices.get(target.device)
            if afar is not None:
                afar.bring(view, target)
                continue
            here = target.data_ptr()
            if here == view.data_ptr():
                continue
            if here == self._at.get(name):  # it is the cache that has moved
                self._view(name, target, view)
            else:
                target.copy_(view)
        for name in self._versions:
            self._versions[name] = self._viewed[name]._version

    def _view(self, name: str, target: torch.Tensor, view: torch.Tensor) -> None:
        target.data = view
        self._at[name], self._versions[name] = target.data_ptr(), target._version

    def part(self) -> None:
        """The worker is closed: the model's memory is its own again."""
        self._settle()
        for lanes in self._lanes():
            lanes.arrive()
        for hook in self._hooks:
            hook.remove()
        for name, target in self._viewed.items():
            if target.data_ptr() == self._at[name]:
                target.data = target.data.clone()
            gradient = target.grad
            if gradient is not None and name in self._lent and gradient is self._lent[name]:
                target.grad = gradient.clone()
        self._lent = {}

    # --- gradients

    def _hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def accumulated(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None or gradient.layout is not torch.strided or gradient.device.type != "cpu":
                return
            view = self._where(name)
            if gradient is not view:
                view.copy_(gradient)
                parameter.grad = view
            self._leave(name)

        return accumulated

    def _hook_afar(self, name: str) -> Callable[[torch.Tensor], None]:
        def accumulated(parameter: torch.Tensor) -> None:
            gradient, lanes = parameter.grad, self._devices.get(parameter.device)
            if gradient is None or gradient.layout is not torch.strided or lanes is None:
                return
            view, lent = self._where(name), self._worker._exchange.lent
            if lent is not None:
                lanes.lock(lent.memory)
            lanes.take(name, gradient, view)
            self._taken[name] = gradient, gradient._version
            for arrived in lanes.taken():
                self._leave(arrived)

        return accumulated

    def _where(self, name: str) -> torch.Tensor:
        if not self._lent:
            self._lent = self._worker.buffers.gradients
            if self._early is not None:
                self._early.begin()
        view: torch.Tensor = self._lent[name]
        return view

    def _leave(self, name: str) -> None:
        """A tensor's gradient is made: what is whole with it can go."""
        exchange = self._worker._exchange
        if self._early is not None and exchange.lent is not None:
            blocks = list(self._early.made(name, exchange.lent))
            if blocks:
                exchange.send_early(blocks)

    def left_early(self, pushed: Mapping[str, Array]) -> bool:
        """Is what has left early of these gradients what they are now?"""
        exchange = self._worker._exchange
        if self._early is None or exchange.lent is None:
            return False
        return self._early.unchanged(exchange.lent if pushed is exchange.lent.views else None)

    def gradients(self) -> Mapping[str, Array]:
        """What is to be pushed: the lent arrays themselves if every gradient lies there. They are the push's now."""
        lent, self._lent = self._lent, {}
        for lanes in self._lanes():
            lanes.arrive()
        found = {name: target.grad for name, target in self._targets if target.grad is not None}
        for name, (gradient, version) in self._taken.items():
            if found.get(name) is gradient and gradient._version == version:
                found[name] = lent[name]
        self._taken.clear()
        if len(found) == len(lent) and all(found[name] is view for name, view in lent.items()):
            return lent
        return found


def _when_made(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> Any:
    """Call `hook` when backward has made the parameter's gradient. Returns a handle."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
