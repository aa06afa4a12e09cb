"""Aggregators that bound what a share of malicious clients can do."""

from typing import Any

from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from fedllm.config import StrategyConfig
from fedllm.wire.messages import ARRAYS


def robust_strategy(config: StrategyConfig, num_replies: int) -> FedAvg:
    """Make Flower's robust aggregator."""
    keys: dict[str, Any] = {
        "arrayrecord_key": ARRAYS,
        "weighted_by_key": "num-examples",
    }
    if config.aggregator == "median":
        return FedMedian(**keys)
    if config.aggregator == "trimmed-mean":
        return FedTrimmedAvg(beta=config.malicious_share, **keys)
    malicious = int(config.malicious_share * num_replies)
    return Krum(num_malicious_nodes=malicious, **keys)
