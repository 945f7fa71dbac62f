"""Codecs by name, number and size: what a user may ask for (rung T0, SPEC §12.4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.protocol import codecs
from shoal.protocol.codecs import BF16, FP16, INT8, NAMES, RAW, TOPK, Codec, pull_codec, push_codec, size


@pytest.mark.parametrize("name", NAMES[:TOPK])
def test_a_codec_is_named(name: str) -> None:
    """The four that need no number, for both directions; each says its name again."""
    number = NAMES.index(name)

    assert Codec(number) == push_codec(name) == pull_codec(name)
    assert name == str(push_codec(name))
    assert push_codec(name) == push_codec(push_codec(name))


@pytest.mark.parametrize(
    ("typed", "fraction"), [("topk", 0.01), ("topk:0.05", 0.05), ("topk:.5", 0.5), ("topk:1e-4", 1e-4)]
)
def test_topk_says_how_much(typed: str, fraction: float) -> None:
    """A hundredth, or the fraction behind the colon."""
    assert Codec(TOPK, fraction) == push_codec(typed) == push_codec(str(push_codec(typed)))


@pytest.mark.parametrize("typed", ["", "int9", "INT8", "int8:3", "raw:", "none", None, 3])
def test_there_is_no_other(typed: object) -> None:
    """The text lists what there is, for pushes and for pulls."""
    with pytest.raises(ValueError, match=r"^must be one of raw, bf16, fp16, int8, topk, topk:FRACTION$"):
        push_codec(typed)
    with pytest.raises(ValueError, match=r"^must be one of raw, bf16, fp16, int8$"):
        pull_codec(typed)


@pytest.mark.parametrize(
    "typed", ["topk:", "topk:0", "topk:0.51", "topk:-1", "topk:nan", "topk:inf", "topk:many", "topk:1%"]
)
def test_a_fraction_that_cannot_be(typed: str) -> None:
    """Nothing, more than raw would take, or no number."""
    with pytest.raises(ValueError, match=r"^must be topk:FRACTION with a fraction over 0 and up to 0\.5$"):
        push_codec(typed)


@pytest.mark.parametrize("typed", ["topk", "topk:0.1"])
def test_weights_do_not_travel_in_topk(typed: str) -> None:
    """And the text says why."""
    with pytest.raises(ValueError, match="a later gradient makes up for and a weight cannot"):
        pull_codec(typed)


@pytest.mark.parametrize(
    ("elements", "sizes"),
    [(1, [4, 2, 2, 5, 8]), (256, [1024, 512, 512, 260, 1024]), (257, [1028, 514, 514, 265, 1024])],
)
def test_sizes(elements: int, sizes: list[int]) -> None:
    """Bytes of a vector in each; of topk the most."""
    assert sizes == [size(number, elements) for number in (RAW, BF16, FP16, INT8, TOPK)]


def test_the_specification_lists_these_codecs() -> None:
    """SPEC §12 and the code agree on numbers, names and limits."""
    text = (Path(codecs.__file__).parent / "SPEC.md").read_text()
    for number, name in enumerate(NAMES):
        assert f"| {number} | `{name}` |" in text
    assert f"ceil(n / {codecs.CHUNK})" in text
