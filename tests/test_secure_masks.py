"""Masks: the stream by its vectors and by another way to it, from any start; what masks hide (rung T0, SPEC §14)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protocol.errors import NonFiniteError
from shoal.protocol.secure import masks
from shoal.protocol.secure.fixed import UNIFORM, Quantiser, auxiliary, average, totals
from shoal.protocol.secure.graph import neighbours, sides
from shoal.protocol.secure.keys import Pair, pair_key, self_key
from shoal.protocol.secure.masks import ALIGN, AUXILIARY, CHUNK_BYTES, Masks, apply
from shoal.protocol.secure.scale import LANES, Scale

KEY = bytes(range(32))
ZERO = bytes(32)


def reference(key: bytes, start: int, count: int, width: int, domain: int = 0) -> np.ndarray:
    """Lanes of the stream as the specification says, by nothing but AES in counter mode."""
    lanes = CHUNK_BYTES // width
    found = bytearray()
    for chunk in range(start // lanes, -(-(start + count) // lanes)):
        counter = domain.to_bytes(4, "big") + chunk.to_bytes(8, "big") + (2).to_bytes(4, "big")
        found += Cipher(AES(key), CTR(counter)).encryptor().update(bytes(CHUNK_BYTES))
    first = start % lanes * width
    return np.frombuffer(bytes(found[first : first + count * width]), f"<u{width}")


def stream(key: bytes, start: int, count: int, width: int, domain: int = 0) -> np.ndarray:
    vector = np.zeros(count, f"u{width}")
    apply(vector, start, [key], (), domain)
    return vector


def test_ctr_and_gcm_as_in_their_standards() -> None:
    """SP 800-38A F.5.5, and test case 14 of GCM, which is the first block of our stream with key 0."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    text = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    sealed = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert sealed == Cipher(AES(key), CTR(bytes(range(0xF0, 0x100)))).encryptor().update(text).hex()
    gcm = AESGCM(ZERO).encrypt(bytes(12), bytes(16), None).hex()
    assert "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919" == gcm
    assert bytes.fromhex(gcm)[:16] == stream(ZERO, 0, 4, 4).tobytes()


def test_our_vectors() -> None:
    """Lanes of both keys, at the beginning, over a chunk's end, and all of them."""
    lanes = stream(KEY, 0, 131076, 4)

    assert [3736452110, 3179490485, 900311048, 2576428056] == lanes[:4].tolist()
    assert [4240430613, 506524740, 961621518, 4147816172] == lanes[65536:65540].tolist()
    assert "da071391ed0d4cd35e6ec6a01c91aae2922e606c4044b9012afa77b31f289563" == _sha(lanes)
    assert [1027647438, 1852530765, 3552923143, 413004730] == stream(ZERO, 0, 4, 4).tolist()
    assert "85b02d3cce56d3c7408ddbf01237fa2ccceb51c9347ab903ff90f4f235144080" == _sha(stream(ZERO, 0, 131076, 4))


def _sha(lanes: np.ndarray) -> str:
    return hashlib.sha256(lanes.astype("<u4").tobytes()).hexdigest()


@given(
    st.sampled_from([2, 4, 8]),
    st.integers(0, 3),
    st.integers(-40, 40) | st.integers(0, CHUNK_BYTES),
    st.integers(0, 50) | st.integers(0, CHUNK_BYTES),
    st.sampled_from([0, 1, 2**32 - 1]),
)
@settings(max_examples=80)
def test_any_part_of_the_stream(width: int, chunk: int, shift: int, count: int, domain: int) -> None:
    """By the quick way or not, from any start, in any length and lane: what the reference makes."""
    start = max(0, chunk * CHUNK_BYTES // width + shift)

    assert (reference(KEY, start, count, width, domain) == stream(KEY, start, count, width, domain)).all()


@pytest.mark.parametrize("width", [2, 4, 8])
def test_both_ways_are_taken(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning of a chunk the quick one, from its middle counter mode; each alone is right."""
    lanes, middles = CHUNK_BYTES // width, []
    way = masks._middle
    monkeypatch.setattr(masks, "_middle", lambda *of: middles.append(of[2]) or way(*of))  # type: ignore[func-returns-value]
    stream(KEY, 2 * lanes, 2 * lanes, width)
    assert [] == middles
    stream(KEY, 2 * lanes - 3, 2 * lanes, width)
    assert [CHUNK_BYTES - 3 * width] == middles


def test_a_far_element() -> None:
    """Beyond 2^32, and where the number of a chunk needs more than 32 bits."""
    for start in (2**33 + 5, 2**50 - 2, 2**50):
        assert (reference(KEY, start, 20, 4) == stream(KEY, start, 20, 4)).all()


def test_slices_are_of_one_stream() -> None:
    """However a vector is divided among shards, each makes the mask of its own part."""
    whole = stream(KEY, 0, 3 * 65536 + 100, 4)
    for cuts in ((0, 65536, 131072), (0, 1, 2, 65535, 65537, 100_000), (0, ALIGN)):
        ends = (*cuts[1:], len(whole))
        parts = [stream(KEY, start, stop - start, 4) for start, stop in zip(cuts, ends, strict=True)]
        assert (np.concatenate(parts) == whole).all()
    assert 0 == ALIGN * 2 % CHUNK_BYTES == ALIGN * 4 % CHUNK_BYTES


def test_no_bit_of_a_key_is_lost() -> None:
    """Any bit alone, and bits 32 apart together, which a key folded to 32 bits would not notice: always another stream."""
    seen = {stream(KEY, 0, 4, 4).tobytes()}
    flips = [(bit,) for bit in range(256)]
    for distance in (8, 16, 32, 64, 128):
        flips += [(bit, bit + distance) for bit in range(256 - distance)]
    for flip in flips:
        number = int.from_bytes(KEY, "big")
        for bit in flip:
            number ^= 1 << bit
        seen.add(stream(number.to_bytes(32, "big"), 0, 4, 4).tobytes())

    assert len(flips) + 1 == len(seen)


def test_no_part_of_a_stream_is_used_twice() -> None:
    """Main and auxiliary vector, this chunk and the next: no block is the same."""
    parts = [stream(KEY, start, 65536, 4, domain).tobytes() for domain in (0, 1, 2) for start in (0, 65536, 131072)]
    blocks = [part[at : at + 16] for part in parts for at in range(0, len(part), 16)]

    assert len(blocks) == len(set(blocks))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_added_and_subtracted(width: int) -> None:
    """In the vector's modulus, in place; what was added and is subtracted leaves what was there."""
    count, start = 70_000, 65_530
    vector = np.arange(count).astype(f"u{width}")
    before = vector.copy()
    keys = [bytes([number] * 32) for number in range(5)]
    apply(vector, start, keys[:3], keys[3:])
    expected = before + sum(reference(key, start, count, width) for key in keys[:3])
    expected = expected - sum(reference(key, start, count, width) for key in keys[3:])

    assert (vector == expected.astype(f"u{width}")).all()
    assert (vector != before).mean() > 0.99
    apply(vector, start, keys[3:], keys[:3])
    assert (vector == before).all()


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("start", [0, 65536, 131072, 77])
def test_quantised_and_masked_in_one_go(bits: int, start: int) -> None:
    """The same bytes as one after the other, and as many cut off."""
    update = np.random.default_rng(1).normal(0, 0.05, 200_000).astype(np.float32)
    scale = Scale(bits, 0.1, 1.0, 4)
    if bits == 16:  # whole numbers, so that nothing is left to chance
        update = np.rint(update.astype(np.float64) * scale.units) / scale.units
    one, two = np.zeros(len(update), scale.dtype), np.zeros(len(update), scale.dtype)
    parts = Masks([KEY], [ZERO])
    clipped = parts.encode(update, Quantiser(scale, UNIFORM), one, start)

    assert clipped == Quantiser(scale, UNIFORM).write(update, two) > 1000
    parts.apply(two, start)
    assert (one == two).all()
    Masks([ZERO], [KEY]).apply(one, start)
    assert np.abs(one.view(f"i{bits // 8}")).max() <= scale.bound


def test_nan_is_not_masked() -> None:
    update = np.zeros(100, np.float32)
    update[50] = np.nan
    with pytest.raises(NonFiniteError):
        Masks([KEY]).encode(update, Quantiser(Scale(32, 1.0, 1.0, 2), UNIFORM), np.zeros(100, np.uint32))


def test_what_cannot_be_masked() -> None:
    """Signed or floating lanes, a start below 0, a key that is short."""
    for wrong in (np.zeros(4, np.int32), np.zeros(4, np.float32), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="a mask for"):
            apply(wrong, 0, [KEY])
    with pytest.raises(ValueError, match="from -1"):
        apply(np.zeros(4, np.uint32), -1, [KEY])
    for key in (b"", KEY[:31], KEY + b"x"):
        with pytest.raises(ValueError, match="32 bytes"):
            Masks([KEY], [key])


def test_keys_are_not_shown() -> None:
    shown = repr(Masks([KEY, KEY], [KEY]))
    assert "Masks(2 added, 1 subtracted)" == shown


# --- the algebra of a round


@pytest.mark.parametrize("dropped", [(), (2,), (0, 4)])
def test_a_round_by_the_mathematics_alone(dropped: tuple[int, ...]) -> None:
    """Six clients, some of whom shared their secrets and sent nothing: the sum of the others, exactly that of their integers."""
    count, elements, sid, model = 6, 66_000, bytes(range(32)), bytes(32)
    pairs, secrets = [Pair.fresh() for _ in range(count)], [bytes([n] * 32) for n in range(count)]
    graph, scale = neighbours(sid, count, 4), Scale(32, 0.1, 1.0, count)
    updates = np.random.default_rng(2).uniform(-0.09, 0.09, (count, elements)).astype(np.float32)

    def keys(rank: int, others: tuple[int, ...]) -> list[bytes]:
        return [pair_key(pairs[rank], pairs[other].public, sid, model) for other in others]

    total, beside = np.zeros(elements, np.uint32), np.zeros(LANES, np.uint64)
    survivors = [rank for rank in range(count) if rank not in dropped]
    for rank in survivors:
        add, subtract = sides(rank, graph[rank])
        own = self_key(secrets[rank], sid, rank)
        sent, lanes = np.zeros(elements, np.uint32), auxiliary(UNIFORM, 0, [], count)
        Masks([own, *keys(rank, add)], keys(rank, subtract)).encode(updates[rank], Quantiser(scale, UNIFORM), sent)
        apply(lanes, 0, [own, *keys(rank, add)], keys(rank, subtract), AUXILIARY)
        total += sent
        beside += lanes
    remove = [self_key(secrets[rank], sid, rank) for rank in survivors]
    restore = []
    for rank in dropped:  # the survivors' masks with it are left over: what they added, and what they subtracted
        add, subtract = sides(rank, tuple(other for other in graph[rank] if other in survivors))
        restore += keys(rank, add)
        remove += keys(rank, subtract)
    for vector, domain in ((total, 0), (beside, AUXILIARY)):
        apply(vector, 0, restore, remove, domain)
    found = totals(beside, len(survivors), 1.0, elements)
    out = np.zeros(elements)
    average(total, scale, len(survivors), found.weight, out)
    exact = np.zeros(elements, np.uint32)
    for rank in survivors:
        own_ = np.zeros(elements, np.uint32)
        Quantiser(scale, UNIFORM).write(updates[rank], own_)
        exact += own_

    assert (exact == total).all()
    assert np.abs(out - updates[survivors].astype(float).mean(0)).max() < 0.5 / scale.units + 1e-12


MODULUS = 3
PAIRS = ((0, 1), (0, 2), (1, 2))
INPUTS = list(itertools.product(range(MODULUS), repeat=3))


def _masks() -> Iterator[tuple[dict[tuple[int, int], int], tuple[int, ...]]]:
    """Every choice of pair masks and self masks over Z_3."""
    for shared in itertools.product(range(MODULUS), repeat=3):
        for own in itertools.product(range(MODULUS), repeat=3):
            yield dict(zip(PAIRS, shared, strict=True)), own


def _sent(inputs: tuple[int, ...], shared: dict[tuple[int, int], int], own: tuple[int, ...]) -> tuple[int, ...]:
    """What each client sends, with the signs that clients take."""
    sent = []
    for rank in range(3):
        add, subtract = sides(rank, tuple(other for other in range(3) if other != rank))
        value = inputs[rank] + own[rank] + sum(shared[rank, other] for other in add)
        sent.append((value - sum(shared[other, rank] for other in subtract)) % MODULUS)
    return tuple(sent)


def _views(inputs: tuple[int, ...], survivors: tuple[int, ...], own_masks: bool = True) -> Counter[tuple[int, ...]]:
    """How often the servers see what: all that was sent, late as well, what is opened of survivors and of who dropped out."""
    seen: Counter[tuple[int, ...]] = Counter()
    for shared, own in _masks():
        own_ = own if own_masks else (0, 0, 0)
        opened = [own_[rank] for rank in survivors]
        opened += [mask for pair, mask in shared.items() if not set(pair) <= set(survivors)]
        seen[(*_sent(inputs, shared, own_), *opened)] += 1
    return seen


@pytest.mark.parametrize("survivors", [(0, 1, 2), (0, 1), (0, 2), (1, 2)])
def test_the_servers_see_the_sum_and_nothing_else(survivors: tuple[int, ...]) -> None:
    """Exactly, over Z_3 and three clients: inputs with the same sum over the survivors give the same distribution of all that is
    seen, the upload of who was said to have dropped out among it; inputs with another sum give another."""
    views = {inputs: _views(inputs, survivors) for inputs in INPUTS}
    for one, other in itertools.combinations(INPUTS, 2):
        same = (sum(one[rank] - other[rank] for rank in survivors)) % MODULUS == 0
        assert (views[one] == views[other]) == same


def test_the_sum_comes_out_of_what_is_seen() -> None:
    """The view is not empty: from it anybody computes the sum of the survivors."""
    for inputs in INPUTS:
        for view in _views(inputs, (0, 1)):
            (first, second, _), (own0, own1), (shared02, shared12) = view[:3], view[3:5], view[5:]
            assert (first + second - own0 - own1 - shared02 - shared12 - inputs[0] - inputs[1]) % MODULUS == 0


def test_without_self_masks_a_late_upload_would_be_open() -> None:
    """The control: the same enumeration notices what a self mask is for."""
    one, other = (1, 1, 0), (1, 1, 2)
    assert _views(one, (0, 1)) == _views(other, (0, 1))
    assert _views(one, (0, 1), own_masks=False) != _views(other, (0, 1), own_masks=False)
