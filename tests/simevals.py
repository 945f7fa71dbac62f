"""Held-out evaluation by the workers of the simulation: a part is worth its examples times the elements that have changed.

So what an evaluation comes to tells whether each part was counted once, and whether all were measured on one version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shoal.protocol.evaluating import LATER, MAKE, Apportioned, Assess, Cut, Sums
from shoal.worker import calls


class Appraising:
    """A part of `App`."""

    cluster: Any
    core: Any
    node: Any
    name: str
    finished: bool
    _call: Callable[..., int]
    _cut: tuple[tuple[int, int], int] = (0, 0), 0
    """The cut that it has read last, and how many elements have changed in it."""

    def appraise(self) -> None:
        """Evaluate the version of now, with whoever else does."""
        if self.core.layout is None or self.finished or self.cluster.sim.nodes.get(self.name) is not self.node:
            return
        self._appraise(0, lambda first: self._help(first.number + 1))

    def _appraise(self, after: int, then: Callable[[Any], None]) -> None:
        length, size = self.cluster.job.length, self.cluster.job.size
        self._ask(lambda inc, request: Assess(inc, request, "held out", length, size, 0, after), then)

    def _ask(self, make: Callable[[int, int], Any], then: Callable[[Any], None]) -> None:
        if not self.finished:
            self._call(calls.AskCalled, then, make)

    def _help(self, after: int) -> None:
        def answered(answer: Any) -> None:
            sim = self.cluster.sim
            if isinstance(answer, Apportioned):
                return self._part(answer, after)
            if answer.state == MAKE:
                return self._make(after)
            if answer.state == LATER:
                sim.at(sim.now + 0.1, lambda: self._help(after) if sim.nodes.get(self.name) is self.node else None)

        self._appraise(after, answered)

    def _make(self, after: int) -> None:
        marks: dict[int, int] = {}

        def sink(block: int, payload: Any) -> None:
            marks[block] = int(np.count_nonzero(np.frombuffer(payload, np.float32)))

        def made(cut: calls.CutMade) -> None:
            self._cut = (cut.maker, cut.number), sum(marks.values())
            self.cluster.marks.setdefault(cut.clock, set()).add(self._cut[1])
            key = repr(sorted(cut.versions.items()))[:256]
            self._ask(lambda inc, r: Cut(inc, r, "held out", cut.number, "async", cut.clock, key, ""), again)

        def again(_: Any) -> None:
            self._help(after)

        self._call(calls.CutCalled, made, sink, 0, 0, True, failed=again)

    def _part(self, part: Apportioned, after: int) -> None:
        marks: dict[int, int] = {}

        def sink(block: int, payload: Any) -> None:
            marks[block] = int(np.count_nonzero(np.frombuffer(payload, np.float32)))

        def loaded(cut: calls.CutMade) -> None:
            self._cut = (cut.maker, cut.number), sum(marks.values())
            say((("marks", float(self._cut[1] * (part.stop - part.start))),), "")

        def say(sums: Any, why: str) -> None:
            self._ask(lambda inc, request: Sums(inc, request, part.lease, sums, why), lambda _: self._help(after))

        if self._cut[0] == (part.maker, part.cut):
            return say((("marks", float(self._cut[1] * (part.stop - part.start))),), "")
        self._call(
            calls.CutCalled, loaded, sink, part.maker, part.cut, False, failed=lambda error: say((), str(error)[:99])
        )
