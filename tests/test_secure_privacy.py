"""How much noise makes a sum say how little: the norm, the modulus, and the bound against exact divergences (rung T0, SPEC §14)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from shoal.protocol.errors import ConfigError
from shoal.protocol.secure.privacy import Skellam, renyi

AMOUNT = Skellam(clip=2.0, multiplier=0.5, units=400, honest=5)


def poisson(mean: float, most: int) -> np.ndarray:
    return np.array([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(most)])


def test_norm_and_variance() -> None:
    """With three units for each root of an element rounding costs less than two in a hundred; with few it costs much."""
    elements = 25_000_000
    fine = replace(AMOUNT, units=3 * 5000)
    assert fine.norm(elements) == pytest.approx(1.0139 * fine.units, rel=1e-3)
    assert replace(AMOUNT, units=1 << 14).norm(elements) == pytest.approx(1.012 * 2**14, rel=1e-3)
    assert replace(AMOUNT, units=64).norm(elements) == pytest.approx(39 * 64, rel=0.01)
    assert replace(AMOUNT, units=1).norm(2) == pytest.approx(math.sqrt(1 + 0.5 + 1 + math.sqrt(0.5)))
    assert replace(AMOUNT, units=1).norm(1) == pytest.approx(math.sqrt(2.75))
    assert replace(AMOUNT, units=1000).norm(1) == pytest.approx(math.sqrt(1000**2 + 1000 + 0.75))
    assert (0.5 * 400) ** 2 / 5 == AMOUNT.variance


def test_what_fits_the_modulus() -> None:
    """32 bits do for 25 million elements; 16 do not."""
    amount = Skellam(1.0, 1.0, 15_000, 10)
    assert amount.fits(32, 1000)
    assert not amount.fits(16, 10)
    assert not amount.fits(32, 1 << 18)
    assert not replace(amount, multiplier=1e5).fits(32, 10)


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 10, 1), (1.0, 0.0, 10, 1), (1.0, 1.0, 0, 1), (1.0, 1.0, 10, 0)])
def test_an_amount_that_cannot_be(numbers: tuple[float, float, int, int]) -> None:
    with pytest.raises(ConfigError, match="noise with clip"):
        Skellam(*numbers)
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError):
            Skellam(bad, 1.0, 10, 1)
        with pytest.raises(ConfigError):
            Skellam(1.0, bad, 10, 1)


def test_the_bound_by_hand() -> None:
    """Term by term, and many orders at once."""
    amount, elements = Skellam(1.0, 2.0, 100, 7), 10_000
    whole, square = (2.0 * 100) ** 2, amount.norm(10_000) ** 2
    assert square == pytest.approx(min((100 + 100) ** 2, 100**2 + 2500 + 100 + 50))
    long = min(math.sqrt(elements * square), square)
    expected = [
        order * square / 2 / whole + min(((2 * order - 1) * square + 6 * long) / 4 / whole**2, 3 * long / 2 / whole)
        for order in (2, 8, 64)
    ]

    assert expected == pytest.approx(renyi([2, 8, 64], amount, elements))
    assert expected == sorted(expected)


@pytest.mark.parametrize("deviation", [2.0, 5.0, 20.0])
@pytest.mark.parametrize("shift", [1, 2, 4])
def test_the_bound_holds(deviation: float, shift: int) -> None:
    """One element, shifted by whole units: the divergence computed from the probabilities is below the bound, and not far."""
    amount = Skellam(clip=1.0, multiplier=deviation / shift, units=shift, honest=3)
    one = poisson(deviation**2 / 2, int(deviation**2 / 2 + 40 * deviation + 40))
    exact = np.log(np.maximum(np.convolve(one, one[::-1]), 1e-300))
    kept = exact > -300
    for order in (2, 3, 5, 8):
        terms = order * exact[shift:] - (order - 1) * exact[:-shift]
        divergence = math.log(np.exp(terms[kept[shift:] & kept[:-shift]]).sum()) / (order - 1)
        (bound,) = renyi([order], _exactly(amount, shift), 1)
        assert divergence <= bound * (1 + 1e-9)
        assert deviation < 5 or bound < 1.5 * divergence


def _exactly(amount: Skellam, shift: int) -> Skellam:
    """The same noise for a norm of exactly `shift`: whole numbers need no rounding."""

    class Whole(Skellam):
        def norm(self, elements: int) -> float:
            return float(shift)

    return Whole(amount.clip, amount.multiplier, amount.units, amount.honest)


@pytest.mark.parametrize("orders", [[1], [1.5], [0], [2, 2.5]])
def test_orders_for_which_nothing_is_proven(orders: list[int]) -> None:
    with pytest.raises(ValueError, match="whole orders"):
        renyi(orders, AMOUNT, 10)


def test_more_noise_says_less() -> None:
    """Twice the noise is about a quarter of the divergence; twice the clients change nothing, for the whole is the same."""
    (one,), (less,) = (renyi([8], replace(AMOUNT, multiplier=m, units=10_000), 100) for m in (1.0, 2.0))
    assert less == pytest.approx(one / 4, rel=0.01)
    assert renyi([8], AMOUNT, 100) == renyi([8], replace(AMOUNT, honest=10), 100)
