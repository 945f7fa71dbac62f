"""Codecs: in what form the float32 numbers of a block travel (SPEC §12): which there are, their sizes, how a user names one.

Rules
- No numpy here: the cores know a codec by its number and its sizes. The bytes themselves are `coding`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

RAW, BF16, FP16, INT8, TOPK = range(5)
NAMES = ("raw", "bf16", "fp16", "int8", "topk")
"""What a user calls them, by number."""

CHUNK = 256
"""Elements that share a scale in `int8`."""
FRACTION = 0.01
MOST_FRACTION = 0.5
"""Of a vector's elements in `topk`: what is sent unless said otherwise, and the most; more would be larger than raw."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec as a sender uses it.

    Args:
        number: on the wire. fraction: of the elements that `topk` sends; without meaning for the others.
    """

    number: int = RAW
    fraction: float = 0.0

    def chosen(self, elements: int) -> int:
        """How many of so many elements `topk` sends."""
        return max(1, min(round(self.fraction * elements), elements // 2))

    def size(self, elements: int) -> int:
        """Bytes that so many float32 elements make."""
        return 8 * self.chosen(elements) if self.number == TOPK else size(self.number, elements)

    def __str__(self) -> str:
        return f"topk:{self.fraction:g}" if self.number == TOPK else NAMES[self.number]


def push_codec(typed: object) -> Codec:
    """The codec that a user has named for pushes: `bf16`, `topk`, `topk:0.05`, …

    Raises:
        ValueError: there is no such codec; the text says which there are.
    """
    name, colon, number = str(typed).partition(":")
    if name == "topk":
        fraction = _fraction(number) if colon else FRACTION
        if not 0 < fraction <= MOST_FRACTION:
            raise ValueError(f"must be topk:FRACTION with a fraction over 0 and up to {MOST_FRACTION:g}")
        return Codec(TOPK, fraction)
    if colon or name not in NAMES:
        raise ValueError(f"must be one of {', '.join(NAMES)}, topk:FRACTION")
    return Codec(NAMES.index(name))


def pull_codec(typed: object) -> Codec:
    """The codec that a user has named for pulls.

    Raises:
        ValueError: there is no such codec, or it is for pushes only.
    """
    known = f"must be one of {', '.join(NAMES[:TOPK])}"
    if str(typed).partition(":")[0] == "topk":
        raise ValueError(f"{known}: topk leaves numbers out, which a later gradient makes up for and a weight cannot")
    if str(typed) not in NAMES:
        raise ValueError(known)
    return Codec(NAMES.index(str(typed)))


def _fraction(typed: str) -> float:
    try:
        return float(typed)
    except ValueError:
        return 0.0


def size(number: int, elements: int) -> int:
    """Bytes of so many float32 elements in a codec; of `topk` the most that they may have."""
    if number == TOPK:
        return 8 * max(1, elements // 2)
    if number == INT8:
        return elements + 4 * -(-elements // CHUNK)
    return elements * (4 if number == RAW else 2)
