"""Checks without chance convict what they should."""

import pytest

from fedllm.auditing.deterministic_checks import recomputed_epsilon
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import FixedPointSum
from fedllm.strategy.fedavg import AdapterFedAvg
from tests.helpers.audits import auditor, failed, private


def test_a_ledger_that_loses_an_epsilon_is_convicted(monkeypatch):
    real = Ledger.epsilon_after
    monkeypatch.setattr(Ledger, "epsilon_after", lambda s, n: real(s, max(0, n - 1)))

    audit = auditor().run()

    assert "ledger" in failed(audit)


def test_a_sum_that_rounds_away_from_zero_is_convicted(monkeypatch):
    real = FixedPointSum.noised
    monkeypatch.setattr(
        FixedPointSum, "noised", lambda s, noise: real(s, noise) * (1 + 1e-6)
    )

    assert "sensitivity" in failed(auditor().run())


def test_a_client_that_counts_as_often_as_it_replies_is_convicted(monkeypatch):
    real = AdapterFedAvg.read

    def read(self, replies):
        for reply in replies:
            yield from real(self, [reply])

    monkeypatch.setattr(AdapterFedAvg, "read", read)

    assert failed(auditor().run()) == {"sensitivity"}


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_the_recomputed_epsilon_is_that_of_the_rounds_released(rounds):
    settings = privacy_settings(private(), 8, 100)
    content = {"num_rounds": rounds, "sampling_probability": 1.0}

    found = recomputed_epsilon(settings, content)

    expected = gaussian_epsilon(settings.noise_multiplier, rounds, 1e-5)
    assert found == pytest.approx(expected, rel=1e-4)
