"""Keys of a round: who agrees on what with whom, and who signs (SPEC §14).

Rules
- Keys are 32 raw bytes on the wire, never a container format.
- A secret is never in a `repr` or an error. It is in memory for one round, but for an identity.
- A key is for one purpose: the session, both parties and the direction go into its derivation.
"""

from __future__ import annotations

from typing import TypeAlias

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from ..errors import ProtocolError
from .hashing import derive, digest, pack

MemberId: TypeAlias = int | str | bytes
"""How a client is called in a round, the same by all parties."""

KEY_BYTES = 32
SIGNATURE_BYTES = 64
SEAL_BYTES = 16
"""What sealing adds."""
_NONCE = bytes(12)


class Pair:
    """An X25519 key pair (RFC 7748) that lives for one round.

    Attributes:
        public: the public half, 32 bytes.
    """

    __slots__ = ("_agreed", "_private", "public")

    def __init__(self, private: X25519PrivateKey) -> None:
        self._private = private
        self._agreed: dict[bytes, bytes] = {}
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def fresh(cls) -> Pair:
        """A new one, from the system's randomness."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def of(cls, private_bytes: bytes) -> Pair:
        """The pair with this private half.

        Raises:
            ProtocolError: `malformed`: not 32 bytes.
        """
        try:
            return cls(X25519PrivateKey.from_private_bytes(private_bytes))
        except ValueError:
            raise ProtocolError("malformed", f"a private key of {len(private_bytes)} bytes") from None

    @property
    def private_bytes(self) -> bytes:
        """The private half, 32 bytes."""
        return self._private.private_bytes_raw()

    def agree(self, other_public: bytes) -> bytes:
        """The 32 bytes that both pairs compute and nobody else. Remembered: sealing for somebody and opening his need the same.

        Raises:
            ProtocolError: `malformed`: not a public key, or one with which everybody agrees on the same.
        """
        known = self._agreed.get(other_public)
        if known is None:
            try:
                known = self._private.exchange(X25519PublicKey.from_public_bytes(other_public))
            except ValueError:
                raise ProtocolError("malformed", "a public key that nobody can agree with") from None
            self._agreed[other_public] = known
        return known

    def __repr__(self) -> str:
        return f"Pair(public={self.public.hex()[:8]}…)"


class Identity:
    """A client's own Ed25519 key (RFC 8032), by which others know it through all rounds.

    Attributes:
        public: the public half, 32 bytes.
    """

    __slots__ = ("_private", "public")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key().public_bytes_raw()

    @classmethod
    def fresh(cls) -> Identity:
        """A new one, from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def of(cls, private_bytes: bytes) -> Identity:
        """The identity with this private half.

        Raises:
            ProtocolError: `malformed`: not 32 bytes.
        """
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(private_bytes))
        except ValueError:
            raise ProtocolError("malformed", f"a private key of {len(private_bytes)} bytes") from None

    @property
    def private_bytes(self) -> bytes:
        """The private half, 32 bytes: for the file in which its owner keeps it."""
        return self._private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes that only this identity can make for this message."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"Identity(public={self.public.hex()[:8]}…)"


_P = (1 << 255) - 19
_WEAK = frozenset(
    {0, 1, _P - 1, _P, _P + 1}
    | {
        int.from_bytes(bytes.fromhex(text), "little")
        for text in (
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
            "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        )
    }
)
"""The y of points of order 8 or less, in every encoding: under such a key some signatures fit any message (RFC 8032, §8.9)."""


def is_weak(public: bytes) -> bool:
    """Is this a public key of an identity that nobody can have drawn, and anybody can sign for?"""
    return int.from_bytes(public, "little") & ((1 << 255) - 1) in _WEAK


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Was this message signed by the identity with this public half? What is no key or no signature was not."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (ValueError, InvalidSignature):
        return False
    return True


def seal(mine: Pair, other_public: bytes, sid: bytes, sender: MemberId, receiver: MemberId, text: bytes) -> bytes:
    """A text for one receiver's eyes, `SEAL_BYTES` longer than it was: ChaCha20-Poly1305 (RFC 8439).

    The key is for this session and this direction, so it MUST seal one text only: who repeats a message repeats the sealed bytes.

    Raises:
        ProtocolError: as `Pair.agree`.
    """
    cipher, about = _sealing(mine, other_public, sid, sender, receiver)
    return cipher.encrypt(_NONCE, text, about)


def unseal(mine: Pair, other_public: bytes, sid: bytes, sender: MemberId, receiver: MemberId, sealed: bytes) -> bytes:
    """What `sender` has sealed for `receiver` in this session.

    Raises:
        ProtocolError: as `Pair.agree`; `malformed`: it was sealed by or for somebody else, in another session, or was changed.
    """
    cipher, about = _sealing(mine, other_public, sid, sender, receiver)
    try:
        return cipher.decrypt(_NONCE, sealed, about)
    except InvalidTag:
        raise ProtocolError("malformed", "a sealed share that does not open") from None


def _sealing(
    mine: Pair, other_public: bytes, sid: bytes, sender: MemberId, receiver: MemberId
) -> tuple[ChaCha20Poly1305, bytes]:
    key = derive(mine.agree(other_public), digest("enc", sid), pack([sender, receiver]))
    return ChaCha20Poly1305(key), pack([sid, sender, receiver])


def self_key(b: bytes, sid: bytes, member: MemberId) -> bytes:
    """The key of the mask that a member adds for itself, from its secret `b`: 32 bytes."""
    return derive(b, digest("self", sid), pack([member]))


def pair_key(mine: Pair, other_public: bytes, sid: bytes, model_digest: bytes) -> bytes:
    """The key of the mask that one of two members adds and the other subtracts: 32 bytes, the same for both.

    Members that were given different models get different keys, so that a server cannot compare what they make of them
    (Pasquini et al. 2022).

    Raises:
        ProtocolError: as `Pair.agree`.
    """
    low, high = sorted((mine.public, other_public))
    return derive(mine.agree(other_public), digest("pair", sid, model_digest), low + high)


def commitment(sid: bytes, b: bytes) -> bytes:
    """By this a wrongly reconstructed `b` is noticed: 32 bytes that do not show it."""
    return digest("com-b", sid, b)
