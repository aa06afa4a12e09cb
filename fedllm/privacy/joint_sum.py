"""One noise for a federation's sum of clipped gradients, all on one grid of integers.

A client cuts each record's clipped gradient toward zero to integers of norm at most
U = `record_units`, and sends the exact sum over its batch. The server projects each client's
sum onto a ball, adds all of them and adds noise once.

What one record changes. Let x and x' be a client's sums with and without one record, so
|x - x'| <= U. Let P be the projection onto the ball of radius R around zero. A ball is convex,
so |P(x) - P(x')| <= |x - x'|. What is added is p = trunc(y), where y is P(x) as computed:
|y - P(x)| <= E R with E = 1e-12, since a norm that is summed pairwise and one product have a
relative error below 1e-14. Cutting changes each value's distance by less than one, so

    |p - p'| < |y - y'| + sqrt(d) <= U + 2 E R + sqrt(d) <= A.

U is chosen so that the last step holds for the largest R of any client, with
A = `integer_sensitivity(z)`. All other clients' sums are the same on both sides. So adding or
removing one record, whatever it holds, changes the sum by integers of norm at most A.
"""

import math

import numpy as np

from fedllm.errors import PrivacyError
from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.mechanism import Integers, SecureGenerator, Vector

_ERROR = 1e-12
"""E: a bound on the error of a projection, as a share of the radius."""

_FEWEST_UNITS = 1 << 10
_LARGEST_SUM = 1 << 62


def most_records(expected: float) -> float:
    """Return more records than a Poisson batch has, but with a probability below 1e-11.

    Args:
        expected: How many it has on average.
    """
    # Bernstein: P(X >= m + t) <= exp(-t^2 / (2 m + 2 t / 3)), here at most exp(-27).
    return expected + 18 + 8 * math.sqrt(expected)


def largest_batch(expected_batch_size: int) -> int:
    """Return how many records a sealed sum has room for, of all clients' expected batch B."""
    return math.ceil(most_records(expected_batch_size))


def record_units(size: int, noise_multiplier: float, expected_batch_size: int) -> int:
    """Return U, the units of the grid that the largest norm of one gradient has.

    It is a function of public numbers, so that clients and server agree on it.

    Args:
        size: d, the number of trained values.
        noise_multiplier: z > 0.
        expected_batch_size: B, of the whole federation.

    Raises:
        PrivacyError: z is so large that the grid would be coarse.
    """
    try:
        sensitivity = integer_sensitivity(noise_multiplier)
    except ValueError as error:
        raise PrivacyError(f"privacy.noise-multiplier: {error}") from None
    largest_radius = most_records(expected_batch_size) * sensitivity
    slack = math.isqrt(size) + 1 + math.ceil(2 * _ERROR * largest_radius) + 1
    if sensitivity - slack < max(_FEWEST_UNITS, slack):
        raise PrivacyError(
            f"privacy.noise-multiplier: {noise_multiplier:g} is too large for "
            f"{size:,} trained values under privacy.noise='joint'"
        )
    return sensitivity - slack


class JointSum:
    """The sum over all clients of one step.

    Args:
        size: d, the number of trained values.
        noise_multiplier: z > 0.
        expected_batch_size: B, of the whole federation.

    Raises:
        PrivacyError: The integers might not fit, or the grid would be coarse.
    """

    def __init__(
        self, size: int, noise_multiplier: float, expected_batch_size: int
    ) -> None:
        self._units = record_units(size, noise_multiplier, expected_batch_size)
        self._total = np.zeros(size, np.int64)
        self._reach = 0.0

    def add(self, integers: Integers, expected_records: float) -> None:
        """Add one client's sum, projected onto its ball.

        Args:
            integers: (d,) the sum of the client's records, whatever it holds.
            expected_records: q times the rows that the client declared, at most B: the
                ball holds what `most_records` of them can add.

        Raises:
            PrivacyError: The integers might not fit.

        Guarantee:
            Total over `integers`. The ball is fixed by public numbers. What a client adds
            changes by at most A if one of its records joins or leaves (see the module), and
            an honest client's sum is added as it is.
        """
        radius = most_records(expected_records) * self._units
        self._reach += radius
        if self._reach > _LARGEST_SUM:
            raise PrivacyError(
                "train.batch-size: the batches of all clients do not fit a sum of 64 bits"
            )
        self._total += _projected(integers, radius)

    def noised(self, max_grad_norm: float, generator: SecureGenerator) -> Vector:
        """Return the sum after the noise, (d,) float64: the one release of a step.

        Args:
            max_grad_norm: Largest norm of one gradient, which has U units.
            generator: The source of the noise.

        Guarantee:
            A Gaussian mechanism of noise multiplier z on the sum, under add-or-remove of
            one record of a batch; with Poisson coins of probability q at the clients, its
            Poisson-subsampled form.
        """
        noise = generator.discrete_gaussian(len(self._total))
        released: Vector = (self._total + noise).astype(np.float64)
        released *= max_grad_norm / self._units
        return released


def _projected(integers: Integers, radius: float) -> Integers:
    """Return integers whose norm is at most the radius, unchanged if it is."""
    values = integers.astype(np.float64)
    length = float(np.sqrt(np.sum(np.square(values))))
    if length <= radius:
        return integers
    # Cut toward zero, so that nothing grows.
    return (values * (radius / length)).astype(np.int64)
