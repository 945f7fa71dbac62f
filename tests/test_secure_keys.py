"""Agreement, signatures and seals, against the standards' vectors; who cannot open what; no secret is shown (rung T0, SPEC §14)."""

from __future__ import annotations

import pickle

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from shoal.protocol.errors import ProtocolError
from shoal.protocol.secure.hashing import derive, digest, pack
from shoal.protocol.secure.keys import Identity, Pair, commitment, pair_key, seal, self_key, unseal, verify

A = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
B = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
SID, OTHER_SID = bytes(range(32)), bytes(32)
LOW_ORDER = (
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)


def test_x25519_as_in_its_rfc() -> None:
    """RFC 7748 6.1, both ways."""
    alice, bob = Pair.of(A), Pair.of(B)

    assert "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a" == alice.public.hex()
    assert "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f" == bob.public.hex()
    assert "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742" == alice.agree(bob.public).hex()
    assert alice.agree(bob.public) == bob.agree(alice.public)
    assert A == alice.private_bytes


@pytest.mark.parametrize("public", LOW_ORDER)
def test_a_point_with_which_everybody_agrees_on_the_same(public: str) -> None:
    """All seven of low order are refused."""
    with pytest.raises(ProtocolError, match="nobody can agree"):
        Pair.fresh().agree(bytes.fromhex(public))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_what_is_no_key(length: int) -> None:
    for make in (Pair.of, Identity.of, Pair.fresh().agree):
        with pytest.raises(ProtocolError):
            make(bytes(length))  # type: ignore[operator]


def test_ed25519_as_in_its_rfc() -> None:
    """RFC 8032 7.1, the first and the second."""
    first = Identity.of(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    second = Identity.of(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))

    assert "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a" == first.public.hex()
    assert (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        == first.sign(b"").hex()
    )
    assert verify(second.public, second.sign(b"\x72"), b"\x72")
    assert second.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da")


def test_what_another_has_signed() -> None:
    """Another message, another signer, half a signature and what is no key are all not signed."""
    me, other = Identity.fresh(), Identity.fresh()
    signature = me.sign(b"x")

    assert verify(me.public, signature, b"x")
    for public, given, message in (
        (me.public, signature, b"y"),
        (other.public, signature, b"x"),
        (me.public, signature[:-1], b"x"),
        (me.public, b"", b"x"),
        (b"", signature, b"x"),
        (b"\xff" * 32, signature, b"x"),
    ):
        assert not verify(public, given, message)


def test_chacha20_as_in_its_rfc() -> None:
    """RFC 8439 2.4.2 and A.1: the cipher that seals is the one that is meant."""
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    counter = (1).to_bytes(4, "little") + bytes.fromhex("000000000000004a00000000")

    assert "6e2e359a2568f98041ba0728dd0d6981" == _chacha(bytes(range(32)), counter, text)[:16].hex()
    assert "76b8e0ada0f13d90405d6ae55386bd28" == _chacha(bytes(32), bytes(16), bytes(64))[:16].hex()


def _chacha(key: bytes, nonce: bytes, text: bytes) -> bytes:
    return Cipher(ChaCha20(key, nonce), None).encryptor().update(text)


def test_a_seal_by_hand() -> None:
    """Key and associated data as the specification says; 82 bytes for two shares."""
    alice, bob = Pair.of(A), Pair.of(B)
    sealed = seal(alice, bob.public, SID, 1, 2, bytes(66))
    key = derive(alice.agree(bob.public), digest("enc", SID), pack([1, 2]))

    assert 82 == len(sealed)
    assert ChaCha20Poly1305(key).encrypt(bytes(12), bytes(66), pack([SID, 1, 2])) == sealed
    assert bytes(66) == unseal(bob, alice.public, SID, 1, 2, sealed)


def test_nobody_else_opens_a_seal() -> None:
    """Not the other direction, another session, other members, other keys, nor after a change."""
    alice, bob, eve = Pair.of(A), Pair.of(B), Pair.fresh()
    sealed = seal(alice, bob.public, SID, "a", "b", b"secret")
    changed = bytes([sealed[0] ^ 1]) + sealed[1:]

    for mine, public, sid, sender, receiver, given in (
        (bob, alice.public, SID, "b", "a", sealed),
        (bob, alice.public, OTHER_SID, "a", "b", sealed),
        (bob, alice.public, SID, "a", "c", sealed),
        (bob, alice.public, SID, "c", "b", sealed),
        (bob, eve.public, SID, "a", "b", sealed),
        (eve, alice.public, SID, "a", "b", sealed),
        (bob, alice.public, SID, "a", "b", changed),
        (bob, alice.public, SID, "a", "b", sealed[:-1]),
        (bob, alice.public, SID, "a", "b", b""),
    ):
        with pytest.raises(ProtocolError, match="does not open"):
            unseal(mine, public, sid, sender, receiver, given)


def test_keys_of_masks() -> None:
    """A pair's is the same for both; a self key is one's own; each is of one session, one model, one member."""
    alice, bob, b, model = Pair.of(A), Pair.of(B), bytes(range(32)), digest("model")
    low, high = sorted((alice.public, bob.public))
    shared = alice.agree(bob.public)

    assert pair_key(alice, bob.public, SID, model) == pair_key(bob, alice.public, SID, model)
    assert derive(shared, digest("pair", SID, model), low + high) == pair_key(alice, bob.public, SID, model)
    assert derive(b, digest("self", SID), pack([7])) == self_key(b, SID, 7)
    assert digest("com-b", SID, b) == commitment(SID, b)
    keys = [
        pair_key(alice, bob.public, SID, model),
        pair_key(alice, bob.public, OTHER_SID, model),
        pair_key(alice, bob.public, SID, digest("another model")),
        pair_key(alice, Pair.fresh().public, SID, model),
        *(self_key(b, sid, member) for sid in (SID, OTHER_SID) for member in (7, 8, "7", b"7")),
        self_key(model, SID, 7),
        *(commitment(sid, secret) for sid in (SID, OTHER_SID) for secret in (b, model)),
    ]
    assert len(keys) == len(set(keys))


def test_nothing_secret_is_shown_or_written() -> None:
    """Neither by repr and str, nor by a format that might be kept."""
    for secret in (Pair.fresh(), Identity.fresh()):
        for shown in (repr(secret), str(secret), f"{[secret]}"):
            for form in (secret.private_bytes.hex(), repr(secret.private_bytes), repr(list(secret.private_bytes))):
                assert form[4:20] not in shown
            assert secret.public.hex()[:8] in shown
        with pytest.raises(TypeError):
            pickle.dumps(secret)
    assert Pair.fresh().private_bytes != Pair.fresh().private_bytes
