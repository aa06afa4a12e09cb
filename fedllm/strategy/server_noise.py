"""Differential privacy around a strategy whose server noises a sum, whatever the unit."""

import copy
from abc import abstractmethod
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.errors import PrivacyError
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import SecureGenerator, Vector
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.round_stats import Round

LedgerT = TypeVar("LedgerT", bound=Ledger | JointLedger)


class ServerNoise(Strategy, Generic[LedgerT]):
    """One noised sum a round around `AdapterFedAvg`, and nothing else.

    Guarantee:
        The ledger is on disk before the new adapter is returned. Division by a number that
        is fixed before round 1, the server optimiser and rounding are post-processing.

    Args:
        strategy: The wrapped strategy.
        ledger: What the run has spent; its settings hold the noise and the divisor.
    """

    def __init__(self, strategy: AdapterFedAvg, ledger: LedgerT) -> None:
        self.strategy = strategy
        self.ledger = ledger
        self.generator = SecureGenerator()

    @property
    def averaging(self) -> AdapterFedAvg:
        """The wrapped strategy, which averages."""
        return self.strategy

    @property
    def round(self) -> Round:
        """Counts and failures of the latest round."""
        return self.strategy.round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort, unless the budget is spent.

        Raises:
            PrivacyError: The round would pass `privacy.max-epsilon`.
        """
        if not self.ledger.may_spend(self.strategy.config.privacy.max_epsilon):
            raise PrivacyError("the next round would pass privacy.max-epsilon")
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sum, add noise once, enter the ledger, then move the adapter.

        Guarantee:
            Total over `replies`: a round without any is a release of noise.
        """
        update = self.noised_update(replies)
        self.ledger.spend(server_round)
        return self.strategy.apply_update(server_round, update), None

    @abstractmethod
    def noised_update(self, replies: Iterable[Message]) -> Vector:
        """Return the mean update of a round's replies, (d,), after the noise."""

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: a loss on private rows would leave without noise."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing."""
        return None

    def summary(self) -> None:
        """Log nothing; the run logs its own summary."""

    def noise_alone(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the adapter after all rounds if no client had any data.

        Fresh noise goes through the real server update, optimiser and learning rates
        included; it costs no privacy, since no client's data is read.
        """
        twin = copy.copy(self.strategy)
        twin.reference = dict(self.strategy.reference)
        twin.optimizer = copy.deepcopy(self.strategy.optimizer)
        for server_round in range(1, twin.config.num_server_rounds + 1):
            twin.apply_update(server_round, self.noised_update([]))
        return twin.reference
