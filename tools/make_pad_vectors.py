"""Make tests/privacy/pad_vectors.json with other code than the package's.

    pip install kyber-py pycryptodome
    python tools/make_pad_vectors.py

HPKE is written out here from RFC 9180 and compared with the RFC's own vector A.2.1 before
anything is made; its hybrid KEM is that of draft-connolly-cfrg-xwing-kem over kyber-py's
ML-KEM-768. AES, ChaCha20-Poly1305 and X25519 are pycryptodome's. Nothing of `fedllm` and of
`cryptography` is imported.
"""

import hashlib
import hmac
import json
from pathlib import Path

from Crypto.Cipher import AES, ChaCha20_Poly1305
from Crypto.Protocol.DH import import_x25519_private_key, import_x25519_public_key
from Crypto.Protocol.DH import key_agreement as agree
from kyber_py.ml_kem import ML_KEM_768

TARGET = Path(__file__).parents[1] / "tests" / "privacy" / "pad_vectors.json"
RFC = {
    "info": "4f6465206f6e2061204772656369616e2055726e",
    "secret_key": "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb",
    "ephemeral": "f4ec9b33b792c372c1d2c2063507b684ef925b8c75a42dbcbf57d63ccd381600",
    "enc": "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a",
    "key": "ad2744de8e17f4ebba575b3f5f5a8fa1f69c2a07f6e7500bc60ca6e3e3ec1c91",
    "nonce": "5c4d98150661b848853b547f",
}
KDF, AEAD = 0x0001, 0x0003
X25519, XWING = 0x0020, 0x647A


def labeled_extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return hmac.digest(salt, b"HPKE-v1" + suite + label + ikm, "sha256")


def labeled_expand(
    suite: bytes, key: bytes, label: bytes, info: bytes, length: int
) -> bytes:
    info = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out, counter = out + block, counter + 1
    return out[:length]


def schedule(kem: int, shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Return the key and the nonce of the first message, in base mode."""
    suite = b"HPKE" + b"".join(n.to_bytes(2, "big") for n in (kem, KDF, AEAD))
    context = b"\0" + labeled_extract(suite, b"", b"psk_id_hash", b"")
    context += labeled_extract(suite, b"", b"info_hash", info)
    secret = labeled_extract(suite, shared, b"secret", b"")
    key = labeled_expand(suite, secret, b"key", context, 32)
    return key, labeled_expand(suite, secret, b"base_nonce", context, 12)


def curve(secret: bytes, public: bytes) -> bytes:
    private = import_x25519_private_key(secret)
    other = import_x25519_public_key(public)
    shared: bytes = agree(static_priv=private, static_pub=other, kdf=lambda x: x)
    return shared


def curve_public(secret: bytes) -> bytes:
    public: bytes = (
        import_x25519_private_key(secret).public_key().export_key(format="raw")
    )
    return public


def classic_shared(ephemeral: bytes, public: bytes) -> tuple[bytes, bytes]:
    suite = b"KEM" + X25519.to_bytes(2, "big")
    enc = curve_public(ephemeral)
    prk = labeled_extract(suite, b"", b"eae_prk", curve(ephemeral, public))
    shared = labeled_expand(suite, prk, b"shared_secret", enc + public, 32)
    return shared, enc


def hybrid_shared(
    ephemeral: bytes, coins: bytes, lattice: bytes, public: bytes
) -> tuple[bytes, bytes]:
    lattice_shared, ciphertext = ML_KEM_768._encaps_internal(lattice, coins)
    enc = curve_public(ephemeral)
    both = lattice_shared + curve(ephemeral, public) + enc + public
    shared = hashlib.sha3_256(both + b"\\.//^\\").digest()
    return shared, ciphertext + enc


def sealed(kem: int, shared: bytes, enc: bytes, info: bytes, seed: bytes) -> bytes:
    key, nonce = schedule(kem, shared, info)
    text, tag = ChaCha20_Poly1305.new(key=key, nonce=nonce).encrypt_and_digest(seed)
    return enc + text + tag


def pad(seed: bytes, size: int) -> list[int]:
    cipher = AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=0)
    stream = cipher.encrypt(bytes(4 * size))
    return [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 4 * size, 4)]


def counted(number: int, length: int = 32) -> bytes:
    return hashlib.shake_256(f"fedllm {number}".encode()).digest(length)


def whole_round() -> dict[str, object]:
    """Three clients, three trustees, seven values: what travels, without noise."""
    size, clients, trustees = 7, 3, 3
    updates = [[(i + 1) * (j - 3) * 1001 for j in range(size)] for i in range(clients)]
    seeds = [[counted(10 * i + a) for a in range(trustees)] for i in range(clients)]
    pads = [[pad(seed, size) for seed in row] for row in seeds]
    sent = [
        [(v + sum(p[j] for p in pads[i])) % 2**32 for j, v in enumerate(updates[i])]
        for i in range(clients)
    ]
    answers = [
        [sum(pads[i][a][j] for i in range(clients)) % 2**32 for j in range(size)]
        for a in range(trustees)
    ]
    return {
        "updates": updates,
        "seeds": [[seed.hex() for seed in row] for row in seeds],
        "sent": sent,
        "answers": answers,
        "opened": [sum(u[j] for u in updates) for j in range(size)],
    }


def main() -> None:
    rfc = {name: bytes.fromhex(value) for name, value in RFC.items()}
    public = curve_public(rfc["secret_key"])
    shared, enc = classic_shared(rfc["ephemeral"], public)
    assert enc == rfc["enc"]
    assert schedule(X25519, shared, rfc["info"]) == (rfc["key"], rfc["nonce"])
    seed = counted(100)
    classic = sealed(X25519, shared, enc, rfc["info"], seed)
    lattice_seed, coins, secret = counted(101, 64), counted(102), counted(103)
    lattice, _ = ML_KEM_768._keygen_internal(lattice_seed[:32], lattice_seed[32:])
    public = curve_public(secret)
    shared, enc = hybrid_shared(rfc["ephemeral"], coins, lattice, public)
    vectors = {
        "made_by": "tools/make_pad_vectors.py",
        "classic": {**RFC, "seed": seed.hex(), "packet": classic.hex()},
        "hybrid": {
            "info": RFC["info"],
            "secret_key": (lattice_seed + secret).hex(),
            "public_key": (lattice + public).hex(),
            "seed": seed.hex(),
            "packet": sealed(XWING, shared, enc, rfc["info"], seed).hex(),
        },
        "pads": [{"seed": counted(n).hex(), "pad": pad(counted(n), 9)} for n in (1, 2)],
        "round": whole_round(),
    }
    TARGET.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
