"""Q and what follows from it, and that a plan needs no arrays (rung T0, SPEC §14)."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from shoal.protocol.errors import ConfigError
from shoal.protocol.secure.scale import Scale


def test_a_bound_is_the_rule() -> None:
    """Q = (2^(m-1) - 1) // N, and the units follow from it."""
    scale = Scale(32, 0.5, 8.0, 10)
    assert (2**31 - 1) // 10 == scale.bound
    assert scale.bound / 4 == scale.units
    assert 32767 // 3 == Scale(16, 1.0, 1.0, 3).bound


@pytest.mark.parametrize(
    "numbers",
    [
        (24, 1.0, 1.0, 3),
        (32, 0.0, 1.0, 3),
        (32, math.inf, 1.0, 3),
        (32, math.nan, 1.0, 3),
        (32, 1.0, 0.5, 3),
        (32, 1.0, math.inf, 3),
        (32, 1.0, 1.0, 0),
        (16, 1.0, 1.0, 40000),
        (32, 1e-320, 1.0, 3),
    ],
)
def test_a_scale_that_cannot_be(numbers: tuple[int, float, float, int]) -> None:
    with pytest.raises(ConfigError):
        Scale(*numbers)


@pytest.mark.parametrize(("bits", "width"), [(16, 2), (32, 4)])
def test_what_integers_travel_as(bits: int, width: int) -> None:
    found = Scale(bits, 1.0, 1.0, 3).dtype
    assert ("u", width) == (found.kind, found.itemsize)


def test_a_plan_needs_no_arrays() -> None:
    """Who makes plans, deals shares and agrees on keys never waits for numpy."""
    modules = ("plan", "keys", "shares", "graph", "parameters", "checks", "privacy", "scale")
    code = f"import sys, {', '.join(f'shoal.protocol.secure.{name}' for name in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"numpy", "torch", "zmq"} & set(loaded)
