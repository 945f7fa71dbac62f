"""Who has masks with whom: the same for all, symmetric, regular, connected (rung T0, SPEC §14)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.secure.graph import neighbours, neighbours_of, sides

VECTOR = (
    (3, 5, 6, 7),
    (2, 4, 5, 7),
    (1, 3, 4, 5),
    (0, 2, 5, 6),
    (1, 2, 6, 7),
    (0, 1, 2, 3),
    (0, 3, 4, 7),
    (0, 1, 4, 6),
)
"""Of 8 members with 4 neighbours each in the session 00..1f."""


@given(st.binary(min_size=32, max_size=32), st.integers(2, 60), st.data())
@settings(max_examples=40)
def test_what_a_graph_is(sid: bytes, count: int, data: st.DataObject) -> None:
    """Everybody computes the same; each has as many neighbours, is theirs and not its own; all hang together."""
    degree = data.draw(st.sampled_from([count - 1, *range(2, count, 2)]))
    graph = neighbours(sid, count, degree)

    assert graph == tuple(neighbours_of(rank, bytes(sid), count, degree) for rank in range(count))
    assert count == len(graph)
    for rank, others in enumerate(graph):
        assert degree == len(set(others)) == len(others)
        assert list(others) == sorted(others)
        assert rank not in others
        assert all(rank in graph[other] for other in others)
    assert count == len(_reached(graph))


def _reached(graph: tuple[tuple[int, ...], ...], gone: frozenset[int] = frozenset()) -> set[int]:
    start = next(rank for rank in range(len(graph)) if rank not in gone)
    reached, edge = {start}, [start]
    while edge:
        edge = [other for rank in edge for other in graph[rank] if other not in reached | gone]
        reached |= set(edge)
    return reached


def test_it_hangs_together_until_two_runs_of_half_the_degree_are_gone() -> None:
    """Harary's graph: any `degree - 1` may go."""
    graph = neighbours(b"s" * 32, 12, 4)
    first = graph[0]

    for left_out in first:
        gone = frozenset(first) - {left_out}
        assert 12 - len(gone) == len(_reached(graph, gone))
    assert {0} == _reached(graph, frozenset(first))


def test_the_order_is_the_sessions() -> None:
    """Another session, other neighbours; over many, everybody is as often everybody's neighbour."""
    count, degree, sessions = 10, 4, 3000
    met = Counter(
        other for number in range(sessions) for other in neighbours(number.to_bytes(32, "big"), count, degree)[3]
    )

    expected = sessions * degree / (count - 1)
    assert 3 not in met
    assert all(abs(times - expected) < 5 * expected**0.5 for times in met.values())
    assert count - 1 == len(met)


def test_a_vector() -> None:
    """Written down, so that another implementation computes the same."""
    assert VECTOR == neighbours(bytes(range(32)), 8, 4)


def test_complete_whatever_the_session() -> None:
    assert ((1, 2), (0, 2), (0, 1)) == neighbours(b"a", 3, 2) == neighbours(b"b", 3, 2)


@pytest.mark.parametrize(("count", "degree"), [(5, 3), (5, 0), (5, 5), (5, -2), (1, 0), (0, 0), (6, 1)])
def test_there_is_no_such_graph(count: int, degree: int) -> None:
    """Odd, none, more than there are, or nobody to be a neighbour."""
    with pytest.raises(ValueError, match="neighbours each"):
        neighbours(bytes(32), count, degree)


def test_a_mask_is_added_once_and_subtracted_once() -> None:
    """By the lower rank and by the higher."""
    assert ((5, 7), (1, 2)) == sides(3, (1, 2, 5, 7))
    graph = neighbours(bytes(32), 9, 4)
    signs: Counter[frozenset[int]] = Counter()
    for rank, others in enumerate(graph):
        added, subtracted = sides(rank, others)
        assert set(added) | set(subtracted) == set(others)
        signs.update({frozenset((rank, other)): 1 for other in added})
        signs.subtract({frozenset((rank, other)): 1 for other in subtracted})
    assert 9 * 4 / 2 == len(signs)
    assert not any(signs.values())
