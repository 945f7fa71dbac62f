"""Which mode a step is made in: the mode of a run may change at a clock (SPEC §6.5).

Rules
- Phases are in the order of their clocks, each a mode of its own; the first has no phase before it.
- A step is made in the phase of its clock, whoever makes it and whenever it arrives.
"""

from __future__ import annotations

from math import inf

from .records import Phase

Phases = tuple[Phase, ...]
MODES = ("async", "sync", "federated")


def at(phases: Phases, clock: int) -> Phase:
    """The phase of a step."""
    for phase in reversed(phases):
        if phase.clock <= clock:
            return phase
    return phases[0]


def floor(phases: Phases) -> int:
    """The least clock to enter at: rounds have no steps, so whoever comes from there begins with the next phase."""
    return phases[-1].clock if any(phase.mode == "federated" for phase in phases) else 0


def opens(phases: Phases, clock: int) -> int:
    """The least clock of all at which steps of `clock` may begin: averages of the phase before are closed first."""
    if len(phases) == 1:
        return 0
    phase = at(phases, clock)
    before = phases[max(0, phases.index(phase) - 1)]
    return phase.clock if phase is not before and before.mode == "sync" else 0


def closed(phases: Phases, step: int) -> int:
    """Below which clock steps that are averaged are in the weights of a shard whose open step is `step`. What was averaged before
    the phases that are known is."""
    averaged = [n for n, phase in enumerate(phases) if phase.mode == "sync"]
    if not averaged:
        return phases[0].clock if phases else 0
    last = averaged[-1] + 1
    step = max(step, phases[averaged[0]].clock)
    return min(step, phases[last].clock) if last < len(phases) else step


def needed(phases: Phases, clock: int) -> float:
    """The least clock of all at which a pull at `clock` may be answered: the staleness rule (SPEC §6.2)."""
    phase = at(phases, clock)
    bound = {"sync": 0.0, "federated": inf}.get(phase.mode, phase.staleness)
    return max(-inf if bound == inf else clock - bound, opens(phases, clock))
