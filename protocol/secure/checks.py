"""What a client looks at before it helps to unmask a sum (SPEC §14): one pure function that names the rule which is broken.

Rules
- A client decides by what it has seen itself; of the servers it takes the list of survivors and nothing else.
- For each member it gives a share of one secret only, and which one follows from that list.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from .keys import MemberId


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a client stands when it is asked to unmask.

    Attributes:
        me: its own name. members: who advertised, itself with them.
        neighbours: with whom it agreed on masks, without itself. senders: those of them whose shares it has.
        minimum: survivors below which it gives nothing. threshold: shares that open a secret.
        masked: has it sent its masked input in this session, and not yet unmasked?
        released: has it given shares for this run and round before, in whatever session?
    """

    me: MemberId
    members: Set[MemberId]
    neighbours: Set[MemberId]
    senders: Set[MemberId]
    minimum: int
    threshold: int
    masked: bool
    released: bool


def refusal(standing: Standing, survivors: tuple[MemberId, ...]) -> str:
    """The first rule that a list of survivors breaks, or an empty text if the client may unmask."""
    alive = set(survivors)
    holders = (standing.senders | {standing.me}) & alive
    rules = (
        (len(alive) == len(survivors), "a survivor is named twice"),
        (standing.me in alive, "this client is not among the survivors"),
        (alive <= standing.members, "a survivor has never advertised"),
        (alive & standing.neighbours <= standing.senders, "a neighbour survived whose shares this client has not got"),
        (len(alive) >= standing.minimum, f"{len(alive)} survivors, and {standing.minimum} are the fewest"),
        (
            len(holders) >= standing.threshold,
            f"{len(holders)} of the survivors hold this client's shares, and {standing.threshold} are needed",
        ),
        (standing.masked, "this client has not masked anything in this session, or has unmasked it"),
        (not standing.released, "this client has given shares for this round before"),
    )
    return next((text for holds, text in rules if not holds), "")
