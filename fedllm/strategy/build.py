"""Make the strategy of a run config."""

import numpy as np
import numpy.typing as npt

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.ledger import Ledger
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg


def make_strategy(
    config: RunConfig,
    reference: dict[str, npt.NDArray[np.float32]],
    population: list[int],
    ledger: Ledger | None,
) -> AdapterFedAvg | ClientLevelDP:
    """Make the strategy of a run: FedAvg, wrapped in DP if there is a ledger.

    Args:
        config: The run config.
        reference: The first global adapter's trained values by name.
        population: Node ids of all clients.
        ledger: The run's privacy ledger; None under `privacy.unit="none"`.

    Raises:
        PrivacyError: Clients are promised privacy and there is no ledger: nothing would
            be clipped or noised.
    """
    if ledger is None and config.privacy.unit == "client":
        raise PrivacyError("privacy.unit is 'client', and there is no ledger")
    strategy = AdapterFedAvg(config, reference, population)
    return strategy if ledger is None else ClientLevelDP(strategy, ledger)
