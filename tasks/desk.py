"""What a dispatcher answers when it is asked how it is: JSON for `shoal tasks`, `shoal models` and `shoal status`.

Rules
- Plain JSON: no NaN, no infinity. What was asked for and is not there is answered with an `error`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from .book import Id, Line
from .card import Card

if TYPE_CHECKING:
    from .dispatcher import Dispatcher

SHOWN = 200
"""Tasks in a listing."""


def answer(dispatcher: Dispatcher, what: str) -> bytes:
    """The JSON of an answer.

    Args:
        what: `status`, `tasks`, `task:ID`, `models`, or `model:NAME`.
    """
    kind, _, about = what.partition(":")
    make = {"status": _status, "tasks": _tasks, "task": _task, "models": _models, "model": _model}.get(kind)
    found = make(dispatcher, about) if make else {"error": f"nobody knows what {what!r} is"}
    return json.dumps(found).encode()


def task_id(id_: Id) -> str:
    """How a task is called."""
    return f"{id_[0]:016x}-{id_[1]}"


def _status(d: Dispatcher, _: str) -> dict[str, Any]:
    return {
        "waiting": len(d.waiting),
        "waiting_bytes": d.waiting.nbytes,
        "at_work": sum(len(batch.items) for seat in d.crew for batch in seat.batches.values()),
        "policy": d.settings.policy,
        "executors": [
            {
                "name": seat.name,
                "models": list(seat.offer.models),
                "data": None if seat.offer.open else list(seat.offer.data),
                "loaded": [str(card) for card in map(d.planner.card, seat.offer.loaded) if card],
                "failed": {str(d.planner.card(identity) or identity[:12]): why for identity, why in seat.offer.failed},
                "done": seat.done,
                "queue_seconds": round(seat.queue(d.now), 6),
            }
            for seat in d.crew
        ],
        "models": {
            name: {
                "promoted": model.promoted.version if model.promoted else None,
                "trial": {"version": model.trial.card.version, "share": model.trial.share} if model.trial else None,
            }
            for name, model in d.rollout.models.items()
        },
        "quality": [
            {
                "model": str(d.planner.card(identity) or identity[:12]),
                "kind": kind,
                "mean": belief.mean,
                "feedback": belief.count,
            }
            for (identity, kind), belief in d.beliefs.items()
        ],
        "counters": dict(d.counters),
    }


def _tasks(d: Dispatcher, _: str) -> list[dict[str, Any]]:
    return [_shown(line) for line in d.book.newest(SHOWN)]


def _task(d: Dispatcher, about: str) -> dict[str, Any]:
    owner, _, number = about.partition("-")
    try:
        line = d.book.find((int(owner, 16), int(number)))
    except (ValueError, OverflowError):
        line = None
    return _shown(line) if line else {"error": f"there is no task {about!r}, or it is forgotten"}


def _shown(line: Line) -> dict[str, Any]:
    told = line.told
    return {
        "id": task_id(line.id),
        "kind": line.kind,
        "privacy": line.privacy,
        "came": line.came,
        "state": "open" if told is None else (told.code or "answered"),
        "model": told.model if told else "",
        "version": told.version if told else None,
        "executor": told.executor if told else "",
        "seconds": told.seconds if told and isfinite(told.seconds) else None,
        "why": line.reason or (told.text if told else ""),
        "error": told.text if told else "",
        "reward": line.reward,
    }


def described(card: Card) -> dict[str, Any]:
    """A card and its identity, as JSON says it."""
    quality = {kind: dict(metrics) for kind, metrics in card.quality.items()}
    return {"identity": card.identity, **asdict(card), "quality": quality, "packed": card.packed.decode()}


def _models(d: Dispatcher, _: str) -> list[dict[str, Any]]:
    found = []
    for name in d.library.names():
        promoted, cards = d.library.promoted(name), d.library.versions(name)
        found.append(
            {
                "name": name,
                "versions": len(cards),
                "promoted": promoted.version if promoted else None,
                "quality": {kind: dict(metrics) for kind, metrics in (promoted or cards[-1]).quality.items()},
                "bytes": sum({card.weights: card.size for card in cards}.values()),
            }
        )
    return found


def _model(d: Dispatcher, name: str) -> dict[str, Any]:
    cards, promoted = d.library.versions(name), d.library.promoted(name)
    if not cards:
        known = ", ".join(d.library.names()) or "none yet"
        return {"error": f"there is no model {name!r}; there are: {known}"}
    return {
        "name": name,
        "promoted": promoted.version if promoted else None,
        "versions": [described(card) for card in cards],
        "history": [dict(line) for line in d.library.history(name)],
    }
