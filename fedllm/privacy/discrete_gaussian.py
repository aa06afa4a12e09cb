"""The discrete Gaussian on the integers: a table, three draws from it, no float in a draw.

D(s) has P(k) proportional to exp(-k^2 / (2 s^2)) on all integers k. `sample` draws
D(SIGMA), with

    Y = Y1 + SPREAD * (Y2 + SPREAD * Y3),   Y1, Y2, Y3 independent of D(BASE).

Why that is D(SIGMA), and why the accounting of the continuous Gaussian holds for it:

- A sum. For s' = 1 / sqrt(SPREAD^2 / BASE^2 + 1 / s^2), Poisson's summation gives
  P(Y1 + SPREAD * D(s) = y) = P(D(sqrt(BASE^2 + SPREAD^2 s^2)) = y) * (1 +- e) for every y, with
  e <= 4.1 exp(-2 pi^2 s'^2). Here s' > 3 at both levels, so e < 1e-76.
- The Gaussian. Let x be an integer vector of length d and w = x + N(0, (SIGMA^2 - 4) I). Draw Y
  from the discrete Gaussian of parameter 2 on Z^d centred at w. P(Y = y) is the density of
  N(x, SIGMA^2 I) at y times (1 +- 2.1 exp(-8 pi^2))^d, and so is P(x + D(SIGMA)^d = y). So adding
  D(SIGMA) to integers is a post-processing of a Gaussian mechanism of variance SIGMA^2 - 4, up to
  a factor of 1 +- d * 4e-34 (a tool of lattice cryptography: Peikert 2010, "An Efficient and
  Parallel Gaussian Sampler for Lattices").
- The table. It ends at 20 BASE, and its probabilities have a relative error below 2^-200. A run
  of 2^34 values meets what lies beyond with a probability below 2^-250, which adds at most
  (1 + e^epsilon) 2^-250 to delta: below 1e-30 for every epsilon up to 100.

All factors together move the epsilon of a run of 2^34 values by less than 1e-22.
`integer_sensitivity` gives away one unit, which is more: its noise multiplier is above the one
asked for by a factor of at least 1 + 2^-41.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Words = Callable[[int], npt.NDArray[np.uint64]]
"""Draws (n,) independent uniform integers of 64 bits."""

BASE = 1024
SPREAD = 340
VARIANCE = BASE**2 * (1 + SPREAD**2 * (1 + SPREAD**2))
"""SIGMA^2; SIGMA is about 2^26.8."""

LARGEST_SENSITIVITY = 1 << 40
"""Units of the sum's grid for one clipping norm, at most: `FixedPointSum` holds 2^22 of these."""

_TAIL = 20
_PRECISION = 512
_WORD = 64
# Words are looked up by their first bits; only cells that a probability divides are searched.
_GUIDE_BITS = 16
# Values worked on at a time, so that intermediate results stay in a core's cache.
_BLOCK = 1 << 14


def integer_sensitivity(noise_multiplier: float) -> int:
    """Return A, the units of the grid that a clipping norm has.

    Args:
        noise_multiplier: z, the standard deviation of the noise in clipping norms.

    Returns:
        The largest integer, less one, such that D(SIGMA) on integers of norm at most A is at
        least a Gaussian mechanism of noise multiplier z; at most LARGEST_SENSITIVITY, with
        which the noise of z below 1e-4 is larger than asked for.

    Raises:
        ValueError: z is not positive, or so large that the grid has no unit below C.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError("a release needs a positive noise multiplier")
    largest = math.floor(math.sqrt(VARIANCE - 4) / noise_multiplier) - 1
    if largest < 1:
        raise ValueError(
            f"a noise multiplier of {noise_multiplier:g} is above "
            f"{math.isqrt(VARIANCE) // 2:,}"
        )
    return min(largest, LARGEST_SENSITIVITY)


class Table:
    """D(base) by its cumulative probabilities.

    Args:
        base: s, an integer.
        tail: Where the table ends, in units of s.
    """

    def __init__(self, base: int, tail: int = _TAIL) -> None:
        self._reach = tail * base
        # P(value <= k) in units of 2**-_PRECISION, for each k but the last.
        self._cumulative = _cumulative(_weights(base, self._reach))
        first = [c >> (_PRECISION - _WORD) for c in self._cumulative]
        self._first = np.array(first, np.uint64)
        self._guide = self._make_guide()

    def _make_guide(self) -> npt.NDArray[np.int32]:
        """Return the value's index for each first bits of a word; -1: it has to be searched."""
        cells = np.arange(1 << _GUIDE_BITS, dtype=np.uint64)
        starts = cells << np.uint64(_WORD - _GUIDE_BITS)
        ends = starts | np.uint64((1 << (_WORD - _GUIDE_BITS)) - 1)
        below = np.searchsorted(self._first, starts, side="left")
        until = np.searchsorted(self._first, ends, side="right")
        return np.where(below == until, below, -1).astype(np.int32)

    def draw(self, size: int, words: Words) -> npt.NDArray[np.int64]:
        """Draw (size,) values."""
        drawn = words(size)
        index: npt.NDArray[np.int64]
        index = self._guide[drawn >> np.uint64(_WORD - _GUIDE_BITS)].astype(np.int64)
        unsure = np.flatnonzero(index < 0)
        searched = drawn[unsure]
        places = np.searchsorted(self._first, searched, side="right")
        tied = np.flatnonzero(self._first[np.maximum(places, 1) - 1] == searched)
        for tie in tied:
            # About once in 2^50 draws 64 bits do not tell two values apart.
            places[tie] = self._exactly(int(searched[tie]), words)
        index[unsure] = places
        index -= self._reach
        return index

    def _exactly(self, first: int, words: Words) -> int:
        """Return the index of a value whose first word is known."""
        uniform = first
        for word in words(_PRECISION // _WORD - 1):
            uniform = (uniform << _WORD) | int(word)
        return bisect_right(self._cumulative, uniform)


def sample(size: int, words: Words) -> npt.NDArray[np.int64]:
    """Draw (size,) independent values of D(SIGMA).

    Args:
        size: How many.
        words: The only source of chance.
    """
    table = _table()
    out = np.empty(size, np.int64)
    for start in range(0, size, _BLOCK):
        part = out[start : start + _BLOCK]
        part[:] = table.draw(len(part), words)
        for _ in range(2):
            part *= SPREAD
            part += table.draw(len(part), words)
    return out


def variance_of_two(spread: int) -> int:
    """Return the variance of `sample_of_two`'s discrete Gaussian."""
    return BASE**2 * (1 + spread**2)


def sample_of_two(size: int, spread: int, words: Words) -> npt.NDArray[np.int64]:
    """Draw (size,) independent values of D(s) with s^2 = `variance_of_two(spread)`.

    It is Y1 + spread * Y2, the first of the sums above, for grids of fewer bits.

    Args:
        size: How many.
        spread: At most SPREAD, so that the sum's s' is above 3; 0: D(BASE).
        words: The only source of chance.

    Raises:
        ValueError: The spread is larger, or negative.
    """
    if not 0 <= spread <= SPREAD:
        raise ValueError(f"a spread is within 0 and {SPREAD} (got {spread})")
    table = _table()
    out = np.empty(size, np.int64)
    for start in range(0, size, _BLOCK):
        part = out[start : start + _BLOCK]
        part[:] = table.draw(len(part), words)
        if spread:
            part += spread * table.draw(len(part), words)
    return out


@lru_cache(maxsize=1)
def _table() -> Table:
    return Table(BASE)


def _weights(base: int, reach: int) -> list[int]:
    """Return exp(-k^2 / (2 base^2)) for k from -reach to reach, in units of 2**-_PRECISION."""
    weight = 1 << _PRECISION
    # exp(-(k+1)^2 / 2s^2) is exp(-k^2 / 2s^2) times a ratio, which falls by the same step.
    ratio, step = _exp_of_minus(1, 2 * base**2), _exp_of_minus(2, 2 * base**2)
    half = [weight]
    for _ in range(reach):
        weight = (weight * ratio) >> _PRECISION
        ratio = (ratio * step) >> _PRECISION
        half.append(weight)
    return half[:0:-1] + half


def _cumulative(weights: list[int]) -> list[int]:
    total, running, cumulative = sum(weights), 0, []
    for weight in weights[:-1]:
        running += weight
        cumulative.append((running << _PRECISION) // total)
    return cumulative


def _exp_of_minus(numerator: int, denominator: int) -> int:
    """Return exp(-numerator / denominator) in units of 2**-_PRECISION, by its series."""
    total = term = 1 << _PRECISION
    count = 0
    while term:
        count += 1
        term = term * numerator // (denominator * count)
        total += -term if count % 2 else term
    return total
