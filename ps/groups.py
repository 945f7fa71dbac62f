"""Standing groups: who trains together, when rounds are of a part of those who are here (So et al. 2023).

Sums of ever other parts, taken together, are equations for single updates: after about as many rounds as there are clients they can
be solved. Sums over groups that stay the same say the same again.

Rules
- A group has at least the wanted size and less than twice that: it is split when it grows, and put to another when it shrinks.
- Whoever comes back comes back to its group. Whoever is new goes to the smallest.
- Groups take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field


@dataclass(slots=True)
class Groups:
    """The groups of one coordinator.

    Args:
        size: the fewest of a group. below: a uniform number from 0 up to its argument, without it.
    """

    size: int
    below: Callable[[int], int]
    _groups: list[list[str]] = field(default_factory=list)
    """In the order of their turns."""

    def draw(self, here: Collection[str]) -> list[str]:
        """Those of the next group that are here: so many as its size at least, or all who are here."""
        known = {name for group in self._groups for name in group}
        for name in sorted(set(here) - known):
            if not self._groups:
                self._groups.append([])
            min(self._groups, key=len).append(name)
        self._merge(here)
        self._split(here)
        group = self._groups.pop(0)
        self._groups.append(group)
        return [name for name in group if name in here]

    def _merge(self, here: Collection[str]) -> None:
        """No group has too few who are here."""
        while len(self._groups) > 1:
            small = min(self._groups, key=lambda group: _present(group, here))
            if _present(small, here) >= self.size:
                return
            self._groups.remove(small)
            min(self._groups, key=lambda group: _present(group, here)).extend(small)

    def _split(self, here: Collection[str]) -> None:
        """No group has so many who are here that they could be two."""
        done: list[list[str]] = []
        for group in self._groups:
            present = [name for name in group if name in here]
            if len(present) < 2 * self.size:
                done.append(group)
                continue
            for place in range(len(present)):
                drawn = place + self.below(len(present) - place)
                present[place], present[drawn] = present[drawn], present[place]
            count = len(present) // self.size
            parts = [present[number::count] for number in range(count)]
            parts[0].extend(name for name in group if name not in here)
            done.extend(parts)
        self._groups = done


def _present(group: list[str], here: Collection[str]) -> int:
    return sum(name in here for name in group)
