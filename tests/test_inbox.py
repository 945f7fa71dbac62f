"""The inbox: a number is queued once and applied once, in order, whatever the network does (rung T0, SPEC §5)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.protocol.messages import Enter, Fill, Operation
from shoal.ps.inbox import MAX_WAITING, MAX_WAITING_BYTES, Inbox, Verdict


def operation(seq: int, payload: bytes = b"") -> Operation:
    return Fill(1, 2, seq, 3, (0,), (payload,)) if payload else Enter(1, 2, seq, 0)


class StreamMachine(RuleBasedStateMachine):
    """A sender with numbers 1, 2, 3, …, and a network that loses, repeats and reorders them."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox = Inbox()
        self.applied: list[int] = []
        self.arrived: list[int] = []
        self.refused: list[int] = []

    @rule(seq=st.integers(1, 20) | st.none())
    def arrive(self, seq: int | None) -> None:
        """Any number, or the one that is expected, so that the stream gets somewhere."""
        expected = len(self.arrived) + 1
        seq = seq or expected
        verdict = self.inbox.take(operation(seq))
        wanted = Verdict.QUEUED if seq == expected else Verdict.REPEATED if seq < expected else Verdict.GAP
        assert wanted is verdict
        if verdict is Verdict.QUEUED:
            self.arrived.append(seq)

    @precondition(lambda self: len(self.inbox))
    @rule(refuse=st.booleans())
    def apply(self, refuse: bool) -> None:
        assert self.inbox.head is not None
        seq = self.inbox.head.seq
        self.inbox.applied_head(("shape", f"number {seq}") if refuse else None)
        self.applied.append(seq)
        if refuse:
            self.refused.append(seq)

    @invariant()
    def each_number_once_and_in_order(self) -> None:
        assert list(range(1, len(self.applied) + 1)) == self.applied
        assert len(self.applied) == self.inbox.applied
        assert len(self.arrived) == self.inbox.received
        assert len(self.arrived) - len(self.applied) == len(self.inbox)
        assert (self.inbox.head is None) == (not len(self.inbox))
        assert [(seq, "shape", f"number {seq}") for seq in self.refused[-8:]] == list(self.inbox.refusals)


StreamMachine.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
test_numbers_are_applied_once_in_order = StreamMachine.TestCase


@pytest.mark.parametrize(("size", "most"), [(0, 2048), (16 * 1024 * 1024, 4), (65 * 1024 * 1024, 1)])
def test_so_much_may_wait(size: int, most: int) -> None:
    """2,048 operations or 64 MiB, but always one; the next is dropped until one was applied (SPEC §2.3)."""
    inbox, payload = Inbox(), bytes(size)
    for _ in range(2):
        numbers = range(inbox.received + 1, inbox.applied + most + 1)
        assert {Verdict.QUEUED} == {inbox.take(operation(seq, payload)) for seq in numbers}
        assert Verdict.FULL is inbox.take(operation(inbox.received + 1, payload))
        assert most == len(inbox)
        inbox.applied_head()
    assert (MAX_WAITING, MAX_WAITING_BYTES) == (2048, 64 * 1024 * 1024)
