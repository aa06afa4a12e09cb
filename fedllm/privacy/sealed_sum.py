"""The grid of a sealed sum: integers modulo 2^32 that trustees noise before they open them.

Each of k trustees adds D(s), the discrete Gaussian, to every value; c of them may tell the
server theirs. What is left is a sum of k - c, which is D(s sqrt(k - c)) up to a factor below
1 + 1e-76 a value (`discrete_gaussian`, "A sum", with a spread of 1: s' is above 700). Adding
it to integers is a post-processing of a Gaussian mechanism of variance (k - c) s^2 - 4 (same
place, "The Gaussian"). A client's integers have a norm of at most

    A <= sqrt((k - c) s^2 - 4) / z,

so the server with c trustees sees a Gaussian mechanism of noise multiplier at least z, and whoever
sees the sum alone one of at least z sqrt(k / (k - c)). Reducing a noised sum modulo 2^32 is
post-processing: a sum that wraps around is spoilt, and tells no more.

What has a norm of at most A is one vector: a client's update, or a record's clipped gradient, of
which a client adds up as many as its coins chose. Integers add exactly, so that one record more
or less, whatever it holds, changes the sum of its client, and of all, by integers of norm at
most A. How many vectors a sum holds matters to its length alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedllm.errors import PrivacyError
from fedllm.privacy.discrete_gaussian import SPREAD, sample_of_two, variance_of_two
from fedllm.privacy.mechanism import (
    FixedPointSum,
    Integers,
    SecureGenerator,
    Vector,
    clipped,
)
from fedllm.privacy.pads import MODULUS_BITS

MOST_TRUSTEES = 10

_HALF = 1 << (MODULUS_BITS - 1)
_DEVIATIONS = 10
"""Standard deviations of noise for which a sum has room."""
# Units that a norm needs for each value, so that what is cut off is a small part of it.
_LEAST_UNITS_A_VALUE = 8
_T = 21.0
"""t of the length guard: an honest sum is outside with a probability below 4 e^-t < 1e-8."""


@dataclass(frozen=True)
class SealedGrid:
    """The integers of one run.

    Attributes:
        spread: Of each trustee's noise, `sample_of_two`.
        sensitivity: A, the largest norm of one client's integers.
    """

    spread: int
    sensitivity: int

    def encode(self, update: Vector, clipping_norm: float) -> Integers:
        """Return an update clipped to C, cut toward zero on the grid, (d,) int64.

        Guarantee:
            The exact norm of what is returned is at most A; an update with a value that is
            not finite is zero.

        Args:
            update: (d,) float64.
            clipping_norm: C.
        """
        bounded = clipped(update, clipping_norm).update
        if bounded is None:
            return np.zeros(len(update), np.int64)
        total = FixedPointSum(len(update), clipping_norm, self.sensitivity)
        total.add(bounded)
        integers = total.integers()
        length = float(np.sum(np.square(integers.astype(np.float64))))
        # A is below 2^31, so that int64 holds every sum of squares that passes the first.
        is_long = length > 1.5 * self.sensitivity**2
        if is_long or int(np.dot(integers, integers)) > self.sensitivity**2:
            raise PrivacyError("a clipped update is longer than the clipping norm")
        return integers

    def noise(self, size: int, generator: SecureGenerator) -> Integers:
        """Draw one trustee's noise, (size,) int64."""
        return sample_of_two(size, self.spread, generator.words())

    def decode(self, integers: Integers, clipping_norm: float) -> Vector:
        """Return a sum in the units of the updates, (d,) float64."""
        return integers.astype(np.float64) * (clipping_norm / self.sensitivity)


def sealed_grid(
    noise_multiplier: float, trustees: int, colluding: int, reach: int, size: int
) -> SealedGrid:
    """Return the finest grid on which a sum fits modulo 2^32.

    It is a function of public numbers, so that clients and trustees agree on it.

    Args:
        noise_multiplier: z > 0, against a server with `colluding` trustees.
        trustees: k.
        colluding: c, below k.
        reach: The most vectors of norm A that a sum holds: clients' updates, or records.
        size: d, the number of values.

    Raises:
        PrivacyError: The numbers are no federation's, or no grid will do.
    """
    if not 1 <= trustees <= MOST_TRUSTEES or not 0 <= colluding < trustees:
        raise PrivacyError(
            f"privacy.colluding-trustees: of 1 to {MOST_TRUSTEES} trustees at least one is "
            f"honest (got {colluding} of {trustees} that are not)"
        )
    if not 0 < noise_multiplier < math.inf or reach < 1 or size < 1:
        raise PrivacyError("a sealed sum needs noise, clients and values")

    def units(spread: int) -> int:
        variance = (trustees - colluding) * variance_of_two(spread) - 4
        # Less one unit, which is more than a float's error.
        return math.floor(math.sqrt(variance) / noise_multiplier) - 1

    def fits(spread: int) -> bool:
        noise = _DEVIATIONS * math.sqrt(trustees * variance_of_two(spread))
        return reach * units(spread) + noise < _HALF

    spread = next((s for s in range(SPREAD, -1, -1) if fits(s)), None)
    if spread is None or units(spread) < _LEAST_UNITS_A_VALUE * math.sqrt(size):
        raise PrivacyError(
            f"privacy.noise-multiplier: {noise_multiplier:g} with sums of {reach} clients "
            f"or records and {size:,} values does not fit {MODULUS_BITS} bits: a larger "
            "epsilon, fewer clients or a smaller batch do"
        )
    return SealedGrid(spread, units(spread))


def deviation(noise_multiplier: float, trustees: int, colluding: int) -> float:
    """Return the noise of the opened sum over C: z sqrt(k / (k - c))."""
    return noise_multiplier * math.sqrt(trustees / (trustees - colluding))


def is_plausible(total: Vector, clipping_norm: float, sigma: float, n: float) -> bool:
    """Return whether an opened sum has a length that honest parties can give it.

    |S|^2 = |X|^2 + 2 <X, N> + |N|^2 with |X| <= n C and N of d values of deviation s = sigma C.
    By Laurent and Massart (2000, lemma 1) |N|^2 / s^2 is outside
    [d - 2 sqrt(d t), d + 2 sqrt(d t) + 2 t] with probability at most 2 e^-t, and
    |2 <X, N>| is above 2 n C s sqrt(2 t) with at most 2 e^-t.

    Args:
        total: (d,) the opened sum.
        clipping_norm: C.
        sigma: The deviation of its noise over C.
        n: The most vectors of norm C that it holds.
    """
    size, variance = len(total), (sigma * clipping_norm) ** 2
    length = float(np.sum(np.square(total)))
    reach = n * clipping_norm
    cross = 2 * reach * math.sqrt(variance) * math.sqrt(2 * _T)
    spread = 2 * math.sqrt(size * _T) * variance
    low = size * variance - spread - cross
    high = reach**2 + size * variance + spread + 2 * _T * variance + cross
    return low <= length <= high
