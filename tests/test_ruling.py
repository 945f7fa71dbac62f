"""Who may send, who is added, who is out (rung T0, SPEC §14.4)."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.ps.ruling import Turns


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_turns_are_few_and_decisions_stand(data: st.DataObject) -> None:
    """Whatever happens: at most so many have a turn, nobody is added who is not at all shards, nobody is added and dropped."""
    count, shards, room = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    turns, now = Turns(range(count), shards, room, 5.0), 0.0
    here: dict[int, set[int]] = {rank: set() for rank in range(count)}
    before: tuple[set[int], set[int]] = (set(), set())
    number = -1
    for _ in range(data.draw(st.integers(0, 25))):
        match data.draw(st.sampled_from(("arrive", "drop", "told", "wait", "go"))):
            case "arrive":
                shard, rank = data.draw(st.integers(0, shards - 1)), data.draw(st.sampled_from([*turns.turns, 0]))
                if rank in turns.turns:  # a shard takes nothing else
                    here[rank].add(shard)
                    turns.arrived(shard, [rank])
            case "drop":
                turns.drop(data.draw(st.integers(0, count - 1)))
            case "told":
                turns.told(data.draw(st.integers(0, count - 1)), now)
            case "wait":
                now += data.draw(st.floats(0, 4))
            case "go":
                turns.go_on(now, False)
        state = turns.turns, turns.added, turns.dropped
        assert len(turns.turns) <= room
        assert before[0] <= turns.added and before[1] <= turns.dropped
        assert not turns.added & turns.dropped and not (turns.added | turns.dropped) & set(turns.turns)
        assert all(len(here[rank]) == shards for rank in turns.added)
        assert turns.number >= number
        before, number = (set(turns.added), set(turns.dropped)), turns.number
        assert state
    turns.go_on(now, True)
    assert turns.over and len(turns.added) + len(turns.dropped) == count
    assert inf == turns.wake_at


def test_a_turn_that_takes_too_long_is_over() -> None:
    """Counted from when it was told; the next one has it then."""
    turns = Turns((0, 1, 2), 1, 1, 5.0)
    assert [0] == turns.go_on(0.0, False)
    assert [] == turns.go_on(100.0, False)  # nobody has told it
    turns.told(0, 100.0)
    assert 105.0 == turns.wake_at
    assert [] == turns.go_on(104.0, False) and [1] == turns.go_on(105.0, False)
    assert {0} == turns.dropped
