"""A trustee opens a slot once, whole, and with its noise; everything else it refuses."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.client import trustee as module
from fedllm.client.trustee import Trustee, load_identity
from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.privacy.agreement import SlotSettings, pin_of
from fedllm.privacy.discrete_gaussian import variance_of_two
from fedllm.privacy.pads import add_pad, fresh_seed, integers_of, seal
from tests.helpers.identities import silence, write_identity

RUN = "r" * 64
NAMES = ("a", "b", "c")


class Round:
    """Three trustees and the settings of a slot that names them."""

    def __init__(self, folder, size=50, post_quantum=False, **changes):
        self.folder = folder
        self.identity = Ed25519PrivateKey.generate()
        self.trustees = [self.trustee(name) for name in NAMES]
        self.certificates = [t.certificate(RUN, post_quantum) for t in self.trustees]
        named = tuple((c.name, c.key) for c in self.certificates)
        settings = SlotSettings(
            RUN, 1, 3, size, 20, 0.5, 2.0, 1, named, adapter="0" * 64
        )
        self.settings = replace(settings, **changes)

    def trustee(self, name):
        return Trustee(name, self.identity, self.folder / name)

    def packets(self, count, settings=None):
        settings = settings or self.settings
        seeds = [fresh_seed() for _ in range(count)]
        key = bytes.fromhex(self.certificates[0].key)
        return seeds, [seal(seed, key, settings.info("a")) for seed in seeds]


def pads_of(seeds, size):
    total = np.zeros(size, np.uint32)
    for seed in seeds:
        add_pad(total, seed)
    return total


@pytest.mark.parametrize("post_quantum", [False, True])
def test_a_trustee_returns_the_sum_of_its_pads(tmp_path, monkeypatch, post_quantum):
    silence(monkeypatch)
    slot = Round(tmp_path, post_quantum=post_quantum)
    seeds, packets = slot.packets(4)

    tally = slot.trustees[0].tally(slot.settings, packets)

    assert np.array_equal(tally.vector, pads_of(seeds, 50))
    assert slot.certificates[0].key in dict(slot.settings.trustees).values()
    slot.certificates[0].verify(
        RUN, {"a": pin_of(slot.identity.public_key())}, time.time()
    )


def test_its_noise_is_that_of_the_settings(tmp_path):
    size = 200_000
    slot = Round(tmp_path, size=size)
    seeds, packets = slot.packets(2)

    vector = slot.trustees[0].tally(slot.settings, packets).vector

    noise = integers_of(pads_of(seeds, size) - vector)
    sigma = np.sqrt(variance_of_two(slot.settings.grid.spread))
    assert noise.std() / sigma == pytest.approx(1, abs=0.01)
    # What the server gets is uniform: pads that it lacks are in it.
    # 255 degrees of freedom: a sum above 420 has a probability below 1e-9.
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 420


def test_the_same_slot_is_not_answered_twice_whatever_the_list(tmp_path):
    slot = Round(tmp_path)
    _, packets = slot.packets(3)
    slot.trustees[0].tally(slot.settings, packets)

    for fewer in (packets, packets[1:], packets[:1]):
        with pytest.raises(BudgetError, match="none is answered twice"):
            # A process of its own for every message.
            slot.trustee("a").tally(slot.settings, fewer)


def test_a_slot_of_other_settings_is_not_answered_after_it(tmp_path):
    slot = Round(tmp_path)
    slot.trustees[0].tally(slot.settings, slot.packets(1)[1])
    other = replace(slot.settings, adapter="1" * 64)

    with pytest.raises(BudgetError, match="slot 1 was answered"):
        slot.trustees[0].tally(other, slot.packets(1, other)[1])


def test_a_slot_before_an_answered_one_is_not_answered(tmp_path):
    slot = Round(tmp_path, slot=2)
    slot.trustees[0].tally(slot.settings, slot.packets(1)[1])
    earlier = replace(slot.settings, slot=1)

    with pytest.raises(BudgetError, match="slot 1: slot 2"):
        slot.trustees[0].tally(earlier, slot.packets(1, earlier)[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": "1" * 64},
        {"slot": 2},
        {"size": 51},
        {"clipping_norm": 0.6},
        {"noise_multiplier": 1.0},
        {"num_clients": 21},
        {"colluding": 0},
        {"planned_slots": 4},
    ],
)
def test_packets_of_other_settings_do_not_open_and_spend_nothing(tmp_path, changes):
    slot = Round(tmp_path)
    _, good = slot.packets(2)
    _, other = slot.packets(1, replace(slot.settings, **changes))

    tally = slot.trustees[0].tally(slot.settings, [good[0], *other, good[1]])

    assert tally.vector is None
    assert tally.unopened == (1,)
    assert slot.trustees[0].tally(slot.settings, good).vector is not None


def test_packets_of_another_run_do_not_open(tmp_path):
    slot = Round(tmp_path)
    _, packets = slot.packets(1)
    fresh = slot.trustees[0].certificate("s" * 64, post_quantum=False)
    named = (("a", fresh.key), *slot.settings.trustees[1:])
    other = replace(slot.settings, run="s" * 64, trustees=named)

    assert slot.trustees[0].tally(other, packets).unopened == (0,)


def test_packets_to_another_trustee_do_not_open(tmp_path):
    slot = Round(tmp_path)
    _, packets = slot.packets(1)

    assert slot.trustees[1].tally(slot.settings, packets).unopened == (0,)


def test_a_packet_to_a_trustee_that_shows_anothers_key_does_not_open(tmp_path):
    slot = Round(tmp_path)
    key = slot.certificates[0].key
    shared = replace(slot.settings, trustees=(("a", key), ("b", key)))
    packet = seal(fresh_seed(), bytes.fromhex(key), shared.info("b"))

    assert slot.trustees[0].tally(shared, [packet]).unopened == (0,)


def test_no_pad_counts_twice(tmp_path):
    slot = Round(tmp_path)
    (seed, _), packets = slot.packets(2)
    key = bytes.fromhex(slot.certificates[0].key)

    with pytest.raises(PrivacyError, match="same packet"):
        slot.trustees[0].tally(slot.settings, [packets[0], packets[0]])
    again = seal(seed, key, slot.settings.info("a"))
    with pytest.raises(PrivacyError, match="same seed"):
        slot.trustees[0].tally(slot.settings, [*packets, again])


def test_a_list_has_a_client_and_no_more_than_the_sum_has_room_for(tmp_path):
    slot = Round(tmp_path, num_clients=2)
    for count in (0, 3):
        with pytest.raises(PrivacyError, match="1 to 2 updates"):
            slot.trustees[0].tally(slot.settings, slot.packets(count)[1])


def test_settings_without_its_key_of_the_run_are_refused(tmp_path):
    slot = Round(tmp_path)
    strange = replace(
        slot.settings, trustees=(("a", "33" * 32), *slot.settings.trustees[1:])
    )
    with pytest.raises(PrivacyError, match="not among"):
        slot.trustees[0].tally(strange, slot.packets(1, strange)[1])
    unmet = replace(slot.settings, run="s" * 64)
    with pytest.raises(PrivacyError, match="has no key"):
        slot.trustees[0].tally(unmet, slot.packets(1, unmet)[1])


def test_a_key_is_one_for_a_run_and_ends_with_it(tmp_path):
    slot = Round(tmp_path, slot=3)
    before = slot.trustees[0].certificate(RUN, post_quantum=False)
    assert before.key == slot.certificates[0].key

    slot.trustees[0].tally(slot.settings, slot.packets(1)[1])

    text = (tmp_path / "a" / "ledger.json").read_text()
    assert '"key": ""' in text
    with pytest.raises(PrivacyError, match="has no key"):
        slot.trustees[0].tally(slot.settings, slot.packets(1)[1])


def test_a_key_whose_time_is_over_is_gone_from_the_disk(tmp_path, monkeypatch):
    slot = Round(tmp_path)
    _, packets = slot.packets(1)
    later = time.time() + module._KEY_SECONDS + 1
    monkeypatch.setattr(module.time, "time", lambda: later)

    with pytest.raises(PrivacyError, match="not any more"):
        slot.trustees[0].tally(slot.settings, packets)
    fresh = slot.trustees[0].certificate(RUN, post_quantum=False)
    assert fresh.key != slot.certificates[0].key


def test_the_slot_is_on_disk_before_the_vector_is_made(tmp_path, monkeypatch):
    slot = Round(tmp_path)
    _, packets = slot.packets(2)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trustee, "_sum", die)
    with pytest.raises(KeyboardInterrupt):
        slot.trustees[0].tally(slot.settings, packets)
    monkeypatch.undo()

    with pytest.raises(BudgetError):
        slot.trustee("a").tally(slot.settings, packets[:1])


def test_an_edited_ledger_opens_nothing(tmp_path):
    slot = Round(tmp_path)
    slot.trustees[0].tally(slot.settings, slot.packets(1)[1])
    path = tmp_path / "a" / "ledger.json"
    path.write_text(path.read_text().replace('"slot": 1', '"slot": 0'))

    with pytest.raises(PrivacyError, match="cannot be trusted"):
        slot.trustee("a").tally(slot.settings, slot.packets(1)[1])


def test_a_lost_ledger_has_lost_its_keys(tmp_path):
    slot = Round(tmp_path)
    _, packets = slot.packets(1)
    slot.trustees[0].tally(slot.settings, packets)
    (tmp_path / "a").rename(tmp_path / "gone")

    with pytest.raises(PrivacyError, match="has no key"):
        slot.trustee("a").tally(slot.settings, packets)


def test_a_key_that_others_may_read_is_refused(tmp_path):
    path, pin = write_identity(tmp_path, "identity")
    assert pin_of(load_identity(path).public_key()) == pin
    os.chmod(path, 0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_identity(path)


def test_what_is_no_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_identity(tmp_path / "none")
    path = tmp_path / "text"
    path.touch(mode=0o600)
    path.write_text("text")
    with pytest.raises(ConfigError, match="no trustee's key"):
        load_identity(path)
