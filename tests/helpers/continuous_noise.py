"""The noise of before: floats by the inverse CDF of 52 random bits, on a sum of floats.

It is kept for the tests that the audit convicts it. Its draws have a grid of their own, which
is not the sum's: a value whose lowest bits are published may rule out a neighbour.
"""

import numpy as np
from scipy.special import ndtr, ndtri

from fedllm.auditing.harness import ZeroNoise
from fedllm.privacy.mechanism import FixedPointSum, clipped_update
from fedllm.strategy.client_level_dp import ClientLevelDP


class ContinuousNoise(ClientLevelDP):
    """A round as it was."""

    def aggregate_train(self, server_round, replies):
        settings = self.ledger.settings
        z, clip = settings.noise_multiplier, settings.clipping_norm
        total = FixedPointSum(self.strategy.size, clip)
        for reply in self.strategy.read(replies):
            clipped = clipped_update(reply.arrays, self.strategy.reference, clip)
            if clipped.update is not None:
                total.add(clipped.update)
        released = total.total()
        if not isinstance(self.generator, ZeroNoise):
            words = self.generator.words()(self.strategy.size)
            released += normal(words >> np.uint64(12)) * (z * clip)
        self.ledger.spend(server_round)
        update = released / settings.num_sampled_clients
        return self.strategy.apply_update(server_round, update), None


def normal(integers):
    """Return the draws of integers below 2**52."""
    uniforms = integers.astype(np.float64)
    uniforms += 0.5
    uniforms *= 2.0**-52
    return ndtri(uniforms)


def explained(value, total, scale, publish, around=64):
    """Return whether some draw makes a published value of a sum.

    Args:
        value: What was published.
        total: The sum before the noise.
        scale: z C.
        publish: What is done to a release.
        around: Integers on either side that are tried.
    """
    near = round(float(ndtr((value.release - total) / scale)) * 2.0**52 - 0.5)
    integers = np.arange(max(near - around, 0), near + around + 1, dtype=np.int64)
    return bool((publish(total + normal(integers) * scale) == value.published).any())
