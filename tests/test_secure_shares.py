"""Shamir's shares: the vector, every subset, what fewer shares say, and what is refused (rung T0, SPEC §14)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import ProtocolError
from shoal.protocol.secure.shares import PRIME, SHARE_BYTES, Combiner, lagrange, polynomial, split

SECRET = bytes(range(32))
VECTOR = (
    "007010334048ddbd8144101f64f856afac942730a42d43c8f6f2749d5850294a4a",
    "002faceda4e878eebe85bcb495cd1b4c83d061928888b4b0ff4f20873137b45bf2",
    "003ed73130e2d699becd0ec99d8a5ae494c4c037c02667ce302e1cd7a5d2be5440",
    "009d8efde437f6be821a065e7c301577df7143204b065d20898f698eb621473334",
    "004bd453bee7d95d086ca37331be4b0663d5ea4c292894a80b7306ac62234ef7a5",
)


def test_the_vector() -> None:
    """Secret 00..1f, coefficients SHA-256 of `coef1` and `coef2`, threshold 3, places 1 to 5."""
    drawn = iter([int.from_bytes(hashlib.sha256(name).digest(), "big") for name in (b"coef1", b"coef2")])

    assert list(VECTOR) == [share.hex() for share in split(SECRET, 3, range(1, 6), lambda _: next(drawn))]


def test_the_prime() -> None:
    """The smallest over 2^256: no smaller one passes Fermat's test, and it does."""
    assert PRIME == next(n for n in range(2**256 + 1, 2**256 + 400, 2) if pow(2, n - 1, n) == 1 == pow(3, n - 1, n))


@pytest.mark.parametrize("holders", range(2, 7))
def test_every_subset_that_is_large_enough(holders: int) -> None:
    """All subsets of at least t, in any order, for every t; any smaller one gives something else."""
    for threshold in range(2, holders + 1):
        shares = split(SECRET, threshold, range(1, holders + 1))
        for size in range(1, holders + 1):
            for chosen in itertools.combinations(range(holders), size):
                found = _combined([shares[place] for place in chosen], [place + 1 for place in chosen])
                assert (found == SECRET) == (size >= threshold)


def _combined(shares: list[bytes], xs: list[int]) -> bytes:
    try:
        return Combiner(xs).combine(shares)
    except ProtocolError:  # of no secret, as shares of too few may be
        return b""


def test_fewer_shares_say_nothing() -> None:
    """Over the field of 11: whatever t - 1 shares are seen, each secret has made them as often as every other."""
    prime, threshold, xs = 11, 3, (1, 4)
    seen = Counter(
        (secret, *(polynomial((secret, *rest), x, prime) for x in xs))
        for secret in range(prime)
        for rest in itertools.product(range(prime), repeat=threshold - 1)
    )

    assert prime**3 == len(seen)
    assert {1} == set(seen.values())


def test_as_many_shares_say_all() -> None:
    """The control: over the same field t shares fix the secret."""
    prime, xs = 11, (1, 4, 7)
    factors = lagrange(xs, prime)
    for secret, *rest in itertools.product(range(prime), repeat=3):
        values = [polynomial((secret, *rest), x, prime) for x in xs]
        assert secret == sum(map(int.__mul__, factors, values)) % prime


@given(st.data(), st.binary(min_size=32, max_size=32), st.integers(2, 40))
@settings(max_examples=60)
def test_split_and_combined(data: st.DataObject, secret: bytes, holders: int) -> None:
    """Any secret, any places, any subset of t."""
    xs = data.draw(st.lists(st.integers(1, 5000), min_size=holders, max_size=holders, unique=True))
    threshold = data.draw(st.integers(2, holders))
    chosen = data.draw(st.permutations(range(holders)))[:threshold]
    shares = split(secret, threshold, xs)

    assert {SHARE_BYTES} == set(map(len, shares))
    assert secret == Combiner([xs[place] for place in chosen]).combine([shares[place] for place in chosen])


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_ends_of_the_field(secret: bytes) -> None:
    assert secret == Combiner([1, 2]).combine(split(secret, 2, [1, 2]))


def test_a_combiner_is_used_again() -> None:
    """What depends on the places is computed once; the secrets are many."""
    combiner = Combiner([3, 1, 9])
    for number in range(5):
        secret = bytes([number] * 32)
        assert secret == combiner.combine(split(secret, 3, [3, 1, 9]))


def test_coefficients_are_drawn_from_the_whole_field() -> None:
    """As many as are needed, each below the prime; two splits of a secret share nothing."""
    asked: list[int] = []
    split(SECRET, 4, range(1, 6), lambda below: asked.append(below) or 0)  # type: ignore[func-returns-value]

    assert [PRIME] * 3 == asked
    assert not set(split(SECRET, 3, range(1, 6))) & set(split(SECRET, 3, range(1, 6)))


@pytest.mark.parametrize("xs", [[], [0, 1], [1, 1], [-1, 2], [1, PRIME + 1]])
def test_places_that_cannot_be(xs: list[int]) -> None:
    """None, zero (which is the secret itself), twice, negative, or zero in the field."""
    with pytest.raises(ValueError, match="distinct"):
        Combiner(xs)
    with pytest.raises(ValueError, match="distinct"):
        split(SECRET, 2, xs)


@pytest.mark.parametrize(("secret", "threshold", "holders"), [(SECRET, 1, 3), (SECRET, 4, 3), (SECRET[1:], 2, 3)])
def test_shares_that_cannot_be(secret: bytes, threshold: int, holders: int) -> None:
    """One of which would be the secret; more than there are; of another length."""
    with pytest.raises(ValueError, match="are enough"):
        split(secret, threshold, range(1, holders + 1))


def test_shares_of_a_peer_that_cannot_be() -> None:
    """Too few, too many, too long, beyond the field, or of a number that is no secret: refused, whoever sent them."""
    one, two = split(SECRET, 2, [1, 2])
    combiner = Combiner([1, 2])
    large = PRIME.to_bytes(SHARE_BYTES, "big")
    flat = (2**256).to_bytes(SHARE_BYTES, "big")
    for shares in ([one], [one, two, two], [one, b"\0" + two], [one, two[1:]], [one, b""], [one, large], [flat, flat]):
        with pytest.raises(ProtocolError):
            combiner.combine(shares)


def test_a_wrong_share_gives_another_secret() -> None:
    """It is not noticed here, and never gives the right one."""
    one, two = split(SECRET, 2, [1, 2])
    assert SECRET != _combined([one, two[:-1] + bytes([two[-1] ^ 1])], [1, 2])
    assert SECRET != _combined([two, one], [1, 2])
