"""Federated rounds in a coordinator's life (SPEC §14.9): who takes part, when the first may begin, what everybody is told.

Rules
- A worker takes part because it has said so, and until it says otherwise.
- Rounds begin when nobody is counted in at any shard: then the weights are one model, and nobody changes it.
- Nothing of this is kept when the mode changes but how many rounds are complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..protocol.effects import Log, Received, Tick
from ..protocol.federated import SUM
from ..protocol.layout import Layout
from ..protocol.messages import Message
from ..protocol.rounds import Enlist, Progress
from .evaluations import Evaluations
from .recipe import Recipe
from .round import Say
from .rounds import Concluded, Go, Hold, Placed, Rounds, RoundsEffect, RoundsEvent, Unplaced, Workers
from .shards import Shards
from .switch import Modes


@dataclass(slots=True)
class Enlisted:
    """A worker that takes part."""

    name: str
    metrics: tuple[str, ...]


class Federation:
    """
    Args:
        run, recipe, below, peers: as `Rounds`. least: so many take part before the first round begins.
        evaluations: take what clients have measured on held-out data.

    Attributes:
        rounds: the machine. last: the newest end of a session. abandoned: how many had none.
        said: metrics of the last round, averaged over those who were in it.
    """

    def __init__(
        self,
        run: int,
        recipe: Recipe,
        below: Callable[[int], int],
        least: int,
        peers: Mapping[str, bytes] | None = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        self.evaluations = evaluations or Evaluations()
        self.rounds = Rounds(run, recipe, below, peers)
        self._told: tuple[RoundsEvent, ...] = ()
        """What it was last told of the shards and of the mode."""
        self.last: Concluded | None = None
        self.abandoned = 0
        self.said: dict[str, float] = {}
        self._least = least
        self._sizes: tuple[int, ...] = ()
        self._digest = b""
        self._enlisted: dict[int, Enlisted] = {}
        self._workers: Workers | None = None
        """As `rounds` was told of them; None if that is not so any more."""
        self._asked: dict[int, bool] = {}
        """Who is to be told how far the rounds are, and what it has said."""
        self._since: int | None = None
        """The clock of the phase in which rounds have begun."""
        self._why = "workers"
        self._out: list[Say | Log] = []

    @property
    def wake_at(self) -> float:
        return self.rounds.wake_at

    @property
    def workers(self) -> int:
        """How many take part."""
        return len(self._enlisted)

    @property
    def idle(self) -> bool:
        """Is no round under way?"""
        return self.rounds.idle

    @property
    def why(self) -> str:
        """Why no round is under way; empty if one is."""
        if self.rounds.session is not None:
            return ""
        return self.rounds.problem or ("" if self._since is not None and not self._why else self._why)

    def laid_out(self, layout: Layout) -> None:
        """There is a model now."""
        self._sizes = tuple(sum(block.elements for block in blocks) for blocks in layout.by_shard)
        self._digest = bytes.fromhex(layout.digest)

    # --- what happens

    def enlist(self, message: Enlist, name: str) -> None:
        """A worker takes part from now on, or not any more. It is told how far the rounds are."""
        metrics = tuple(each for each in message.metrics if each and each.isprintable())
        if message.willing:
            self._enlisted[message.incarnation] = Enlisted(name, metrics)
        else:
            self._enlisted.pop(message.incarnation, None)
        self._workers = None
        self._asked[message.incarnation] = message.willing

    def gone(self, incarnation: int) -> None:
        if self._enlisted.pop(incarnation, None) is not None:
            self._workers = None

    def turn(self, message: Message | None, modes: Modes, shards: Shards, now: float) -> list[Say | Log]:
        """Go on: with a message of a round, or because something else has happened."""
        if message is None and modes.now.mode != "federated" and self._since is None and self.idle and not self._asked:
            return []
        if self._workers is None:
            self._workers = Workers(
                {incarnation: each.name for incarnation, each in self._enlisted.items()},
                {incarnation: each.metrics for incarnation, each in self._enlisted.items()},
            )
            self._give(self._workers, now)
        said = self._standing(modes, shards), Hold("the mode of the cluster changes") if self._on_hold(modes) else Go()
        if said != self._told:
            self._told = said
            for each in said:
                self._give(each, now)
        self._give(Received(0, message) if message is not None else Tick(), now)
        for incarnation, willing in self._asked.items():
            self._tell(incarnation, willing)
        self._asked.clear()
        told, self._out = self._out, []
        return told

    def _on_hold(self, modes: Modes) -> bool:
        return modes.now.mode != "federated" or modes.changing

    def _standing(self, modes: Modes, shards: Shards) -> Placed | Unplaced:
        """Are the shards where a round can begin?"""
        if modes.now.mode != "federated":
            self._since = None
            self._why = f"the mode is {modes.now.mode}"
            return Unplaced()
        whole = shards.ready and shards.agreed and shards.opened and not shards.unfilled
        if not whole or not self._sizes:
            self._why = "shards that are whole"
            return Unplaced()
        if self._since != modes.now.clock:
            self._why = self._missing(shards)
            if self._why:
                return Unplaced()
            self._since = modes.now.clock
        self._why = ""
        return Placed(tuple(place.incarnation for place in shards.places[: shards.fixed]), self._sizes, self._digest)

    def _missing(self, shards: Shards) -> str:
        if self._least > len(self._enlisted):
            return f"workers: {len(self._enlisted)} of {self._least} take part"
        self._least = 1
        counted = shards.counted
        return f"{counted} workers to finish what they do in the mode before" if counted else ""

    def _give(self, event: RoundsEvent, now: float) -> None:
        effects: list[RoundsEffect] = self.rounds.handle(event, now)
        for effect in effects:
            if isinstance(effect, Concluded):
                self._concluded(effect)
            else:
                self._out.append(effect)

    def _concluded(self, end: Concluded) -> None:
        self.last = end
        if end.released is None:
            self.abandoned += not end.declined
            level = "info" if end.declined else "warning"
            self._out.append(Log(level, f"round {end.round} was abandoned: {end.why}"))
            return
        metrics = dict(end.released.metrics)
        self.said = {name: value for name, value in metrics.items() if not name.startswith(SUM)}
        self.evaluations.summed(end.round, len(end.released.survivors), metrics)
        count = len(end.released.survivors)
        text = f"round {end.round} is complete: {count} workers, {self.rounds.completed} rounds so far"
        ledger = self.rounds.ledger
        if ledger is not None:
            text += f", epsilon {ledger.epsilon:.3g} at delta {ledger.delta:g}"
        self._out.append(Log("info", text))
        for incarnation in self._enlisted:  # a lost word is made up for by its next `Enlist`
            self._tell(incarnation, True)

    def _tell(self, incarnation: int, willing: bool) -> None:
        wanted = self.rounds.completed if self.rounds.exhausted else self.rounds.recipe.rounds or 0
        self._out.append(
            Say(incarnation, Progress(incarnation, willing, self.rounds.completed, wanted, self.why[:256]))
        )
