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


def strength(epsilon: float | None) -> str:
    """Return the word for an epsilon by `BANDS`; None is no privacy."""
    if epsilon is None:
        return "none"
    return next((word for most, word in BANDS if epsilon <= most), BANDS[-1][1])


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


def percent(share: float) -> str:
    """Format a share of right guesses in percent, rounded up."""
    return f"{min(100.0, math.ceil(share * 10_000 - 1e-6) / 100):.2f} %"
