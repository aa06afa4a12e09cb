"""Make the strategy of a run config."""

import numpy as np
import numpy.typing as npt

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.joint_record_dp import JointRecordDP
from fedllm.strategy.sealed_dp import Roster, SealedDP
from fedllm.strategy.sealed_record_dp import SealedRecordDP


def make_strategy(
    config: RunConfig,
    reference: dict[str, npt.NDArray[np.float32]],
    population: list[int],
    ledger: Ledger | JointLedger | None,
    roster: Roster | None = None,
) -> AdapterFedAvg | ClientLevelDP | JointRecordDP | SealedDP | SealedRecordDP:
    """Make the strategy of a run: FedAvg, wrapped in DP if there is a ledger.

    Args:
        config: The run config.
        reference: The first global adapter's trained values by name.
        population: Node ids of all clients.
        ledger: The run's privacy ledger; None under `privacy.unit="none"`, and where
            each client adds the noise itself.
        roster: The trustees of a sealed run; None otherwise.

    Raises:
        PrivacyError: The server is to add noise and there is no ledger for it: nothing
            would be clipped or noised.
    """
    if config.is_joint != isinstance(ledger, JointLedger):
        raise PrivacyError("privacy.noise is 'joint', or the ledger is, but not both")
    if ledger is None and config.privacy.unit == "client":
        raise PrivacyError("privacy.unit is 'client', and there is no ledger")
    if config.is_sealed != (roster is not None):
        raise PrivacyError(
            "privacy.trust is 'trustees', or there are some, but not both"
        )
    strategy = AdapterFedAvg(config, reference, population)
    if isinstance(ledger, JointLedger):
        if roster is not None:
            return SealedRecordDP(strategy, ledger, roster)
        return JointRecordDP(strategy, ledger)
    if ledger is None:
        return strategy
    if roster is not None:
        return SealedDP(strategy, ledger, roster)
    return ClientLevelDP(strategy, ledger)
