"""`shoal mode`: train on in another mode, from a clock on that the servers agree on (SPEC §6.5)."""

from __future__ import annotations

import math
from typing import Any

from ..protocol.asking import Switched
from ..protocol.errors import ShoalError
from ..protocol.join import JoinAddress
from ..protocol.phases import MODES
from .inquiry import Inquiry
from .settings import BadFlag, one_of
from .settings import staleness as read_staleness

PATIENCE = 10.0
"""Seconds beyond the servers' lease, after which they have given up themselves."""


def change(address: JoinAddress, mode: str, staleness: str | None) -> dict[str, Any]:
    """Ask for a mode, and wait until it has a clock.

    Args:
        staleness: as typed; None leaves it as it is.

    Returns:
        mode, staleness, and the clock from which on steps are made so.

    Raises:
        BadFlag: there is no such mode or bound. ShoalError: the servers refuse, and why.
        NoServerError, AuthError, VersionError: as they say.
    """
    try:
        wanted = one_of(*MODES)(mode)
    except ValueError as error:
        raise BadFlag(f"MODE is {mode!r}: {error}") from None
    try:
        bound = None if staleness is None else read_staleness(staleness)
    except ValueError as error:
        raise BadFlag(f"--staleness is {staleness!r}: {error}") from None
    with Inquiry(address) as inquiry:
        status, _ = inquiry.ask("status")
        before = float(status["staleness"])
        answer = inquiry.switch(wanted, before if bound is None else bound, status["lease"] + PATIENCE)
    if not isinstance(answer, Switched):
        raise ShoalError(f"the mode stays {status['mode']}: {answer.text}", hint="shoal status")
    now = answer.staleness
    return {"mode": answer.mode, "staleness": "inf" if math.isinf(now) else now, "clock": answer.clock}
