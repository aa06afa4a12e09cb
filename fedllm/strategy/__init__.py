"""Strategy: what the server makes of replies."""

from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg

__all__ = ["AdapterFedAvg", "ClientLevelDP", "make_strategy"]
