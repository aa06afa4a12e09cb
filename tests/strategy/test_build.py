"""The strategy for a config."""

import pytest
from flwr.serverapp.strategy import FedAvg

from fedllm.errors import PrivacyError
from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from tests.helpers.strategies import START, noiseless, private


def test_the_wrapper_is_a_flower_strategy_around_fedavg(tmp_path):
    strategy = noiseless(tmp_path)

    assert isinstance(strategy, ClientLevelDP)
    assert isinstance(strategy.strategy, AdapterFedAvg)
    assert isinstance(strategy.strategy, FedAvg)


def test_privacy_without_a_ledger_is_refused_and_not_silently_plain_fedavg():
    with pytest.raises(PrivacyError, match="no ledger"):
        make_strategy(private(), START, [1, 2, 3, 4], None)
