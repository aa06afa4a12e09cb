"""Record level with one noise for the whole federation, around a strategy."""

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.joint_sum import JointSum
from fedllm.privacy.mechanism import Vector
from fedllm.strategy.server_noise import ServerNoise
from fedllm.wire.messages import NOISE_MULTIPLIER, TOTAL_ROWS, read_sum


class JointRecordDP(ServerNoise[JointLedger]):
    """DP-SGD over the records of all clients around `AdapterFedAvg`: a step is a round.

    Each step releases the sum over all clients of their records' clipped gradients plus
    noise of z * max_grad_norm, and nothing else. Its division by B, the sign and the server
    optimiser are post-processing.

    Guarantee:
        Each release is one Poisson-subsampled Gaussian mechanism of noise multiplier z and
        probability q under add-or-remove of one record, whoever holds it. No reply is
        rejected for what its integers are: each is projected onto a ball that public numbers
        fix (`JointSum`). A reply that is missing, late, or not of the declared form counts as
        zero. q and B are fixed before round 1 by numbers that the clients' owners declared.
        The ledger is on disk before the new adapter is returned.
        Not covered: what the ledger's `not_covered` lists.

    Args:
        strategy: The wrapped strategy.
        ledger: What the run has spent; also holds z, q and B.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make a message to every client, with the public numbers of the run.

        Raises:
            PrivacyError: The step would pass `privacy.max-epsilon`.
        """
        settings = self.ledger.settings
        record = ConfigRecord(dict(config.items()))
        record[NOISE_MULTIPLIER] = settings.noise_multiplier
        record[TOTAL_ROWS] = settings.total_rows
        return super().configure_train(server_round, arrays, record, grid)

    def noised_update(self, replies: Iterable[Message]) -> Vector:
        """Sum, add noise once, divide by B, and turn the gradient into a descent.

        Guarantee:
            Total over `replies`. Without a reply it is a release of noise.
        """
        settings, strategy = self.ledger.settings, self.strategy
        total = JointSum(
            strategy.size, settings.noise_multiplier, settings.expected_batch_size
        )
        expected = {
            node_id: settings.sampling_probability * count
            for node_id, count in zip(
                strategy.population, settings.declared_rows, strict=True
            )
        }
        for reply in strategy.decoded(replies, lambda m: read_sum(m, strategy.shapes)):
            if reply.arrays is None or reply.node_id not in expected:
                strategy.reject(reply, "malformed")
                continue
            flat = [np.ravel(reply.arrays[name]) for name in strategy.reference]
            total.add(np.concatenate(flat), expected[reply.node_id])
        released = total.noised(settings.max_grad_norm, self.generator)
        return -released / settings.expected_batch_size
