"""Cohorts: their size, their chances, their seed."""

import numpy as np

from fedllm.strategy.build import make_strategy
from tests.helpers.strategies import START, ask, open_ledger, private, public


def test_fixed_cohorts_have_the_promised_size_and_vary(tmp_path):
    keys = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.3}
    ledger = open_ledger(tmp_path, 1.0, 3)
    strategy = make_strategy(private(**keys), START, list(range(1, 11)), ledger)

    cohorts = [
        tuple(m.metadata.dst_node_id for m in ask(strategy, r)) for r in range(1, 30)
    ]

    assert {len(set(cohort)) for cohort in cohorts} == {3}
    assert len(set(cohorts)) > 10


def test_fixed_cohorts_under_dp_do_not_follow_from_the_seed(tmp_path):
    keys = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.3}

    def cohorts(folder):
        folder.mkdir()
        ledger = open_ledger(folder, 1.0, 3)
        strategy = make_strategy(private(**keys), START, list(range(1, 11)), ledger)
        return [[m.metadata.dst_node_id for m in ask(strategy, r)] for r in range(30)]

    # By chance they are equal with probability 120^-30.
    assert cohorts(tmp_path / "one") != cohorts(tmp_path / "two")


def test_poisson_cohorts_follow_the_binomial(tmp_path):
    from scipy.stats import chisquare

    keys = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.3}
    ledger = open_ledger(tmp_path, 1.0, 1.2, sampling="poisson", population_size=4)
    strategy = make_strategy(private(**keys), START, [1, 2, 3, 4], ledger)

    sizes = [len(ask(strategy, r)) for r in range(3000)]

    expected = 3000 * np.array([0.2401, 0.4116, 0.2646, 0.0756, 0.0081])
    assert chisquare(np.bincount(sizes, minlength=5), expected).pvalue > 1e-5
    assert 0 in sizes


def test_without_dp_the_cohorts_come_from_the_seed():
    keys = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.3}

    def cohorts():
        strategy = make_strategy(public(**keys), START, list(range(1, 11)), None)
        return [[m.metadata.dst_node_id for m in ask(strategy, r)] for r in range(1, 6)]

    assert cohorts() == cohorts()
    assert len({tuple(cohort) for cohort in cohorts()}) > 1
