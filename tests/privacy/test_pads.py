"""Pads and seals are those of other implementations, and hide what they cover."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedllm.privacy.pads import (
    SealingKey,
    add_pad,
    fresh_seed,
    integers_of,
    packet_bytes,
    public_key_bytes,
    residues,
    seal,
)

VECTORS = json.loads((Path(__file__).parent / "pad_vectors.json").read_text())
KINDS = pytest.mark.parametrize("post_quantum", [False, True])
INFO = b"a slot"


def pad(seed, size):
    total = np.zeros(size, np.uint32)
    add_pad(total, seed)
    return total


@pytest.mark.parametrize("vector", VECTORS["pads"])
def test_a_pad_is_the_key_stream_of_another_aes(vector):
    assert pad(bytes.fromhex(vector["seed"]), 9).tolist() == vector["pad"]


@pytest.mark.parametrize("kind", ["classic", "hybrid"])
def test_a_packet_of_another_hpke_opens(kind):
    # The classic one has the key, the info and the ephemeral key of RFC 9180, A.2.1.
    vector = {k: bytes.fromhex(v) for k, v in VECTORS[kind].items()}
    key = SealingKey(vector["secret_key"])

    assert key.is_hybrid == (kind == "hybrid")
    assert key.public == vector.get("public_key", key.public)
    assert key.open(vector["packet"], vector["info"]) == vector["seed"]


def test_the_rfcs_own_key_and_nonce_open_what_is_sealed_with_its_keys():
    from Crypto.Cipher import ChaCha20_Poly1305

    vector = {k: bytes.fromhex(v) for k, v in VECTORS["classic"].items()}
    packet = vector["packet"]
    cipher = ChaCha20_Poly1305.new(key=vector["key"], nonce=vector["nonce"])

    assert packet[:32] == vector["enc"]
    assert cipher.decrypt_and_verify(packet[32:-16], packet[-16:]) == vector["seed"]


def test_a_round_of_other_code_opens_to_the_plain_sum():
    known = VECTORS["round"]
    total = np.zeros(7, np.uint32)
    for update, seeds, sent in zip(
        known["updates"], known["seeds"], known["sent"], strict=True
    ):
        y = residues(np.array(update, np.int64))
        for seed in seeds:
            add_pad(y, bytes.fromhex(seed))
        assert y.tolist() == sent
        total += y
    for answer in known["answers"]:
        total -= np.array(answer, np.uint32)

    assert integers_of(total).tolist() == known["opened"]


@KINDS
def test_a_seed_opens_to_its_key_and_its_slot_alone(post_quantum):
    key, other = (SealingKey.generate(post_quantum) for _ in range(2))
    seed = fresh_seed()

    packet = seal(seed, key.public, INFO)

    assert len(packet) == packet_bytes(post_quantum)
    assert len(key.public) == public_key_bytes(post_quantum)
    assert key.open(packet, INFO) == seed
    assert key.open(packet, b"another slot") is None
    assert other.open(packet, INFO) is None
    for place in (0, 31, len(packet) // 2, len(packet) - 1):
        changed = bytearray(packet)
        changed[place] ^= 0x80
        assert key.open(bytes(changed), INFO) is None


@KINDS
def test_what_is_no_packet_does_not_open(post_quantum):
    key = SealingKey.generate(post_quantum)
    length = packet_bytes(post_quantum)

    assert all(key.open(p, INFO) is None for p in (b"", bytes(length), bytes(9000)))
    # A sealed text of another length is no seed.
    assert key.open(seal(bytes(31), key.public, INFO), INFO) is None


def test_a_key_or_a_seed_of_another_length_is_rejected():
    with pytest.raises(ValueError, match="33 bytes"):
        seal(fresh_seed(), bytes(33), INFO)
    with pytest.raises(ValueError, match="32 bytes"):
        add_pad(np.zeros(1, np.uint32), bytes(16))


def test_residues_stand_for_signed_integers():
    values = np.array([-(2**31), -1, 0, 1, 2**31 - 1], np.int64)

    assert integers_of(residues(values)).tolist() == values.tolist()


def test_a_padded_update_is_uniform():
    # 800,000 bytes: a byte that came 3 % too often would be seen 999 times of 1,000.
    update = np.zeros(200_000, np.int64)
    update[:1000] = 1000
    y = residues(update)
    add_pad(y, fresh_seed())

    counts = np.bincount(y.view(np.uint8), minlength=256)

    assert stats.chisquare(counts).pvalue > 1e-9
    assert abs(np.corrcoef(y.astype(float), update)[0, 1]) < 0.02


def test_no_two_seeds_are_alike():
    assert len({fresh_seed() for _ in range(1000)}) == 1000
