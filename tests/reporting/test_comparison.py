"""Intervals over seeds, and the worst client."""

import pytest

from fedllm.reporting.comparison import summarise


def test_intervals_are_over_seeds_and_the_worst_client_has_the_highest_loss():
    rest = dict.fromkeys(
        ("perplexity", "accuracy", "best_round", "seconds", "megabytes", "epsilon")
    )
    rows = [
        {"arm": f"alone-{i}", "seed": seed, "test_loss": 1.0 + i + seed, **rest}
        for i in range(2)
        for seed in range(2)
    ]
    summary = summarise(rows)
    assert summary["alone, worst"]["test_loss"]["mean"] == 2.5
    assert summary["alone, best"]["test_loss"]["mean"] == 1.5
    # t(1) = 12.706 and the standard error of 1 and 2 is 0.5.
    assert summary["alone, mean"]["test_loss"]["half_width_95"] == pytest.approx(6.353)
    assert summary["alone, mean"]["perplexity"] is None
