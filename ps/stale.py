"""What a shard does about gradients that were computed on older weights (SPEC §13): a smaller learning rate, or compensation.

Rules
- A pushed gradient is never changed: it may lie in its worker's memory.
- What cannot be compensated, for want of the weights that it was computed on, is applied as it came, and counted.
- One backup a worker and block, of those counted in: at most one copy of the shard's weights for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import torch

from ..protocol.rules import RULES, Rule
from ..protocol.stale import Stale
from .rules import Ranges
from .store import Store

DECAY, EPSILON = 0.95, 1e-7
"""Of the mean square in the adaptive form: m and ε of Zheng et al. 2017, section 6."""
CHUNK = 16_384
"""Elements at a time: what is computed on the way stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class _Backup:
    """A block as it was from version `changed` on, and still was at `read`, when its worker read it."""

    changed: int
    read: int
    values: torch.Tensor


class Remedy:
    """The remedy that the model was registered with, for one shard's blocks."""

    def __init__(self, stale: Stale, rules: tuple[Rule, ...], store: Store) -> None:
        self._stale, self._rules, self._store = stale, rules, store
        self._backups: dict[int, dict[int, _Backup]] = {}
        self._mean_squares: dict[int, torch.Tensor] = {}
        self.uncompensated = 0
        """Stale gradients of whole blocks or ranges that were applied as they came."""

    # --- what was read

    @property
    def keeps(self) -> bool:
        """Does anybody need to know what is read?"""
        return self._stale.name == "compensate"

    def read(self, worker: int, blocks: Iterable[int]) -> None:
        """A worker that is counted in was answered with these blocks as they are now."""
        backups = self._backups.setdefault(worker, {})
        for block in blocks:
            if "lr" not in RULES[self._rule(block).name]:
                continue
            changed, before = self._store.version_of(block), backups.pop(block, None)
            if before is not None and before.changed == changed:
                values = before.values
            else:
                before = None  # nobody else may need it: its memory is free for the copy
                values = self._store.as_tensor(block, self._store.snapshot(block))
            backups[block] = _Backup(changed, self._store.version, values)

    def drop(self, worker: int) -> None:
        """A worker is not counted in any more."""
        self._backups.pop(worker, None)

    # --- what is pushed

    def numbers(self, block: int, numbers: tuple[float, ...], tau: int) -> tuple[float, ...]:
        """The rule's numbers for a gradient of staleness `tau`; empty for those of registration (Zhang et al. 2016, eq. 6)."""
        rule = self._rule(block)
        if self._stale.name != "scale" or tau < 2 or "lr" not in RULES[rule.name]:
            return numbers
        at, numbers = RULES[rule.name].index("lr"), numbers or rule.numbers
        return (*numbers[:at], numbers[at] / tau, *numbers[at + 1 :])

    def gradient(
        self, worker: int, block: int, gradient: torch.Tensor, ranges: Ranges | None, seen: int
    ) -> torch.Tensor:
        """The gradient to apply, of (part of) a block, computed on the weights of version `seen` (Zheng et al. 2017)."""
        rule = self._rule(block)
        if not self.keeps or "lr" not in RULES[rule.name]:
            return gradient
        backup = self._backups.get(worker, {}).get(block)
        if backup is None or not backup.changed <= seen <= backup.read:
            self.uncompensated += 1
            return gradient
        lam, adaptive = self._stale.numbers
        if backup.changed == self._store.version_of(block) and not adaptive:
            return gradient  # not stale
        if rule.named()["maximize"]:
            lam = -lam  # the loss is minus what is maximized, and so is its gradient
        weights = self._store.weights(block)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        found = torch.empty_like(gradient)
        at, total = 0, 0.0
        for start, stop in _chunks(ranges or ((0, weights.numel()),)):
            size = stop - start
            part = gradient[at : at + size].to(wide)
            moved = weights[start:stop].to(wide).sub(backup.values[start:stop]).mul_(part)
            if adaptive:
                square = self._mean_square(block, wide)[start:stop]
                square.mul_(DECAY).addcmul_(part, part, value=1 - DECAY)
                moved.div_((square + EPSILON).sqrt_())
            given = found[at : at + size].copy_(torch.addcmul(part, moved, part, value=lam))
            at, total = at + size, total + given.sum().item()
        if not isfinite(total):  # the product has left the dtype's range
            self.uncompensated += 1
            return gradient
        return found

    def _mean_square(self, block: int, dtype: torch.dtype) -> torch.Tensor:
        if block not in self._mean_squares:
            self._mean_squares[block] = torch.zeros(self._store.weights(block).numel(), dtype=dtype)
        return self._mean_squares[block]

    def _rule(self, block: int) -> Rule:
        return self._rules[self._store.group(block)]


def _chunks(ranges: Ranges) -> Iterator[tuple[int, int]]:
    for start, stop in ranges:
        for at in range(start, stop, CHUNK):
            yield at, min(at + CHUNK, stop)
