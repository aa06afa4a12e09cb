"""Aggregators that bound what a share of malicious clients can do.

A further one is a case in `_aggregator` and its name in `StrategyConfig.aggregator`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum

from fedllm.config import StrategyConfig
from fedllm.privacy.mechanism import Vector
from fedllm.wire.messages import ARRAYS, METRICS, array_record

NUM_EXAMPLES = "num-examples"


def combine_robustly(
    config: StrategyConfig,
    server_round: int,
    replies: Sequence[Message],
    reference: Mapping[str, npt.NDArray[Any]],
) -> Vector | None:
    """Return the update that Flower's robust aggregator makes of validated replies.

    Args:
        config: Names the aggregator and the share of malicious clients.
        server_round: The round.
        replies: Each as `validated_reply` makes it; at least one.
        reference: The global adapter by name.

    Returns:
        (d,) the combined adapter minus the global one, in the order of the combined
        names; None if Flower's aggregator returns nothing.
    """
    combined, _ = _aggregator(config, len(replies)).aggregate_train(
        server_round, replies
    )
    if combined is None:
        return None
    updates = [
        np.asarray(value, np.float64).ravel() - reference[name].ravel()
        for name, value in zip(combined, combined.to_numpy_ndarrays(), strict=True)
    ]
    return np.concatenate(updates)


def validated_reply(
    message: Message, arrays: Mapping[str, npt.NDArray[Any]], num_examples: int
) -> Message:
    """Return a message that holds checked arrays and a checked weight alone."""
    metrics = MetricRecord({NUM_EXAMPLES: num_examples})
    message.content = RecordDict({ARRAYS: array_record(arrays), METRICS: metrics})
    return message


def _aggregator(config: StrategyConfig, num_replies: int) -> FedAvg:
    """Make Flower's robust aggregator."""
    keys: dict[str, Any] = {"arrayrecord_key": ARRAYS, "weighted_by_key": NUM_EXAMPLES}
    match config.aggregator:
        case "median":
            return FedMedian(**keys)
        case "trimmed-mean":
            return FedTrimmedAvg(beta=config.malicious_share, **keys)
        case "krum":
            malicious = int(config.malicious_share * num_replies)
            return Krum(num_malicious_nodes=malicious, **keys)
        case _:
            raise ValueError(f"no robust aggregator is called {config.aggregator!r}")
