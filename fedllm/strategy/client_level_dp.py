"""Differential privacy around a strategy: clip each update, add noise to the sum."""

from collections.abc import Iterable

from flwr.app import Message

from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import Vector, clipped_update, noised_sum, private_sum
from fedllm.strategy.server_noise import ServerNoise


class ClientLevelDP(ServerNoise[Ledger]):
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

    def noised_update(self, replies: Iterable[Message]) -> Vector:
        """Clip, sum, add noise once, and divide by n.

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
        return released / settings.num_sampled_clients
