"""A server that opens anything but the noised sum is convicted, as is one that pays late."""

import numpy as np
import pytest

from fedllm.privacy.ledger import Ledger
from fedllm.strategy import sealed_dp
from fedllm.strategy.sealed_dp import SealedDP
from tests.helpers.audits import quick, sealed, sealed_auditor

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")


def a_client_counts_twice(patch):
    real, opened = sealed_dp.read_residues, []

    def twice(message, size):
        reply, vector = real(message, size)
        if vector is not None and not opened:
            # Below its pads, as whoever has them could make it.
            opened.append(message)
            vector = vector + np.uint32(1000)
        return reply, vector

    patch.setattr(sealed_dp, "read_residues", twice)


def without_a_sign(patch):
    patch.setattr(sealed_dp, "integers_of", lambda values: values.astype(np.int64))


def in_the_order_sent(patch):
    patch.setattr(sealed_dp, "_in_order", lambda vector, reference: vector)


def divided_by_replies(patch):
    real = SealedDP._opened

    def opened(self, slot):
        found = real(self, slot)
        n = self.ledger.settings.num_sampled_clients
        return None if found is None else found * n / len(slot.senders)

    patch.setattr(SealedDP, "_opened", opened)


def noise_of_its_own(patch):
    real = SealedDP._checked

    def checked(self, slot):
        found = real(self, slot)
        return (
            None
            if found is None
            else found + np.random.default_rng().normal(size=len(found))
        )

    patch.setattr(SealedDP, "_checked", checked)


def no_guard(patch):
    patch.setattr(sealed_dp, "is_plausible", lambda *_: True)


def spends_afterwards(patch):
    spend, aggregate = Ledger.spend, SealedDP.aggregate_train
    patch.setattr(Ledger, "spend", lambda self, server_round: None)

    def later(self, server_round, replies):
        found = aggregate(self, server_round, replies)
        spend(self.ledger, server_round)
        return found

    patch.setattr(SealedDP, "aggregate_train", later)


def forgets_a_slot(patch):
    spend = Ledger.spend
    patch.setattr(Ledger, "spend", lambda self, r: None if r == 2 else spend(self, r))


def counts_all_noise_as_secret(patch):
    real = Ledger.epsilons
    patch.setattr(
        Ledger,
        "epsilons",
        lambda self: self.epsilons_of_adapters() if self else real(self),
    )


BROKEN = [
    ("opened sum", a_client_counts_twice),
    ("opened sum", without_a_sign),
    ("opened sum", in_the_order_sent),
    ("opened sum", divided_by_replies),
    ("opened sum", noise_of_its_own),
    ("length guard", no_guard),
    ("ledger", spends_afterwards),
    ("ledger", forgets_a_slot),
    ("ledger", counts_all_noise_as_secret),
]


@pytest.mark.parametrize(
    ("check", "broken"), BROKEN, ids=[b[1].__name__ for b in BROKEN]
)
def test_a_broken_server_is_convicted(check, broken, monkeypatch):
    broken(monkeypatch)

    assert not sealed_auditor().check(check).passed


@pytest.mark.parametrize("check", ["opened sum", "length guard", "ledger"])
def test_todays_server_is_acquitted(check):
    result = sealed_auditor(sealed(**{"privacy.post-quantum": True})).check(check)

    assert result.passed, result.text
