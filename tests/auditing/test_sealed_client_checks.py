"""Clients that are broken in one way each are convicted by what is below their pads."""

import hashlib

import numpy as np
import pytest

from fedllm.client import sealing
from fedllm.errors import FedllmError
from fedllm.privacy import sealed_sum
from fedllm.privacy.agreement import Certificate, SlotSettings
from fedllm.privacy.mechanism import clipped
from fedllm.privacy.pads import seal
from fedllm.privacy.sealed_sum import SealedGrid, sealed_grid
from fedllm.privacy.slot_ledger import SlotLedger
from tests.helpers.audits import quick, sealed, sealed_auditor

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")


def encoding(rounded, bounded=lambda update, clip: clipped(update, clip).update):
    """A grid that rounds in its own way, and has no guard of its own."""

    def encode(self, update, clip):
        found = bounded(update, clip)
        if found is None:
            return np.zeros(len(update), np.int64)
        return rounded(found / clip * self.sensitivity).astype(np.int64)

    return lambda patch: patch.setattr(SealedGrid, "encode", encode)


def value_by_value(update, clip):
    return np.clip(np.nan_to_num(update), -clip, clip)


def array_by_array(update, clip):
    parts = [clipped(p, clip).update for p in np.split(update, [len(update) // 2])]
    return None if any(p is None for p in parts) else np.concatenate(parts)


def after_encoding(patch):
    def encode(self, update, clip):
        largest = np.iinfo(np.int32).max
        integers = np.nan_to_num(update / clip * self.sensitivity)
        return np.clip(integers, -largest, largest).astype(np.int64)

    patch.setattr(SealedGrid, "encode", encode)


def nothing_of_a_long_update(patch):
    def encode(self, update, clip):
        if not np.linalg.norm(update) <= clip:
            return np.zeros(len(update), np.int64)
        return np.trunc(update / clip * self.sensitivity).astype(np.int64)

    patch.setattr(SealedGrid, "encode", encode)


def one_seed_for_all_trustees(patch):
    kept = []

    def seed():
        if len(kept) % 3 == 0:
            kept.append(np.random.bytes(32))  # noqa: NPY002
        else:
            kept.append(kept[-1])
        return kept[-1]

    patch.setattr(sealing, "fresh_seed", seed)


def seeds_of_a_fixed_seed(patch):
    # Each client of its own process, begun alike.
    count = []

    def seed():
        count.append(1)
        return hashlib.sha256(bytes([len(count) % 12])).digest()

    patch.setattr(sealing, "fresh_seed", seed)


def a_pad_for_only_two(patch):
    real, count = sealing.add_pad, []

    def add(total, seed):
        count.append(1)
        if len(count) % 3:
            real(total, seed)

    patch.setattr(sealing, "add_pad", add)


def pads_modulo_two_to_the_sixteenth(patch):
    real = sealing.add_pad

    def add(total, seed):
        own = np.zeros_like(total)
        real(own, seed)
        total += own & np.uint32(0xFFFF)

    patch.setattr(sealing, "add_pad", add)


def a_pad_of_few_bytes(patch):
    real = sealing.add_pad

    def add(total, seed):
        own = np.zeros(8, np.uint32)
        real(own, seed)
        total += np.resize(own, len(total))

    patch.setattr(sealing, "add_pad", add)


def hashing(*left_out):
    """A context that leaves some fields out."""

    def broken(patch):
        def context(self):
            kept = [v for f, v in vars(self).items() if f not in left_out]
            return hashlib.sha256(repr(kept).encode()).digest()

        patch.setattr(SlotSettings, "context", property(context))

    return broken


def without_the_name(patch):
    patch.setattr(SlotSettings, "info", lambda self, name: self.context)


def sealed_for_nothing(patch):
    patch.setattr(sealing, "seal", lambda seed, key, info: seal(seed, key, b""))
    real = SlotSettings.info
    patch.setattr(SlotSettings, "info", lambda self, name: real(self, name)[:0])


def no_check(target, name):
    return lambda patch: patch.setattr(target, name, lambda *_: None)


def a_failure_is_a_code(patch):
    def integers(client, settings, train):
        try:
            trained, received = train()
        except (ValueError, MemoryError, TimeoutError) as error:
            raise FedllmError(str(error)) from None
        return sealing._encoded(trained, received, settings.grid, settings)

    patch.setattr(sealing, "_integers", integers)


def a_failure_is_a_long_reply(patch):
    real = sealing.sealed_content

    def content(masked, packets):
        found = real(masked, packets)
        if content.failed:
            found.config_records["sealed"]["failed"] = True
        return found

    content.failed = False

    def note(*_):
        content.failed = True
        return "failed"

    patch.setattr(sealing, "code_of", note)
    patch.setattr(sealing, "sealed_content", content)


def slots_in_any_order(patch):
    def spend(self, run, slot):
        with self._folder.locked() as content:
            last = content["slots"].get(run, 0)
            if slot == last:
                raise FedllmError("again")
            self._folder.write({**content, "slots": {**content["slots"], run: slot}})

    patch.setattr(SlotLedger, "spend", spend)


def the_name_alone_is_pinned(patch):
    def verify(self, run, pins, now):
        if self.name not in pins or now >= self.expires:
            raise FedllmError("unknown")

    patch.setattr(Certificate, "verify", verify)


def keys_live_for_ever(patch):
    real = Certificate.verify
    patch.setattr(
        Certificate, "verify", lambda self, run, pins, now: real(self, run, pins, 0)
    )


def grid_of(**changes):
    """A grid for other numbers than the run's."""

    def broken(patch):
        def grid(z, trustees, colluding, clients, size):
            given = {"z": z, "k": trustees, "c": colluding}
            given |= {name: change(given[name]) for name, change in changes.items()}
            return sealed_grid(given["z"], given["k"], given["c"], clients, size)

        patch.setattr("fedllm.privacy.agreement.sealed_grid", grid)

    return broken


BROKEN = [
    ("clipped integers", "no clipping", encoding(np.trunc, lambda u, c: u)),
    ("clipped integers", "clipped value by value", encoding(np.trunc, value_by_value)),
    ("clipped integers", "clipped array by array", encoding(np.trunc, array_by_array)),
    ("clipped integers", "clipped after encoding", after_encoding),
    ("clipped integers", "rounded to the nearest", encoding(np.rint)),
    (
        "clipped integers",
        "rounded away from zero",
        encoding(lambda v: np.sign(v) * np.ceil(np.abs(v))),
    ),
    ("clipped integers", "a long update is dropped", nothing_of_a_long_update),
    (
        "pads",
        "a seed for each slot",
        lambda p: p.setattr(sealing, "fresh_seed", lambda: bytes(32)),
    ),
    ("pads", "one seed for all trustees", one_seed_for_all_trustees),
    ("pads", "seeds of a fixed seed", seeds_of_a_fixed_seed),
    ("pads", "no pad for one trustee", a_pad_for_only_two),
    ("pads", "pads of 16 bits", pads_modulo_two_to_the_sixteenth),
    ("pads", "a pad that repeats", a_pad_of_few_bytes),
    ("packets", "a context without the noise", hashing("noise_multiplier")),
    ("packets", "a context without the adapter", hashing("adapter")),
    ("packets", "a context without the slot", hashing("slot")),
    ("packets", "a context without the keys", hashing("trustees")),
    ("packets", "a packet for any name", without_the_name),
    ("packets", "a packet for anything", sealed_for_nothing),
    ("clients refuse", "no signature is checked", the_name_alone_is_pinned),
    ("clients refuse", "no certificate is checked", no_check(Certificate, "verify")),
    ("clients refuse", "keys live for ever", keys_live_for_ever),
    (
        "clients refuse",
        "the floors are not checked",
        no_check(sealing, "_require_floors"),
    ),
    (
        "clients refuse",
        "the promise is not checked",
        no_check(sealing, "require_promised"),
    ),
    ("clients refuse", "a slot is answered again", no_check(SlotLedger, "spend")),
    ("clients refuse", "the slot's number goes back", slots_in_any_order),
    (
        "clients refuse",
        "any adapter",
        lambda p: p.setattr(sealing, "adapter_digest", lambda _: "0" * 64),
    ),
    ("failures", "a failure is a code", a_failure_is_a_code),
    ("failures", "a failure shows in the reply", a_failure_is_a_long_reply),
    ("grid", "half the noise", grid_of(z=lambda z: z / 2)),
    ("grid", "twice the noise", grid_of(z=lambda z: 2 * z)),
    ("grid", "those that collude are forgotten", grid_of(c=lambda c: 0)),
]


@pytest.mark.parametrize(
    ("check", "broken"), [b[::2] for b in BROKEN], ids=[b[1] for b in BROKEN]
)
def test_a_broken_client_is_convicted(check, broken, monkeypatch):
    broken(monkeypatch)

    assert not sealed_auditor().check(check).passed


def test_a_sum_that_wraps_around_is_convicted(monkeypatch):
    # So little noise that a clip has too many units for a sum of 32 bits.
    config = sealed(**{"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1e-3})
    assert sealed_auditor(config).check("grid").passed
    monkeypatch.setattr(sealed_sum, "_HALF", 1 << 40)

    result = sealed_auditor(config).check("grid")

    assert not result.passed and "DO NOT FIT" in result.text


@pytest.mark.parametrize("check", sorted({b[0] for b in BROKEN}))
@pytest.mark.parametrize("hybrid", [False, True])
def test_todays_clients_are_acquitted(check, hybrid):
    result = sealed_auditor(sealed(**{"privacy.post-quantum": hybrid})).check(check)

    assert result.passed, result.text


def test_a_correct_encoding_written_anew_is_acquitted(monkeypatch):
    encoding(lambda values: np.trunc(values * (1 - 1e-12)))(monkeypatch)

    assert sealed_auditor().check("clipped integers").passed
