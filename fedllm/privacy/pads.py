"""One-time pads modulo 2^32, whose seeds travel sealed to one trustee each.

A client adds k pads to its integers and seals each pad's seed to one trustee (HPKE, RFC 9180).
What the server holds is uniform until every trustee of the round has given it the sum of its
own pads. Sums of such vectors are sums of integers modulo 2^32: an additively homomorphic
encryption with one-time pads (Castelluccia, Mykletun, Tsudik 2005).

NumPy and cryptography only.
"""

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fedllm.privacy.mechanism import Integers

Residues = npt.NDArray[np.uint32]
"""Integers modulo 2^32."""

SEED_BYTES = 32
MODULUS_BITS = 32

_CLASSIC = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_HYBRID = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_X25519_BYTES = 32
_MLKEM_SEED_BYTES = 64
_MLKEM_PUBLIC_BYTES = 1184
_MLKEM_CIPHERTEXT_BYTES = 1088
_TAG_BYTES = 16
# Values worked on at a time, so that a stream stays in a core's cache.
_BLOCK = 1 << 15


def packet_bytes(post_quantum: bool) -> int:
    """Return the length of every sealed seed."""
    kem = _X25519_BYTES + (_MLKEM_CIPHERTEXT_BYTES if post_quantum else 0)
    return kem + SEED_BYTES + _TAG_BYTES


def public_key_bytes(post_quantum: bool) -> int:
    """Return the length of every public key."""
    return _X25519_BYTES + (_MLKEM_PUBLIC_BYTES if post_quantum else 0)


def fresh_seed() -> bytes:
    """Return a seed from the operating system; it serves one pad of one message."""
    return os.urandom(SEED_BYTES)


def add_pad(total: Residues, seed: bytes) -> None:
    """Add a pad to a vector, in place.

    The pad is the key stream of AES-256 in counter mode from zero, four bytes a value, the
    lowest first.

    Args:
        total: (d,) what it is added to.
        seed: The key; it serves one vector.

    Raises:
        ValueError: The seed has another length.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes (got {len(seed)})")
    stream = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    for start in range(0, len(total), _BLOCK):
        part = total[start : start + _BLOCK]
        part += np.frombuffer(stream.update(bytes(4 * len(part))), "<u4")


def residues(integers: Integers) -> Residues:
    """Return integers modulo 2^32."""
    return (integers & 0xFFFFFFFF).astype(np.uint32)


def integers_of(values: Residues) -> Integers:
    """Return the integers from -2^31 to 2^31 - 1 that residues stand for."""
    return values.astype(np.uint32).view(np.int32).astype(np.int64)


@dataclass(frozen=True)
class SealingKey:
    """A trustee's private key of one run.

    Attributes:
        raw: The key: of X25519, and before it the seed of ML-KEM-768 if it is hybrid.
    """

    raw: bytes

    @classmethod
    def generate(cls, post_quantum: bool) -> "SealingKey":
        """Return a new key of the operating system's chance."""
        key = X25519PrivateKey.generate().private_bytes_raw()
        if post_quantum:
            key = MLKEM768PrivateKey.generate().private_bytes_raw() + key
        return cls(key)

    @property
    def is_hybrid(self) -> bool:
        """Whether it is post-quantum: ML-KEM-768 and X25519 together."""
        return len(self.raw) == _MLKEM_SEED_BYTES + _X25519_BYTES

    @property
    def public(self) -> bytes:
        """The public half, as it travels."""
        curve = self._curve.public_key().public_bytes_raw()
        if not self.is_hybrid:
            return curve
        return self._lattice.public_key().public_bytes_raw() + curve

    def open(self, packet: bytes, info: bytes) -> bytes | None:
        """Return the seed in a packet; None if it was not sealed to this key and info.

        Args:
            packet: What `seal` returned, or anything else.
            info: What it must have been sealed for.
        """
        if len(packet) != packet_bytes(self.is_hybrid):
            return None
        try:
            if self.is_hybrid:
                key = MLKEM768X25519PrivateKey(self._lattice, self._curve)
                seed = _HYBRID.decrypt(packet, key, info=info)
            else:
                seed = _CLASSIC.decrypt(packet, self._curve, info=info)
        except Exception:  # noqa: BLE001 - whatever a stranger sent
            return None
        return seed if len(seed) == SEED_BYTES else None

    @property
    def _curve(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.raw[-_X25519_BYTES:])

    @property
    def _lattice(self) -> MLKEM768PrivateKey:
        return MLKEM768PrivateKey.from_seed_bytes(self.raw[:-_X25519_BYTES])


def seal(seed: bytes, public: bytes, info: bytes) -> bytes:
    """Return a seed sealed to a trustee: HPKE's base mode, one message a key.

    Args:
        seed: What to seal.
        public: The trustee's public key of the run; its length tells which kind it is.
        info: What the packet is for: it opens for nothing else.

    Raises:
        ValueError: It is no public key.
    """
    if len(public) == public_key_bytes(post_quantum=False):
        return _CLASSIC.encrypt(seed, _curve_key(public), info=info)
    if len(public) != public_key_bytes(post_quantum=True):
        raise ValueError(f"a trustee's key has {len(public)} bytes")
    lattice = MLKEM768PublicKey.from_public_bytes(public[:-_X25519_BYTES])
    key = MLKEM768X25519PublicKey(lattice, _curve_key(public[-_X25519_BYTES:]))
    return _HYBRID.encrypt(seed, key, info=info)


def _curve_key(public: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(public)
