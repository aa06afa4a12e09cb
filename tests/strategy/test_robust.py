"""Robust aggregators ignore an outlier."""

import numpy as np
import pytest

from fedllm.strategy.build import make_strategy
from tests.helpers.strategies import START, answer, ask, moved, public, shifted


@pytest.mark.parametrize("aggregator", ["median", "trimmed-mean", "krum"])
def test_a_robust_aggregator_ignores_an_outlier(aggregator):
    strategy = make_strategy(
        public(**{"strategy.aggregator": aggregator}), START, [1, 2, 3, 4, 5], None
    )
    messages = ask(strategy)
    replies = [answer(m, shifted(0.1), 1) for m in messages[:4]]
    replies.append(answer(messages[4], shifted(500.0), 1))

    record, _ = strategy.aggregate_train(1, replies)

    np.testing.assert_allclose(moved(strategy, record), 0.1, atol=1e-5)
