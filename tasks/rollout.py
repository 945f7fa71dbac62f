"""Which versions of a model are answered with: the promoted one, one that is tried on a share of the tasks, the last one meanwhile.

Rules
- An executor answers with the promoted version once it holds it; until then with the one that it held before.
- A version on trial gets its share of the tasks, not more. Feedback decides: clearly worse, and it is dropped; enough of it and not
  worse, and it is promoted.
- What is on trial survives a restart: it is a note in the book.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

from ..protocol.errors import ConfigError
from .belief import Belief
from .card import Card
from .library import Library

LEAST = 20
"""Rewards of the version on trial before it can be dropped."""
ENOUGH = 100
"""Rewards after which it is promoted, if it is not worse."""
SURE = 2.3
"""Standard errors: as sure as 99 of 100."""
NOTE = "canary:"


@dataclass(slots=True)
class Trial:
    """A version that gets `share` of the tasks. `credit`: tasks that it may have now."""

    card: Card
    share: float
    credit: float = 0.0


@dataclass(slots=True)
class Model:
    """`before`: versions that were promoted earlier and may still answer, the newest last."""

    name: str
    promoted: Card | None = None
    trial: Trial | None = None
    before: list[Card] = field(default_factory=list)

    @property
    def cards(self) -> list[Card]:
        """All that may be answered with, the promoted one first."""
        found = [self.promoted] if self.promoted else []
        found += [self.trial.card] if self.trial else []
        return found + self.before


class Rollout:
    """All models of a library.

    Args:
        notes: of the book. put: writes one.
    """

    def __init__(self, library: Library, notes: dict[str, str], put: Callable[[str, str], None]) -> None:
        self._library, self._put = library, put
        self.models: dict[str, Model] = {}
        self.look()
        for key, text in notes.items():
            if key.startswith(NOTE):
                version, share = json.loads(text)
                try:
                    self.models[key.removeprefix(NOTE)].trial = Trial(
                        library.find(key.removeprefix(NOTE), version), share
                    )
                except (ConfigError, KeyError):
                    put(key, "")

    def look(self) -> bool:
        """Somebody else may have promoted something. Has anything changed?"""
        changed = False
        for name in self._library.names():
            model = self.models.setdefault(name, Model(name))
            promoted = self._library.promoted(name)
            if promoted is not None and (model.promoted is None or promoted.identity != model.promoted.identity):
                self._now(model, promoted)
                changed = True
        return changed

    def _now(self, model: Model, card: Card) -> None:
        if model.promoted is not None:
            model.before = [*[each for each in model.before if each.identity != card.identity][-3:], model.promoted]
        model.promoted = card
        if model.trial is not None and model.trial.card.identity == card.identity:
            self._end_trial(model)

    def _end_trial(self, model: Model) -> None:
        model.trial = None
        self._put(NOTE + model.name, "")

    def promote(self, name: str, version: int, why: str) -> Card:
        """Raises: ConfigError: as `Registry.promote`."""
        card = self._library.promote(name, version, why)
        self._now(self.models.setdefault(name, Model(name)), card)
        return card

    def rollback(self, name: str, why: str) -> Card:
        """What is on trial is dropped, if anything is; else as `Registry.rollback`."""
        model = self.models.get(name)
        if model is not None and model.trial is not None and model.promoted is not None:
            self._end_trial(model)
            return model.promoted
        card = self._library.rollback(name, why)
        self._now(self.models.setdefault(name, Model(name)), card)
        return card

    def canary(self, name: str, version: int, share: float) -> Card:
        """Try a version.

        Raises:
            ConfigError: there is none, nothing is promoted beside it, it was never evaluated, or the share is none.
        """
        card = self._library.find(name, version)
        model = self.models.setdefault(name, Model(name))
        if not 0 < share < 1:
            raise ConfigError(f"a share of {share}", hint="between 0 and 1; 1 is promotion")
        if not card.quality:
            raise ConfigError(f"{card} was never evaluated: its card has no quality")
        if model.promoted is None or model.promoted.identity == card.identity:
            raise ConfigError(f"beside {card} nothing else is promoted: there is nothing to compare with")
        model.trial = Trial(card, share)
        self._put(NOTE + name, json.dumps([version, share]))
        return card

    # --- who answers

    def wanted(self, names: Sequence[str], loaded: frozenset[str], failed: frozenset[str]) -> list[Card]:
        """What an executor of these models should hold."""
        found: list[Card] = []
        for name in names:
            model = self.models.get(name)
            if model is None or model.promoted is None:
                continue
            found.append(model.promoted)
            if model.trial is not None:
                found.append(model.trial.card)
            if model.promoted.identity not in loaded:
                found += [card for card in model.before if card.identity in loaded]
        return [card for card in found if card.identity not in failed]

    def answers(self, names: Sequence[str], loaded: frozenset[str]) -> frozenset[str]:
        """The identities that an executor answers with now."""
        found = set()
        for name in names:
            model = self.models.get(name)
            if model is None:
                continue
            held = [card.identity for card in reversed(model.before) if card.identity in loaded]
            if model.promoted is not None and model.promoted.identity in loaded:
                held = [model.promoted.identity]
            found |= set(held[:1])
            if model.trial is not None and model.trial.card.identity in loaded:
                found.add(model.trial.card.identity)
        return frozenset(found)

    @property
    def cards(self) -> list[Card]:
        """All that may be answered with."""
        return [card for model in self.models.values() for card in model.cards]

    def turn(self, name: str) -> bool:
        """Is the next task one for the version on trial?"""
        trial = self.models[name].trial
        return trial is not None and trial.credit >= 1.0

    def counted(self, card: Card, tasks: int) -> None:
        """So many tasks went to a version."""
        trial = self.models[card.name].trial
        if trial is None:
            return
        if card.identity == trial.card.identity:
            trial.credit -= tasks * (1.0 - trial.share)
        else:
            trial.credit = min(trial.credit + tasks * trial.share, 64.0)

    # --- what feedback says

    def judge(self, name: str, beliefs: dict[tuple[str, str], Belief]) -> tuple[str, Card] | None:
        """Is the trial over? `promoted` or `dropped`, and the version."""
        model = self.models[name]
        if model.trial is None or model.promoted is None:
            return None
        tried, old, count = 0.0, 0.0, 0
        variance = 0.0
        for (identity, kind), belief in beliefs.items():
            other = beliefs.get((model.promoted.identity, kind))
            if identity != model.trial.card.identity or not belief.count:
                continue
            against = other or Belief(model.promoted.quality_of(kind))
            count += belief.count
            tried += belief.count * belief.mean
            old += belief.count * against.mean
            spread = belief.mean * (1 - belief.mean) / belief.count
            spread += against.mean * (1 - against.mean) / max(against.count, 4)
            variance += belief.count**2 * spread
        if count < LEAST:
            return None
        lead = tried - old
        card = model.trial.card
        if lead < -SURE * sqrt(variance):
            self._end_trial(model)
            return "dropped", card
        if count >= ENOUGH:
            why = f"tried on {count} tasks: {tried / count:.3f} against {old / count:.3f}"
            if lead >= 0:
                self.promote(name, card.version, why)
                return "promoted", card
            if count >= 4 * ENOUGH:
                self._end_trial(model)
                return "dropped", card
        return None
