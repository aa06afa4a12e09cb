"""Canary clients: published figures, and the end of a budget."""

import pytest

from fedllm.auditing.canary_clients import run_canaries
from fedllm.auditing.harness import Bench
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.accounting import gaussian_epsilon
from tests.helpers.audits import auditor, private


@pytest.mark.parametrize(
    ("z", "epsilon", "certified"),
    [(0.5, 9.89, 2.89), (1.0, 4.56, 1.48), (2.0, 1.95, 0.61)],
)
def test_one_release_gives_about_the_published_figures(tmp_path, z, epsilon, certified):
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": z}
    config = private(**keys)
    settings = privacy_settings(config, 1000, 100_000)
    bench = Bench(config, settings, 100_000, 1000, tmp_path)

    found = run_canaries(bench, 1000, 1, honest=False)

    assert found.accounted == gaussian_epsilon(z, 1, 1e-5)
    # mu has a standard deviation of 0.063, and epsilon changes by about 4.6 a unit of mu
    # (6.4 at z = 0.5): five of them. Published figures are one draw each, as ours.
    assert found.estimate.epsilon == pytest.approx(epsilon, abs=5 * 0.063 * 6.4)
    # Over 200 draws its standard deviation was 0.37, 0.26 and 0.20.
    assert found.certified.epsilon == pytest.approx(certified, abs=5 * 0.37)
    assert 0 < found.certified.epsilon < found.accounted


def test_the_rehearsal_ends_where_the_budget_does():
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    audit = auditor(private(**keys, **{"privacy.max-epsilon": 7.0})).run()

    assert audit.rehearsal.rounds == 2
    assert audit.rehearsal.accounted == gaussian_epsilon(1.0, 2, 1e-5)
    assert audit.passed
