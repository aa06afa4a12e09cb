"""Differential privacy around a strategy: clip each update, add noise to the sum."""

import copy
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedllm.errors import PrivacyError
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import (
    SecureGenerator,
    clipped_update,
    noised_sum,
    private_sum,
)
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.round_stats import Round


class ClientLevelDP(Strategy):
    """Client-level differential privacy around `AdapterFedAvg`.

    Each round releases S = sum of clip_C(update) + N(0, (zC)^2 I) and nothing else;
    division by n, the server optimiser and rounding are post-processing.

    Guarantee:
        With `all` or `fixed` sampling each release is one Gaussian mechanism of
        sensitivity C under zero-out and 2C under replace-one, with noise multiplier z;
        with `poisson` it is its Poisson-subsampled form. Any reply, hostile, malformed
        or missing, counts as a vector of norm at most C. n is fixed before the round.
        The ledger is on disk before the new adapter is returned.
        Not covered: what the ledger's `not_covered` lists.

    Args:
        strategy: The wrapped strategy.
        ledger: What the run has spent; also holds z, C and n.
    """

    def __init__(self, strategy: AdapterFedAvg, ledger: Ledger) -> None:
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
        """Clip, sum, add noise once, enter the ledger, then move the adapter.

        Guarantee:
            Total over `replies`: a reply adds at most C to the sum whatever it holds,
            and an empty cohort is a release of noise.
        """
        settings = self.ledger.settings
        clipping_norm, z = settings.clipping_norm, settings.noise_multiplier
        total = private_sum(self.strategy.size, clipping_norm, z)
        for reply in self.strategy.read(replies):
            clipped = clipped_update(
                reply.arrays, self.strategy.reference, clipping_norm
            )
            if clipped.update is None:
                self.strategy.reject(reply, clipped.reason or "malformed")
            else:
                total.add(clipped.update)
        released = noised_sum(total, z, self.generator)
        self.ledger.spend(server_round)
        update = released / settings.num_sampled_clients
        return self.strategy.apply_update(server_round, update), None

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
        settings = self.ledger.settings
        z = settings.noise_multiplier
        for server_round in range(1, twin.config.num_server_rounds + 1):
            empty = private_sum(twin.size, settings.clipping_norm, z)
            noise = noised_sum(empty, z, self.generator)
            twin.apply_update(server_round, noise / settings.num_sampled_clients)
        return twin.reference
