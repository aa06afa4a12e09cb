"""What the server makes of replies, in NumPy and Flower's types.

Enters: replies, one at a time, and the global adapter. Leaves: the next global adapter,
and the counts of the round. `ClientLevelDP` wraps `AdapterFedAvg` and is where updates
are clipped and noised; a further aggregator belongs in `robust`. Must not import torch
or transformers, nor any package above `wire` and `privacy`.
"""

from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg

__all__ = ["AdapterFedAvg", "ClientLevelDP", "make_strategy"]
