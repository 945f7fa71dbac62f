"""Partitions: every example of every epoch is done once, whatever the order of leases, completions, deaths (rung T0, SPEC §9)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shoal.protocol.messages import Declare
from shoal.ps.partitions import Answer, Partitions, Range

EPOCHS = 3
workers = st.integers(1, 4)


def declared(
    length: int = 10, batch: int = 2, size: int = 4, epoch: int = 0, seed: int = 5, job: str = "job"
) -> Declare:
    return Declare(1, 1, job, length, batch, size, seed, epoch)


class LeasesMachine(RuleBasedStateMachine):
    """A table of every example of every epoch: None if it is free, -1 if it is done, else the lease that holds it."""

    @initialize(length=st.integers(0, 11), batch=st.integers(1, 2), times=st.integers(1, 3), first=st.integers(0, 1))
    def declare(self, length: int, batch: int, times: int, first: int) -> None:
        self.length, self.size, self.first = length, batch * times, first
        self.partitions = Partitions()
        assert "" == self.partitions.declare(declared(length, batch, self.size, first))
        self.table: dict[int, list[int | None]] = {epoch: [None] * length for epoch in range(first, EPOCHS)}
        self.held: dict[int, Range] = {}
        self.told: dict[int, int] = {}
        self.lost = 0

    @rule(worker=workers, epochs=st.integers(0, EPOCHS))
    def claim(self, worker: int, epochs: int) -> None:
        found = self.partitions.claim(worker, "job", epochs)
        asked = [epoch for epoch in self.table if epoch < epochs]
        free = next(((e, i) for e in asked for i in range(self.length) if self.table[e][i] is None), None)
        if free is None:
            busy = any(entry != -1 for epoch in asked for entry in self.table[epoch])
            assert found is (Answer.LATER if busy else Answer.NEVER)
            return
        assert isinstance(found, Range)
        epoch, start = free
        stop = min((start // self.size + 1) * self.size, self.length)
        assert (worker, epoch, start, stop, 0) == (found.incarnation, found.epoch, found.start, found.stop, found.done)
        assert found.lease not in self.told
        assert {None} == set(self.table[epoch][start:stop])
        self.table[epoch][start:stop] = [found.lease] * (stop - start)
        self.held[found.lease], self.told[found.lease] = found, 0

    @precondition(lambda self: self.held)
    @rule(data=st.data(), done=st.integers(0, 8), stranger=st.booleans(), over=st.booleans())
    def report(self, data: st.DataObject, done: int, stranger: bool, over: bool) -> None:
        """Progress, or the end of a lease, by its holder or by somebody who does not hold it (any more)."""
        lease = data.draw(st.sampled_from(sorted(self.told)))
        held = self.held.get(lease)
        worker = 9 if stranger or held is None else held.incarnation
        (self.partitions.complete if over else self.partitions.progress)(worker, lease, done)
        if held is None or stranger:
            return
        self.told[lease] = max(self.told[lease], min(done, held.stop - held.start))
        if over:
            self._ended(held)

    @rule(worker=workers)
    def die(self, worker: int) -> None:
        self.partitions.end(worker)
        for held in [held for held in self.held.values() if held.incarnation == worker]:
            self._ended(held)

    def _ended(self, held: Range) -> None:
        """What was told done is done; the rest is free again."""
        del self.held[held.lease]
        row, cut = self.table[held.epoch], held.start + self.told[held.lease]
        row[held.start : held.stop] = [-1] * (cut - held.start) + [None] * (held.stop - cut)
        self.lost += cut < held.stop

    def teardown(self) -> None:
        """The others end, and one worker does what is left: then everything is done."""
        for worker in (1, 2, 3, 4):
            self.die(worker)
        while isinstance(found := self.partitions.claim(5, "job", EPOCHS), Range):
            assert {None} == set(self.table[found.epoch][found.start : found.stop])
            self.table[found.epoch][found.start : found.stop] = [-1] * (found.stop - found.start)
            self.partitions.complete(5, found.lease, found.stop - found.start)
        job = self.partitions.jobs["job"]

        assert found is Answer.NEVER
        assert {-1} >= {entry for row in self.table.values() for entry in row}
        assert -(-self.length // self.size) * (EPOCHS - self.first) == job.completed
        assert self.lost == job.lost == job.released


LeasesMachine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)
test_every_example_is_done_once = LeasesMachine.TestCase


def test_a_job_is_fixed_by_its_first_declaration() -> None:
    """Another length, batch or seed under the same name is told apart; the same again and another name are welcome (SPEC §9.1)."""
    partitions = Partitions()
    assert ["", "", ""] == [partitions.declare(d) for d in (declared(), declared(), declared(11, job="other"))]

    for other, what in (
        (declared(11), "10 examples for the worker that came first, 11 here"),
        (declared(batch=1), "2 examples a batch for the worker that came first, 1 here"),
        (declared(seed=6), "5 as seed for the worker that came first, 6 here"),
    ):
        assert f"data set 'job' has {what}" == partitions.declare(other)
    assert (10, 0) == (partitions.jobs["job"].length, partitions.jobs["job"].epoch)
    for batch, size in ((0, 4), (2, 0), (2, 3), (4, 2)):
        assert "multiple of the batch" in partitions.declare(declared(batch=batch, size=size, job="third"))
    assert partitions.claim(1, "third", 1) is None


def test_a_job_begins_where_the_last_that_knows_says() -> None:
    """After a restart of the coordinator: the highest epoch that anybody declares, for earlier ones are done (SPEC §9.5)."""
    partitions = Partitions()
    partitions.declare(declared())
    first = partitions.claim(1, "job", 9)
    assert isinstance(first, Range)
    partitions.declare(declared(epoch=2))
    partitions.end(1)
    partitions.declare(declared(epoch=1))

    job = partitions.jobs["job"]
    assert (2, 2) == (job.epoch, job.oldest)
    found = [partitions.claim(2, "job", 9) for _ in range(5)]
    assert [2, 2, 2, 3, 3] == [held.epoch for held in found if isinstance(held, Range)]
    assert 2 == job.oldest
