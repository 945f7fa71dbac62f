"""Members: an incarnation lives once, a name has one live worker, a lease ends (rung T0, SPEC §3.1, §3.3)."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.protocol.messages import Join
from shoal.ps import members as module
from shoal.ps.members import Life, Members, Refusal


def asked(incarnation: int, name: str = "a", attempt: int = 0) -> Join:
    return Join(incarnation, name, attempt, "host", 12)


class MembershipMachine(RuleBasedStateMachine):
    """Workers with few names and incarnations, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.members = Members(lease=3.0)
        self.now = 0.0
        self.live: dict[int, Life] = {}
        self.ended: set[int] = set()
        self.numbers: dict[str, int] = {}

    @rule(incarnation=st.integers(1, 30), name=st.sampled_from("abc"), attempt=st.integers(0, 2))
    def join(self, incarnation: int, name: str, attempt: int) -> None:
        if incarnation in self.live:
            return
        join = asked(incarnation, name, attempt)
        holder = next((life for life in self.live.values() if life.name == name), None)
        wrong = "ended" if incarnation in self.ended else "name" if holder and attempt <= holder.attempt else ""
        if wrong:
            with pytest.raises(Refusal) as refused:
                self.members.holder(join)
            assert wrong == refused.value.code
            return
        assert self.members.holder(join) is holder
        if holder:
            self._end(holder, "replaced")
        self.live[incarnation] = life = self.members.admit(join, b"peer", self.now)
        assert self.numbers.setdefault(name, len(self.numbers)) == life.number

    @rule(seconds=st.sampled_from((0.5, 1.0, 2.9)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for life in self.members.expired(self.now):
            assert 3.0 <= self.now - life.renewed_at
            self._end(life, "lost")
        assert all(self.now - life.renewed_at < 3.0 for life in self.live.values())

    @precondition(lambda self: self.live)
    @rule(data=st.data(), leave=st.booleans())
    def renew_or_leave(self, data: st.DataObject, leave: bool) -> None:
        life = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if leave:
            self._end(life, "left")
        else:
            self.members.renew(life, self.now)

    def _end(self, life: Life, state: str) -> None:
        self.members.end(life, state)
        assert (state, False) == (life.state, life.entered)
        del self.live[life.incarnation]
        self.ended.add(life.incarnation)

    @invariant()
    def the_table_is_the_model(self) -> None:
        assert self.live == {life.incarnation: life for life in self.members}
        assert len(self.live) == len(self.members) == len({life.name for life in self.members})
        assert self.ended == {life.incarnation for life in self.members.ended}
        assert all(self.members.has_ended(inc) and self.members.get(inc) is None for inc in self.ended)
        assert all(self.members.get(inc) is self.members.named(life.name) for inc, life in self.live.items())
        assert min((life.renewed_at for life in self.live.values()), default=inf) + 3.0 == self.members.next_expiry


MembershipMachine.TestCase.settings = settings(deadline=None, max_examples=80, stateful_step_count=30)
test_lives_names_and_leases = MembershipMachine.TestCase


def test_there_is_an_end_to_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker too many is refused as `full`, but a supervisor may still restart one that is here (SPEC §2.3)."""
    assert 16_384 == module.MAX_LIVE
    monkeypatch.setattr(module, "MAX_LIVE", 2)
    members = Members(3.0)
    first = members.admit(asked(1, "a"), b"", 0.0)
    members.admit(asked(2, "b"), b"", 0.0)

    with pytest.raises(Refusal) as refused:
        members.holder(asked(3, "c"))
    assert "full" == refused.value.code
    assert first is members.holder(asked(3, "a", attempt=1))
