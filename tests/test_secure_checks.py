"""What a client looks at before it helps to unmask: every rule by itself, and their order (rung T0, SPEC §14)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shoal.protocol.secure.checks import Standing, refusal

STANDING = Standing(
    me=1,
    members=frozenset(range(1, 8)),
    neighbours=frozenset(range(2, 8)),
    senders=frozenset({2, 3, 4, 5, 6}),
    minimum=4,
    threshold=4,
    masked=True,
    released=False,
)


def test_a_list_that_is_in_order() -> None:
    """All of those whose shares are here, some, and in any order."""
    for size in range(4, 7):
        for survivors in itertools.permutations(range(1, 7), size):
            if 1 in survivors:
                assert "" == refusal(STANDING, survivors)


@pytest.mark.parametrize(
    ("changes", "survivors", "rule"),
    [
        ({}, (1, 2, 3, 4, 4), "named twice"),
        ({}, (2, 3, 4, 5), "not among the survivors"),
        ({}, (1, 2, 3, 4, 9), "never advertised"),
        ({}, (1, 2, 3, 4, 7), "shares this client has not got"),
        ({"threshold": 2}, (1, 2, 3), "3 survivors, and 4 are the fewest"),
        ({}, (1,), "1 survivors, and 4 are the fewest"),
        ({}, (), "not among"),
        ({"neighbours": frozenset({2, 3}), "senders": frozenset({2, 3})}, (1, 2, 3, 4, 5), "3 of the survivors hold"),
        ({"masked": False}, (1, 2, 3, 4), "has unmasked it"),
        ({"released": True}, (1, 2, 3, 4), "given shares for this round before"),
    ],
)
def test_each_rule(changes: dict[str, object], survivors: tuple[int, ...], rule: str) -> None:
    """Each is broken alone, and is named; without that breach the list is in order."""
    assert rule in refusal(replace(STANDING, **changes), survivors)  # type: ignore[arg-type]


def test_the_order_of_the_rules() -> None:
    """Who breaks all of them hears them one after the other as they are mended."""
    standing = replace(STANDING, masked=False, released=True, minimum=5, threshold=5)
    lists: list[tuple[tuple[int, ...], str]] = [
        ((9, 9, 7), "twice"),
        ((9, 7), "not among"),
        ((1, 9, 7), "never advertised"),
        ((1, 7), "not got"),
        ((1, 2), "fewest"),
    ]
    for survivors, rule in lists:
        assert rule in refusal(standing, survivors)
    less = replace(standing, senders=frozenset({2, 3}), neighbours=frozenset({2, 3}))
    assert "hold" in refusal(less, (1, 2, 3, 4, 5))
    assert "unmasked" in refusal(standing, (1, 2, 3, 4, 5))
    assert "before" in refusal(replace(standing, masked=True), (1, 2, 3, 4, 5))
    assert "" == refusal(replace(standing, masked=True, released=False), (1, 2, 3, 4, 5))


def test_a_stranger_who_is_no_neighbour_may_survive() -> None:
    """On a graph that is not complete: most survivors are none of this client's business."""
    standing = replace(STANDING, members=frozenset(range(1, 50)), minimum=10)
    assert "" == refusal(standing, tuple(range(1, 7)) + tuple(range(20, 40)))
