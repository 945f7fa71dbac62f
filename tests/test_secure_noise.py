"""Noise before masking: how much, that the sum keeps its mean (rung T0, SPEC §14)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal.protocol.errors import NonFiniteError, ProtocolError
from shoal.protocol.secure.noise import generator, privatise, restore, skellam
from shoal.protocol.secure.privacy import Skellam

AMOUNT = Skellam(clip=2.0, multiplier=0.5, units=400, honest=5)


def source(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def poisson(mean: float, most: int) -> np.ndarray:
    return np.array([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(most)])


@pytest.mark.parametrize(
    ("variance", "dtype"), [(0.5, np.uint16), (30.0, np.uint16), (0.5, np.uint32), (30.0, np.uint32), (4e6, np.uint32)]
)
def test_the_noise(variance: float, dtype: type) -> None:
    """No mean, the variance that was asked for, in the vector's modulus, on what was there."""
    count = 200_000
    out = np.full(count, 5, dtype)
    skellam(variance, out, source())
    found = out.view(f"i{out.itemsize}").astype(float) - 5

    assert abs(found.mean()) < 5 * math.sqrt(variance / count)
    assert found.var() == pytest.approx(variance, rel=5 * math.sqrt((2 + 1 / variance) / count))


def test_the_noise_is_skellams() -> None:
    """By chi-square against the distribution's own probabilities, which are those of a difference of two Poissons."""
    count, variance = 100_000, 6.0
    out = np.zeros(count, np.uint32)
    skellam(variance, out, source(1))
    one = poisson(variance / 2, 60)
    expected = np.convolve(one, one[::-1])[60 - 1 - 8 : 60 + 8]
    seen = np.array([(out.view(np.int32) == value).sum() for value in range(-8, 9)])
    square = ((seen - count * expected) ** 2 / (count * expected)).sum()

    assert abs(square - 17) / math.sqrt(34) < 5


def test_sums_have_the_whole_noise() -> None:
    """As many clients as are counted on make the standard deviation that was asked for, in units of the clip."""
    elements = 50_000
    total = np.zeros(elements, np.uint32)
    for seed in range(AMOUNT.honest):
        privatise(np.zeros(elements), AMOUNT, total_ := np.zeros(elements, np.uint32), source(seed))
        total += total_
    deviation = total.view(np.int32).std() / AMOUNT.units

    assert deviation == pytest.approx(AMOUNT.multiplier, rel=0.02)


def test_an_update_keeps_its_mean_and_loses_what_is_over_the_clip() -> None:
    """Averaged over clients that all send the same: the update, or the update shortened to the clip."""
    update = np.array([0.6, -0.8, 0.0, 0.01] * 50)
    clients, length = 400, math.sqrt(50 * 1.0001)
    for factor in (0.5 / length, 3.0):
        total, out = np.zeros(200, np.uint32), np.zeros(200)
        for seed in range(clients):
            sent = np.zeros(200, np.uint32)
            over = privatise(factor * update, AMOUNT, sent, source(seed))
            assert over == (factor * length > AMOUNT.clip)
            total += sent
        restore(total, AMOUNT, clients, out)
        expected = update * min(factor, AMOUNT.clip / length)
        deviation = AMOUNT.clip / AMOUNT.units * math.sqrt((AMOUNT.variance + 0.25) / clients)
        assert np.abs(out - expected).max() < 5 * deviation


def test_masks_that_did_not_cancel_are_noticed() -> None:
    """An element of the sum is over what clipping and twelve deviations allow, on either side."""
    bound = int(AMOUNT.bound(7))
    assert bound == int(7 * 401 + 12 * math.sqrt(7 * AMOUNT.variance))
    for edge in (bound, -bound):
        restore(np.array([0, edge], np.int32).view(np.uint32), AMOUNT, 7, np.zeros(2))
        with pytest.raises(ProtocolError, match="over its bound"):
            restore(np.array([0, edge + np.sign(edge)], np.int32).view(np.uint32), AMOUNT, 7, np.zeros(2))


def test_rounding_is_repeated_until_it_fits() -> None:
    """Whatever is drawn, an update in units is no longer than the norm that the bound is for."""
    elements = 4096
    quiet = Skellam(clip=1.0, multiplier=1e-9, units=64, honest=1)
    update = np.full(elements, 0.5 / quiet.units)  # every element half way: the longest that rounding makes it
    lengths = []
    for seed in range(200):
        out = np.zeros(elements, np.uint32)
        privatise(update, quiet, out, source(seed))
        lengths.append(math.sqrt(np.square(out.view(np.int32), dtype=float).sum()))

    assert max(lengths) <= quiet.norm(elements)
    first = [np.count_nonzero(source(seed).random(elements) >= 0.5) for seed in range(200)]
    assert max(map(math.sqrt, first)) <= max(lengths) + 1


def test_a_rounding_that_is_too_long_is_drawn_again() -> None:
    """The control: the first draw is over the norm, the second is taken."""
    amount = Skellam(clip=1.0, multiplier=1e-9, units=10, honest=1)

    class Drawn:
        """Rounds all up, then all down."""

        def __init__(self) -> None:
            self.rounds = 0

        def random(self, count: int) -> np.ndarray:
            self.rounds += 1
            return np.full(count, 0.999 if self.rounds == 1 else 0.0)

        def poisson(self, mean: float, count: int) -> np.ndarray:
            return np.zeros(count, np.int64)

    drawn, out = Drawn(), np.zeros(1000, np.uint32)
    privatise(np.full(1000, 0.03), amount, out, drawn)  # type: ignore[arg-type]

    assert 2 == drawn.rounds
    assert not out.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError):
        privatise(np.array([0.0, bad]), AMOUNT, np.zeros(2, np.uint32), source())
    with pytest.raises(NonFiniteError):
        privatise(np.array([1e200]), AMOUNT, np.zeros(1, np.uint32), source())


def test_generators_are_their_own() -> None:
    """Each is new and seeded from the system; nothing global is drawn from or seeded."""
    before = repr(np.random.get_state())
    drawn = {tuple(generator().integers(0, 2**63, 4).tolist()) for _ in range(20)}

    assert 20 == len(drawn)
    assert before == repr(np.random.get_state())
