"""Epsilon in words: bands, rounding, and how often an attacker can guess right.

Only the standard library is imported, so that listing runs is quick.
"""

import math
from statistics import NormalDist

BANDS = (
    (1.0, "strong"),
    (10.0, "reasonable"),
    (50.0, "weak"),
    (math.inf, "none to speak of"),
)
"""Largest epsilon of a band and its word: the tiers of Ponomareva et al. 2023 (How to
DP-fy ML, arXiv 2303.00654), with its third tier split at 50."""

BANDS_SOURCE = "Ponomareva et al. 2023, How to DP-fy ML, arXiv 2303.00654"


_USUAL_DELTA = 1e-5


def default_delta(population_size: int) -> float:
    """Return min(1e-5, N^-1.1)."""
    return float(min(_USUAL_DELTA, population_size**-1.1))


def strength(
    epsilon: float | None, delta: float | None = None, units: int | None = None
) -> str:
    """Return the word for an epsilon by `BANDS`, or a weaker one for a large delta.

    Args:
        epsilon: None is no privacy.
        delta: From 1/units on the word is the last: whoever publishes one unit of them as
            it is satisfies (0, 1/units). Above `default_delta` it is one step weaker.
            None: not judged.
        units: Protected units (clients, or records of a client); None: not known, and
            delta is compared with 1e-5 alone.
    """
    if epsilon is None:
        return "none"
    words = [word for _, word in BANDS]
    step = next((i for i, (most, _) in enumerate(BANDS) if epsilon <= most), -1)
    if delta is not None and step >= 0:
        if units is not None and delta >= 1 / units:
            step = -1
        elif delta > _largest_plain_delta(units):
            step = min(step + 1, len(words) - 1)
    return words[step]


def delta_caution(delta: float | None, units: int | None = None) -> str | None:
    """Return why a delta makes the word of `strength` weaker; None: it does not.

    Args:
        delta: As in `strength`.
        units: As in `strength`.
    """
    if delta is None:
        return None
    if units is not None and delta >= 1 / units:
        return (
            f"delta {delta:g} is not below one over {units:,}: publishing one of them "
            "whole would keep this promise"
        )
    largest = _largest_plain_delta(units)
    if delta > largest:
        return f"delta {delta:g} is above {largest:.2g}"
    return None


def _largest_plain_delta(units: int | None) -> float:
    """Return the largest delta that leaves the word as it is."""
    usual = _USUAL_DELTA if units is None else default_delta(units)
    # A default that a file has kept is not above itself.
    return usual * (1 + 1e-9)


def plain(epsilon: float | None) -> str:
    """Format an epsilon for a person; rounded up, so that it is never understated."""
    if epsilon is None or not math.isfinite(epsilon):
        return "not bounded"
    if epsilon >= 1000:
        return f"{math.ceil(epsilon):,}"
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"


def guesses_right(epsilon: float, delta: float) -> float:
    """Return the largest share of right guesses whether one unit took part.

    The attacker knows everything else, and a fair coin decides whether the unit takes part,
    so 0.5 is chance. True and false positive rates of a test of two neighbours differ by at most
    (e^eps - 1 + 2 delta) / (e^eps + 1): the corner of the region of Kairouz, Oh and
    Viswanath 2015 (arXiv 1311.0776), theorem 2.1.

    Args:
        epsilon: >= 0; inf is allowed.
        delta: In [0, 1].

    Guarantee:
        An upper bound for every (epsilon, delta)-private mechanism.
    """
    # (e^eps - 1) / (e^eps + 1) is tanh(eps / 2), which does not overflow.
    share = 2 / (math.exp(min(epsilon, 700.0)) + 1)
    return min(1.0, (1 + math.tanh(epsilon / 2) + delta * share) / 2)


def gaussian_guesses_right(noise_multiplier: float, num_releases: int) -> float:
    """Return the exact share of right guesses for Gaussian mechanisms of sensitivity 1.

    T releases with noise multiplier z are one with mu = sqrt(T)/z, whose best test has
    an advantage of 2 Phi(mu/2) - 1 (Dong, Roth and Su 2022, arXiv 1905.02383).

    Args:
        noise_multiplier: z > 0.
        num_releases: T >= 0.
    """
    return NormalDist().cdf(math.sqrt(num_releases) / noise_multiplier / 2)


def rounds_text(number: int) -> str:
    """Return a number of rounds with its word, which has an s unless there is one."""
    return "1 round" if number == 1 else f"{number} rounds"


def percent(share: float) -> str:
    """Format a share of right guesses in percent, rounded up."""
    return f"{min(100.0, math.ceil(share * 10_000 - 1e-6) / 100):.2f} %"
