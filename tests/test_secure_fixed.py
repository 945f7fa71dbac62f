"""Updates as integers and back: no wrap, no bias, no NaN, weights that stay private (rung T0, SPEC §14)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ConfigError, NonFiniteError, ProtocolError
from shoal.protocol.secure import fixed
from shoal.protocol.secure.fixed import (
    UNIFORM,
    UNIT,
    Quantiser,
    Ratio,
    auxiliary,
    average,
    finite,
    ratio,
    totals,
)
from shoal.protocol.secure.scale import CAPPED, LANES, Scale

CLIP = 0.1
SEED = bytes(range(32))


def quantised(vector: object, scale: Scale, weight: Ratio = UNIFORM, seed: bytes = SEED) -> np.ndarray:
    given_ = np.asarray(vector, np.float32)
    out = np.zeros(len(given_), scale.dtype)
    Quantiser(scale, weight, seed).write(given_, out)
    return out


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("cap", [1.0, 8.0, 7.3])
def test_all_at_the_clip_do_not_wrap(bits: int, cap: float) -> None:
    """Whatever number of clients, all at plus or minus the clip, beyond it, and with the largest weight: the sum is theirs."""
    vector = [CLIP, -CLIP, np.float32(CLIP), 1e30, -1e30, math.nextafter(CLIP, 1)]
    for clients in (*range(1, 130), 200, 333, 500, 512, 777, 999, 1000):
        scale = Scale(bits, CLIP, cap, clients)
        one = quantised(vector, scale, Ratio(math.floor(cap * UNIT), True)).view(f"i{bits // 8}").astype(np.int64)
        assert scale.bound * clients <= 2 ** (bits - 1) - 1
        assert np.abs(one).max() <= scale.bound
        assert np.abs(one).min() >= math.floor(scale.bound * math.floor(cap * UNIT) / (cap * UNIT) - 1)
        wrapped = np.zeros(len(vector), scale.dtype)
        for _ in range(clients):
            wrapped += one.astype(scale.dtype)
        assert (wrapped.view(f"i{bits // 8}") == one * clients).all()


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.floats(1e-6, 1e6),
    st.integers(1, 1000),
    st.sampled_from([16, 32]),
    st.integers(1, 8 * UNIT),
)
@settings(max_examples=150)
def test_any_vector_stays_within_the_bound(
    vector: list[float], clip: float, clients: int, bits: int, weight: int
) -> None:
    """And is not further from its value than a step, or half of one."""
    scale = Scale(bits, clip, 8.0, clients)
    found = quantised(vector, scale, Ratio(weight, False)).view(f"i{bits // 8}").astype(float)
    exact = np.clip(np.asarray(vector, np.float32).astype(float), -clip, clip) * scale.units * weight / UNIT

    assert np.abs(found).max() <= scale.bound
    assert np.abs(found - exact).max() <= (0.5 if bits == 32 else 1) + 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.75, 0.999])
def test_rounding_by_chance_is_unbiased(fraction: float) -> None:
    """A million draws for a value between two integers: the mean error is within five standard deviations of none."""
    draws = 1_000_000
    scale = Scale(16, 1.0, 1.0, 4)
    for whole in (0, 7, -7, 5000, -5000):
        value = np.float64(whole + fraction) / scale.units
        out = np.zeros(draws, scale.dtype)
        Quantiser(scale, UNIFORM, SEED).write(np.full(draws, value), out)
        found = out.view(np.int16)
        deviation = math.sqrt(fraction * (1 - fraction) / draws) + 2**-17
        assert {whole, whole + 1} >= set(np.unique(found).tolist())
        assert abs(found.mean() - whole - fraction) < 5 * deviation


def test_rounding_draws_each_element_by_itself() -> None:
    """No element's draw is another's, of this piece, of the next, or of the next call; another seed draws otherwise."""
    scale = Scale(16, 1.0, 1.0, 1)
    half = np.full(2 * fixed.PIECE, 0.5 / scale.units)
    out = np.zeros((3, len(half)), scale.dtype)
    quantiser = Quantiser(scale, UNIFORM, SEED)
    quantiser.write(half, out[0])
    quantiser.write(half, out[1])
    Quantiser(scale, UNIFORM).write(half, out[2])
    ups = [*out.reshape(6, fixed.PIECE).astype(int)]

    for number, one in enumerate(ups):
        for other in ups[number + 1 :]:
            assert abs(np.mean(one == other) - 0.5) < 5 * 0.5 / math.sqrt(fixed.PIECE)
        assert abs(np.mean(one[1:] == one[:-1]) - 0.5) < 5 * 0.5 / math.sqrt(fixed.PIECE)


def test_thirty_two_bits_take_the_nearest() -> None:
    """A step is finer than float32; nothing is left to chance."""
    scale = Scale(32, 1.0, 1.0, 1000)
    vector = np.array([0.4, 0.6, -0.4, -0.6, 1234.5678]) / scale.units
    out = np.zeros(5, np.uint32)
    Quantiser(scale, UNIFORM).write(vector, out)

    assert [0, 1, 0, -1, 1235] == out.view(np.int32).tolist()


@pytest.mark.parametrize("bits", [16, 32])
def test_what_is_cut_off_is_counted(bits: int) -> None:
    """Beyond the clip on either side, over several pieces; what is exactly there is not."""
    vector = np.zeros(fixed.PIECE + 10, np.float32)
    vector[[0, 5, fixed.PIECE, fixed.PIECE + 1]] = [0.2, -0.2, 0.2, -3]
    vector[[7, 8]] = [0.125, -0.125]
    out = np.zeros(len(vector), f"u{bits // 8}")

    assert 4 == Quantiser(Scale(bits, 0.125, 1.0, 3), UNIFORM).write(vector, out)
    assert 0 == Quantiser(Scale(bits, 4.0, 1.0, 3), UNIFORM).write(vector, out)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [16, 32])
def test_what_is_not_finite_is_refused(bad: float, bits: int) -> None:
    """By the look before, and once more by the quantiser; wherever it is."""
    scale = Scale(bits, CLIP, 1.0, 3)
    for place in (0, 1, fixed.PIECE, fixed.PIECE + 4):
        vector = np.zeros(fixed.PIECE + 5, np.float32)
        vector[place] = bad
        with pytest.raises(NonFiniteError):
            finite(vector)
        with pytest.raises(NonFiniteError):
            Quantiser(scale, UNIFORM).write(vector, np.zeros(len(vector), scale.dtype))


def test_large_numbers_are_finite() -> None:
    """Although their squares are not."""
    finite(np.full(10, 3e38, np.float32))
    finite(np.full(10, 1e300))
    finite(np.zeros(0, np.float32))


@pytest.mark.parametrize("bits", [16, 32])
def test_the_average_is_the_weighted_one(bits: int) -> None:
    """Of clients with weights, one of them capped: within the error that rounding may make, half a step each for 32 bits."""
    rng = np.random.default_rng(3)
    elements, reference, cap = 3000, 50.0, 4.0
    weights = [10.0, 50.0, 55.5, 120.0, 1000.0]
    updates = rng.normal(0, 0.03, (5, elements)).astype(np.float32)
    scale = Scale(bits, CLIP, cap, 5)
    shares = [ratio(weight, reference, cap) for weight in weights]
    total, beside = np.zeros(elements, scale.dtype), np.zeros(LANES + 1, np.uint64)
    for update, share, loss in zip(updates, shares, (1.0, 2.0, -3.0, 4.0, 0.5), strict=True):
        out = np.zeros(elements, scale.dtype)
        clipped = Quantiser(scale, share).write(update, out)
        total += out
        beside += auxiliary(share, clipped, [loss], 5)
    found = totals(beside, 5, cap, elements)
    relative = np.minimum(np.array(weights) / reference, cap)
    out = np.zeros(elements, np.float32)
    average(total, scale, 5, found.weight, out)
    exact = (np.clip(updates, -CLIP, CLIP).astype(float) * relative[:, None]).sum(0) / relative.sum()

    assert found.weight == pytest.approx(relative.sum(), abs=5 / UNIT)
    assert (1, int((np.abs(updates) > np.float32(CLIP)).sum())) == (found.capped, found.clipped)
    assert found.metrics[0] == pytest.approx((relative * [1, 2, -3, 4, 0.5]).sum() / relative.sum(), abs=1e-6)
    step = 1 / (scale.units * found.weight)
    assert np.abs(out - exact).max() <= 5 * step * (0.5 if bits == 32 else 1) + 2e-8
    if bits == 16:
        assert math.sqrt(np.mean(np.square(out - exact))) <= math.sqrt(5) / 2 * step


@given(st.floats(0, 1e300, exclude_min=True), st.floats(1e-6, 1e6), st.floats(1, 1e4))
def test_a_relative_weight(weight: float, reference: float, cap: float) -> None:
    """Never none, never over the cap, and said to be capped if it would have been."""
    found = ratio(weight, reference, cap)

    assert 1 <= found.units <= cap * UNIT
    if found.capped:
        assert weight / reference * UNIT > math.floor(cap * UNIT)
    else:
        assert abs(found.value - weight / reference) <= max(1, weight / reference) / UNIT


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_that_cannot_be(weight: float) -> None:
    """The text does not show it."""
    with pytest.raises(ConfigError, match="a client's weight is not over 0"):
        ratio(weight, 1.0, 8.0)


def test_a_weight_is_nobodys_business() -> None:
    """Not shown by repr; only the sum of the lanes is read."""
    assert "Ratio(…)" == repr(ratio(12345.0, 10.0, 8000.0))
    assert "1294467072" == str(ratio(12345.0, 10.0, 8000.0).units)
    assert "1294467072" not in f"{Quantiser(Scale(32, 1.0, 8000.0, 2), ratio(12345.0, 10.0, 8000.0))!r}"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_no_number(bad: float) -> None:
    with pytest.raises(NonFiniteError):
        auxiliary(UNIFORM, 0, [0.5, bad], 3)


def test_metrics_do_not_wrap() -> None:
    """The largest of all clients together stay in their lane."""
    for clients in (1, 2, 3, 1000):
        lanes = auxiliary(UNIFORM, 0, [1e300, -1e300], clients)
        beside = np.zeros_like(lanes)
        for _ in range(clients):
            beside += lanes
        high, low = totals(beside, clients, 1.0, 10).metrics
        assert high == -low == pytest.approx(((2**63 - 1) // clients) / 2**32)


def test_masks_that_did_not_cancel_are_noticed() -> None:
    """Beside the sum: any of the counts cannot be. In the sum: an element is over the bound, on either side."""
    scale = Scale(32, 1.0, 2.0, 3)
    right = auxiliary(UNIFORM, 4, [], 3) + auxiliary(UNIFORM, 0, [], 3)
    assert 2 == totals(right, 2, 2.0, 10).clients
    for lane in range(LANES):
        for change in (2**62, -(2**62)):
            wrong = right.view(np.int64).copy()
            wrong[lane] += change
            with pytest.raises(ProtocolError, match="not of 2 clients"):
                totals(wrong.view(np.uint64), 2, 2.0, 10)
    with pytest.raises(ProtocolError, match="not of 3 clients"):
        totals(right, 3, 2.0, 10)
    over = right.copy()
    over[CAPPED] = 3
    with pytest.raises(ProtocolError):
        totals(over, 2, 2.0, 10)
    for edge in (2 * scale.bound, -2 * scale.bound):
        out = np.zeros(2)
        average(np.array([0, edge], np.int32).view(np.uint32), scale, 2, 2.0, out)
        with pytest.raises(ProtocolError, match="over its bound"):
            average(np.array([0, edge + np.sign(edge)], np.int32).view(np.uint32), scale, 2, 2.0, out)


def test_the_smallest_integer_is_over_every_bound() -> None:
    """Its magnitude does not fit its own type."""
    with pytest.raises(ProtocolError):
        average(np.array([0x8000], np.uint16), Scale(16, 1.0, 1.0, 1), 1, 1.0, np.zeros(1))
