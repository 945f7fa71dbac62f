"""Large inputs: split in proportion to how quick executors are, and put together in order.

Rules
- Every part has one input at least; the sizes add up to all of them.
- The first failure of a part is that of the whole; what comes after it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..protocol.errors import ProtocolError, ShapeError
from ..protocol.schema import Buffer
from .values import cut, join, pack, rows, unpack


def shares(items: int, rates: Sequence[float]) -> list[int]:
    """How many of the inputs go to each, by inputs per second; whoever would get none gets none.

    Args:
        rates: above 0.
    """
    total = sum(rates)
    ends = [round(items * upto / total) for upto in accumulate(rates)]
    return [after - before for before, after in zip([0, *ends], ends, strict=False)]


class Parcel:
    """One task in parts.

    Attributes:
        whole: the task. sizes: inputs of each part.
    """

    def __init__(self, whole: Any, sizes: Sequence[int]) -> None:
        self.whole, self.sizes = whole, tuple(sizes)
        self._outputs: list[Any] = [None] * len(self.sizes)
        self._left = len(self.sizes)

    def payloads(self) -> list[bytes]:
        """The parts' inputs.

        Raises:
            ProtocolError, ShapeError: the inputs have no such rows.
        """
        value = unpack(self.whole.payload)
        if rows(value) != sum(self.sizes):
            raise ShapeError("inputs that have other rows than was said")
        ends = [0, *accumulate(self.sizes)]
        return [pack(cut(value, start, stop)) for start, stop in pairwise(ends)]

    def put(self, part: int, output: Buffer) -> bytes | None:
        """A part's output. Returns that of the whole when it is complete.

        Raises:
            ShapeError, ProtocolError: the outputs do not fit each other, or have no row for each input.
        """
        if self._outputs[part] is None:
            value = unpack(output)
            if rows(value) != self.sizes[part]:
                raise ShapeError(f"an output without a row for each of {self.sizes[part]} inputs")
            self._outputs[part] = value
            self._left -= 1
        return pack(join(self._outputs)) if self._left == 0 else None


def divisible(payload: Buffer, items: int) -> bool:
    """Has this value so many rows?"""
    try:
        return rows(unpack(payload)) == items
    except ProtocolError:
        return False
