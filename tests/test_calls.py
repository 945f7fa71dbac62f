"""What a user's thread may ask: every kind has its taker in the core, and says which ticket it answers (rung T0)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from shoal.worker import calls
from shoal.worker.core import _CALLS
from shoal.worker.federation import CALLS

KINDS: tuple[type[Any], ...] = get_args(calls.Call)
QUIET = (calls.EarlyCalled, calls.PauseCalled, calls.DoneCalled, calls.LogCalled, calls.UnshareCalled, calls.Cancelled)
QUIET += (calls.DeclineCalled, calls.RetireCalled, calls.CutReleased)


def test_the_core_takes_every_call() -> None:
    """A call that is added without a taker in the core, or to the core without a place in the union, shows here."""
    assert set(KINDS) == {*_CALLS, *CALLS}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUIET], ids=lambda kind: kind.__name__)
def test_what_is_answered_begins_with_its_ticket(kind: type[Any]) -> None:
    """The loop makes such a call as `make(ticket, …)`: another first field would get the ticket."""
    assert "ticket" == fields(kind)[0].name


def test_a_call_cannot_be_changed() -> None:
    """A call goes from a user's thread to the one that drives: nobody changes it on the way."""
    assert [] == [kind for kind in KINDS if not kind.__dataclass_params__.frozen]
