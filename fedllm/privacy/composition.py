"""The epsilon of several runs together, for one client that takes part in all of them.

Runs that a client takes part in are composed as mechanisms, at one delta. Their epsilons are
never added: at delta 1e-5 two runs of epsilon 8 make 12.3, not 16.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from scipy.optimize import brentq

from fedllm.privacy.accounting import Event, gaussian_epsilon

# Outside of these dp-accounting's PLD outgrows memory and time (fedllm.privacy.accounting).
_SMALLEST_PLD_NOISE = 0.25
_LARGEST_PLD_SPAN = 5e3
_INTERVAL = 1e-4


def composed_epsilon(events: Sequence[Event], delta: float) -> float:
    """Return the zero-out epsilon of releases of any noise, sampled or not.

    Args:
        events: (z, q, T) of T Gaussian releases with noise multiplier z, each taken part in
            by a secret coin of probability q; 1.0: no amplification is claimed. In any
            order.
        delta: In (0, 1).

    Guarantee:
        An upper bound on the true epsilon of all of them together. Without sampling it is
        exact: T releases of z are one Gaussian with mu = sqrt(T) / z, and mu^2 adds up, also
        if later settings were chosen after earlier releases were seen.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for z, q, count in events:
        counts[z, min(q, 1.0)] += count
    return _composed(
        tuple((z, q, n) for (z, q), n in sorted(counts.items()) if n), delta
    )


def room_left(spent: float, delta: float, limit: float) -> float:
    """Return the epsilon of the largest further run, without sampling, within a limit.

    Exact if nothing was sampled, else an estimate: what was spent counts as the one Gaussian
    of the same epsilon. What may be spent is decided by `composed_epsilon`.

    Args:
        spent: Epsilon of what was spent.
        delta: In (0, 1).
        limit: Largest epsilon of all together.
    """
    square = _mu(limit, delta) ** 2 - _mu(spent, delta) ** 2
    return gaussian_epsilon(square**-0.5, 1, delta) if square > 0 else 0.0


def _mu(epsilon: float, delta: float) -> float:
    """Return mu = 1/z of the one Gaussian release that costs an epsilon."""
    if epsilon <= 0:
        return 0.0
    smallest, largest = 1e-9, 1.0
    while gaussian_epsilon(1 / largest, 1, delta) < epsilon:
        largest *= 2
    return float(
        brentq(
            lambda mu: gaussian_epsilon(1 / mu, 1, delta) - epsilon, smallest, largest
        )
    )


@lru_cache(maxsize=256)
def _composed(events: tuple[Event, ...], delta: float) -> float:
    if not events:
        return 0.0
    bound = _unsampled(events, delta)
    sampled = [event for event in events if event[1] < 1]
    if not sampled:
        return bound
    import dp_accounting
    from dp_accounting import pld, rdp

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    # The grid of the composition spans at most the sum of the parts' spans.
    span = sum(gaussian_epsilon(z / 2, n, delta) for z, _, n in events)
    smallest = min(z for z, _, _ in events)
    accountant: Any
    if smallest >= _SMALLEST_PLD_NOISE and span <= _LARGEST_PLD_SPAN:
        accountant = pld.PLDAccountant(relation, _INTERVAL)
    else:
        # It logs a warning for every order that fails to converge, which it leaves out.
        logging.getLogger("absl").setLevel(logging.ERROR)
        accountant = rdp.RdpAccountant(neighboring_relation=relation)
    for z, q, count in events:
        release: Any = dp_accounting.GaussianDpEvent(z)
        if q < 1:
            release = dp_accounting.PoissonSampledDpEvent(q, release)
        accountant.compose(dp_accounting.SelfComposedDpEvent(release, count))
    # Sampling never costs privacy, so the unsampled value is a bound too.
    return min(bound, float(accountant.get_epsilon(delta)))


def _unsampled(events: Sequence[Event], delta: float) -> float:
    """Return the epsilon without amplification, of one Gaussian that stands for all."""
    if len({z for z, _, _ in events}) == 1:
        # To the last bit what a run of its own promises.
        return gaussian_epsilon(events[0][0], sum(n for _, _, n in events), delta)
    return gaussian_epsilon(sum(n / z**2 for z, _, n in events) ** -0.5, 1, delta)
