"""What rounds have told about any one client so far, as epsilon and delta (SPEC §14.11). The accountant is Google's dp-accounting.

Rules
- A round counts as soon as its sum may have been seen, whether or not it was applied.
- A round that would go beyond the budget is not begun.
- Of who is drawn for a round the servers know, so being drawn hides nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..protocol.federated import NOISE
from ..protocol.join import SECAGG
from ..protocol.secure.plan import Plan
from ..protocol.secure.privacy import renyi

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Of the Renyi divergences that are added up (Mironov 2017)."""


class Ledger:
    """Of one run.

    Args:
        budget: the largest epsilon, or 0 for any. delta: for which it is.

    Attributes:
        rounds: that have been counted.
    """

    def __init__(self, budget: float, delta: float) -> None:
        self.budget, self.delta, self.rounds = budget, delta, 0
        self._spent = [0.0] * len(ORDERS)

    @property
    def epsilon(self) -> float:
        """So far."""
        return self._epsilon(self._spent) if self.rounds else 0.0

    def after(self, plan: Plan) -> float:
        """Epsilon, if a round like this were made."""
        return self._epsilon(self._with(plan))

    def allows(self, plan: Plan) -> bool:
        """Is that within the budget?"""
        return not self.budget or self.after(plan) <= self.budget

    def count(self, plan: Plan) -> None:
        """Such a round was made."""
        self._spent = self._with(plan)
        self.rounds += 1

    def catch_up(self, rounds: int, plan: Plan) -> None:
        """So many were made, some of them before a restart: those count like this one."""
        while self.rounds < rounds:
            self.count(plan)

    def _with(self, plan: Plan) -> list[float]:
        return [before + more for before, more in zip(self._spent, divergences(plan), strict=True)]

    def _epsilon(self, spent: Sequence[float]) -> float:
        from dp_accounting import rdp

        return float(rdp.compute_epsilon(ORDERS, spent, self.delta)[0])


def divergences(plan: Plan) -> list[float]:
    """Of one round, by order.

    Raises:
        ValueError: the plan has no noise.
    """
    if plan.protection == SECAGG and plan.noise is not None:
        return renyi(ORDERS, plan.noise, plan.elements)
    multiplier = float(dict(plan.training).get(NOISE, 0.0))
    if not multiplier:
        raise ValueError("a round without noise tells everything")
    return [order / (2 * multiplier**2) for order in ORDERS]  # the Gaussian mechanism (Mironov 2017, table II)
