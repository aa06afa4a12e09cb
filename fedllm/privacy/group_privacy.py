"""What a person with rows at several clients has: the unit is the person within one client.

Such a person is a group of m records, one a client, each with a secret coin of its own. Under
one noise for all, a step adds the clipped gradients of those whose coins fell. So it is at
worst a Gaussian whose mean is 0, C, ... or m C with the probabilities of a binomial: all
gradients point one way (Ganesh 2024, arXiv 2401.10294).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import Any

from fedllm.privacy.accounting import Event, gaussian_epsilon

# As for single records: below this noise the grid of losses grows beyond use.
_SMALLEST_PLD_NOISE = 0.25
_LARGEST_PLD_EPSILON = 5e3

# dp-accounting inverts the loss by a search at each point, 0.1 ms each. A coarser grid than
# that of single records is pessimistic by less than 0.1 % where epsilon is above 1.
_POINTS = 8000


@lru_cache(maxsize=64)
def group_epsilon(event: Event, delta: float, size: int) -> float:
    """Return the epsilon of Poisson batches, add-or-remove of a group of records.

    Args:
        event: Noise multiplier z for one record, sampling probability q, releases.
        delta: In (0, 1).
        size: m, the records of the group, at least 1.

    Guarantee:
        An upper bound on the true epsilon of all releases together.
    """
    z, q, count = event
    if count == 0:
        return 0.0
    # Sampling never costs privacy: without it all m are in every batch, and add m C.
    bound = gaussian_epsilon(z / size, count, delta)
    span = gaussian_epsilon(z / (2 * size), count, delta)
    if q >= 1 or z / size < _SMALLEST_PLD_NOISE or span > _LARGEST_PLD_EPSILON:
        return bound
    composed = _step(z, q, size).self_compose(count)
    return min(bound, float(composed.get_epsilon_for_delta(delta)))


def group_chances(size: int, probability: float) -> Sequence[float]:
    """Return the probabilities that 0, 1, ... of a group's records are in a batch."""
    rest = 1 - probability
    return [
        comb(size, k) * probability**k * rest ** (size - k) for k in range(size + 1)
    ]


@lru_cache(maxsize=8)
def _step(z: float, q: float, size: int) -> Any:
    """Return the privacy loss distribution of one release, rounded up to a grid."""
    from dp_accounting.pld import privacy_loss_distribution

    mean = size / z
    return privacy_loss_distribution.from_mixture_gaussian_mechanism(
        standard_deviation=z,
        sensitivities=list(range(size + 1)),
        sampling_probs=group_chances(size, q),
        # The loss of a Gaussian, ten standard deviations to each side.
        value_discretization_interval=max(
            1e-4, (mean * mean / 2 + 10 * mean) / _POINTS
        ),
    )
