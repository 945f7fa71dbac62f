"""The coordinator's part in changing a run's mode (SPEC §6.5).

Rules
- A phase begins one clock after the highest that anybody has reached: what was read at that one was read in the phase before.
  While it is agreed on, shards apply no step that would go beyond.
- One change at a time: the next is refused until every shard has passed the last.
- What a shard knows of later phases counts for more than what a restarted coordinator was started with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from ..protocol.asking import Switch, Switched
from ..protocol.effects import Peer
from ..protocol.messages import Refused
from ..protocol.phases import MODES, Phases
from ..protocol.records import Phase
from .shards import Shards


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a change."""

    view: bool = False
    """The shards need a new view."""
    told: tuple[tuple[Peer, Switched | Refused], ...] = ()
    news: str = ""


NOTHING = Verdict()


class Modes:
    """The phases of a run, and the one that is being agreed on; a change that is not confirmed in `patience` seconds is off."""

    def __init__(self, mode: str, staleness: float, patience: float) -> None:
        self.phases: Phases = (Phase(0, mode, staleness),)
        self._patience = patience
        self._next: Phase | None = None
        self._asked_in, self._asked_at = 0, 0.0
        self._asking: dict[Peer, int] = {}
        """Who waits for the change, with the numbers of their requests."""

    @property
    def now(self) -> Phase:
        """The newest."""
        return self.phases[-1]

    @property
    def changing(self) -> bool:
        return self._next is not None

    def adopt(self, phases: Phases) -> bool:
        """A shard with a layout knows these. True if ours were others, and not newer: what was trained with counts."""
        known = bool(phases) and all(phase.mode in MODES for phase in phases)
        if not known or phases[-1].clock < self.now.clock or phases == self.phases:
            return False
        self.phases, self._next = phases, None
        return True

    def ask(self, peer: Peer, wanted: Switch, shards: Shards, epoch: int, now: float) -> Verdict:
        """Somebody wants another mode. If shards must be asked, they are in the view of `epoch`."""
        then, newest = Phase(0, wanted.mode, wanted.staleness), self.now
        if self._next is None and (newest.mode, newest.staleness) == (then.mode, then.staleness):
            return Verdict(told=((peer, _switched(wanted.request, newest)),))
        code, text = self._objection(then, shards)
        if code:
            return Verdict(told=((peer, Refused(wanted.request, code, text)),))
        if self._next is not None:
            self._asking[peer] = wanted.request
            return NOTHING
        if not shards.fixed:  # nothing was applied yet, or whoever knows of more has not come back yet
            self.phases = (then,)
            return Verdict(True, ((peer, _switched(wanted.request, then)),))
        self._next, self._asked_in, self._asked_at = then, epoch, now
        self._asking[peer] = wanted.request
        return Verdict(True)

    def _objection(self, then: Phase, shards: Shards) -> tuple[str, str]:
        """Code and text; empty if there is none."""
        if then.mode not in MODES:
            return "mode", f"there is no mode {then.mode!r}; it is one of {', '.join(MODES)}"
        if not _is_bound(then.staleness):
            return "mode", f"a staleness of {then.staleness:g}; it is 0, 1, 2, … or inf"
        if self._next not in (None, then):
            return "busy", "another change is under way"
        if shards.resuming:
            return "early", "the shards hold a model of before the coordinator's start; no worker has described it yet"
        if self._next is None and shards.fixed and self._unfinished(shards):
            return "early", self._not_over
        return "", ""

    def _unfinished(self, shards: Shards) -> bool:
        """Is somebody still in the phase before the newest? With a third, shards would forget it."""
        resting = self.now.mode == "federated" and not shards.counted  # what is done there waits for no clock
        return shards.floor < self.now.clock and not resting

    @property
    def _not_over(self) -> str:
        return f"the last change is not over: not everybody has reached clock {self.now.clock} yet"

    def agree(self, shards: Shards, idle: bool = True) -> Verdict:
        """The new phase has a clock now, if every shard of the layout has said how far it is and holds, and rounds are `idle`."""
        reached = shards.reached(self._asked_in) if self._next and idle else None
        if self._next is None or reached is None:
            return NOTHING
        if self._unfinished(
            shards
        ):  # when it was asked for, a shard that was started again did not know yet who is counted in
            return self._refuse("early", self._not_over)
        then = Phase(max(reached, self.now.clock) + 1, self._next.mode, self._next.staleness)
        self.phases, self._next = (self.now, then), None
        told = tuple((peer, _switched(request, then)) for peer, request in self._asking.items())
        self._asking.clear()
        bound = f", staleness {then.staleness:g}" if then.mode == "async" else ""
        return Verdict(True, told, f"mode {then.mode}{bound}, from clock {then.clock} on")

    def give_up(self, shards: Shards, now: float) -> Verdict:
        """A change that takes too long is off: a shard is dead, or silent."""
        if self._next is None or now - self._asked_at < self._patience:
            return NOTHING
        late = ", ".join(map(str, shards.unready(self._asked_in)))
        cause = f"shard {late} has not confirmed it in" if late else "a round was not over after"
        return self._refuse("busy", f"no change to {self._next.mode}: {cause} {self._patience:g} s")

    def _refuse(self, code: str, text: str) -> Verdict:
        self._next = None
        told = tuple((peer, Refused(request, code, text)) for peer, request in self._asking.items())
        self._asking.clear()
        return Verdict(True, told, text)


def _is_bound(staleness: float) -> bool:
    return staleness == inf or (staleness >= 0 and staleness == int(staleness))


def _switched(request: int, phase: Phase) -> Switched:
    return Switched(request, phase.clock, phase.mode, phase.staleness)
