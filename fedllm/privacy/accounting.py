"""Privacy accounting: exact for Gaussians without sampling, PLD under Poisson sampling.

Epsilon is given under two neighbouring relations. Zero-out: one client sends nothing, and the
sum changes by at most C. Replace-one: one client has other data, and the sum changes by at
most 2C.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr

# docs/api.md lists them here, beside the epsilons that they go with.
from fedllm.privacy.wording import default_delta as default_delta
from fedllm.privacy.wording import strength as strength

Sampling = Literal["all", "fixed", "poisson"]
Relation = Literal["REPLACE_SPECIAL", "ADD_OR_REMOVE_ONE"]
"""Zero-out and add-or-remove, by dp-accounting's names."""

Event = tuple[float, float, int]
"""Poisson-subsampled Gaussians: noise multiplier, sampling probability, how many."""

# Below this noise multiplier dp-accounting's PLD takes seconds, then never returns: its
# grid grows with the square of 1/z.
_SMALLEST_PLD_NOISE = 0.25

# Its grid grows with the rounds too: 3.5e7 points (z = 0.25, 100 rounds) took 14 s and
# 0.9 GB, ten times as many 36 s and 2.6 GB.
_MOST_PLD_POINTS = 5e7
_INTERVAL = 1e-4
"""dp-accounting's own grid of privacy losses."""

_EXACT = "exact Gaussian"
_PLD = "PLD (dp-accounting)"
_RDP = "RDP (dp-accounting)"


@dataclass(frozen=True)
class Epsilons:
    """The epsilon of a number of releases, by neighbouring relation.

    Attributes:
        zero_out: One client sends nothing.
        replace_one: One client's data is replaced.
        add_or_remove: A record joins or leaves; under Poisson sampling only, else None.
            Never claimed of clients, whose number is published.
        accountant: How it was computed.
    """

    zero_out: float
    replace_one: float
    add_or_remove: float | None
    accountant: str


def gaussian_epsilon(noise_multiplier: float, num_releases: int, delta: float) -> float:
    """Return the exact epsilon of composed Gaussian mechanisms of sensitivity 1.

    T releases with noise multiplier z are one with mu = sqrt(T)/z, for which delta =
    Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang 2018, theorem 8).

    Args:
        noise_multiplier: z > 0.
        num_releases: T >= 0.
        delta: In (0, 1).
    """
    if num_releases == 0:
        return 0.0
    mu = math.sqrt(num_releases) / noise_multiplier

    def excess(epsilon: float) -> float:
        return _log_delta(epsilon, mu) - math.log(delta)

    if excess(0.0) <= 0:
        return 0.0
    highest = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1
    root = brentq(excess, 0.0, highest, xtol=1e-12, rtol=1e-13, maxiter=500)
    # The root is within the tolerance of the truth: state the upper end.
    return float(root * (1 + 1e-12) + 1e-12)


def gaussian_epsilons(mu_squared: float, delta: float) -> Epsilons:
    """Return the epsilons of composed Gaussians of any noise, without sampling.

    Args:
        mu_squared: Sum of 1 / z^2 over the releases.
        delta: In (0, 1).
    """
    if mu_squared == 0:
        return Epsilons(0.0, 0.0, None, _EXACT)
    z = mu_squared**-0.5
    zero_out = gaussian_epsilon(z, 1, delta)
    return Epsilons(zero_out, gaussian_epsilon(z / 2, 1, delta), None, _EXACT)


def epsilons(
    noise_multiplier: float,
    num_releases: int,
    delta: float,
    sampling: Sampling,
    sampling_probability: float,
) -> Epsilons:
    """Return the epsilons of `num_releases` rounds.

    Args:
        noise_multiplier: z > 0.
        num_releases: Rounds.
        delta: In (0, 1).
        sampling: `all` and `fixed` claim no amplification by sampling.
        sampling_probability: Each client's coin under `poisson`.

    Guarantee:
        Every value is an upper bound on the true epsilon of the relation it names.
    """
    plain = gaussian_epsilon(noise_multiplier, num_releases, delta)
    plain_replaced = gaussian_epsilon(noise_multiplier / 2, num_releases, delta)
    if sampling != "poisson" or sampling_probability >= 1 or num_releases == 0:
        joined = plain if sampling == "poisson" else None
        return Epsilons(plain, plain_replaced, joined, _EXACT)
    sampled = _poisson(noise_multiplier, sampling_probability, num_releases, delta)
    # Sampling never costs privacy, so the unsampled value is a bound too, and at tiny z
    # it is below the one that RDP gives.
    return Epsilons(
        min(sampled.zero_out, plain),
        min(sampled.replace_one, plain_replaced),
        plain if sampled.add_or_remove is None else min(sampled.add_or_remove, plain),
        sampled.accountant,
    )


def calibrate(
    target_epsilon: float,
    num_releases: int,
    delta: float,
    sampling: Sampling,
    sampling_probability: float,
    relation: Relation = "REPLACE_SPECIAL",
) -> float:
    """Return the smallest noise multiplier that keeps the epsilon of a relation.

    It is the smallest to 1e-6 of it, and to about 1e-2 under Poisson sampling.

    Args:
        target_epsilon: > 0, the largest epsilon allowed.
        num_releases: Rounds, at least 1.
        delta: In (0, 1).
        sampling: As in `epsilons`.
        sampling_probability: As in `epsilons`.
        relation: Zero-out, or add-or-remove, which is for `poisson` only.

    Guarantee:
        `epsilons(result, ...).zero_out <= target_epsilon`, or `add_or_remove`; and the
        result is at most what the same releases need without sampling, also for a delta
        so small that PLD knows no bound.
    """
    sampled = sampling == "poisson" and sampling_probability < 1
    rest = (num_releases, delta, sampling, sampling_probability)

    def fits(noise_multiplier: float, interval: float) -> bool:
        if sampled and _pld_returns(noise_multiplier, num_releases, delta, interval):
            q = sampling_probability
            spent = min(
                _pld(noise_multiplier, q, num_releases, delta, relation, interval),
                gaussian_epsilon(noise_multiplier, num_releases, delta),
            )
        else:
            known = epsilons(noise_multiplier, *rest)
            joined = known.add_or_remove
            spent = known.zero_out if relation == "REPLACE_SPECIAL" else joined or 0.0
        return spent <= target_epsilon

    # A coarser grid is pessimistic, so it only ever gives more noise, and much sooner.
    coarse, tolerance = (1e-3, 1e-3) if sampled else (_INTERVAL, 1e-6)
    low, high = (_SMALLEST_PLD_NOISE, 1.0) if sampled else (1e-6, 1.0)
    if sampled and fits(low, coarse):
        low, high = 1e-6, low
    while not fits(high, coarse):
        low, high = high, high * 2
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle, coarse) else (middle, high)
    while not fits(high, _INTERVAL):
        high *= 1 + tolerance
    return high


def record_epsilon(events: Sequence[Event], delta: float) -> float:
    """Return the epsilon of Poisson batches of records, add-or-remove of one record.

    Args:
        events: The releases, in any order; equal ones may be listed separately.
        delta: In (0, 1).

    Guarantee:
        An upper bound on the true epsilon of all events together, which does not depend
        on how they are grouped.
    """
    return _record_account(_merged(events), delta)[0]


def record_accountant(events: Sequence[Event], delta: float) -> str:
    """Return how `record_epsilon` came by its value; arguments as there."""
    return _record_account(_merged(events), delta)[1]


def _merged(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return events in order, equal ones together."""
    counts: Counter[tuple[float, float]] = Counter()
    for z, q, count in events:
        counts[z, min(q, 1.0)] += count
    return tuple((z, q, n) for (z, q), n in sorted(counts.items()) if n > 0)


@lru_cache(maxsize=256)
def _record_account(events: tuple[Event, ...], delta: float) -> tuple[float, str]:
    """Return epsilon and the accountant whose it is."""
    if not events:
        return 0.0, _EXACT
    # Sampling never costs privacy: T Gaussians of z are one of z / sqrt(T).
    bound = gaussian_epsilon(sum(n / z**2 for z, _, n in events) ** -0.5, 1, delta)
    if all(q >= 1 for _, q, _ in events):
        return bound, _EXACT
    spent, accountant = _sampled_account(events, delta)
    return (bound, _EXACT) if bound < spent else (spent, accountant)


def _sampled_account(events: tuple[Event, ...], delta: float) -> tuple[float, str]:
    """Return the epsilon of sampled releases, and PLD or RDP."""
    if len(events) == 1:
        z, q, count = events[0]
        if _pld_returns(z, count, delta, _INTERVAL):
            return _pld(z, q, count, delta, "ADD_OR_REMOVE_ONE"), _PLD
        spent = epsilons(z, count, delta, "poisson", q)
        return spent.add_or_remove or 0.0, spent.accountant
    import dp_accounting
    from dp_accounting import pld, rdp

    # The grid of the composition spans at most the sum of the parts' spans.
    spans = sum(gaussian_epsilon(z / 2, n, delta) for z, _, n in events)
    smallest = min(z for z, _, _ in events)
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant: Any
    name = _PLD
    if smallest >= _SMALLEST_PLD_NOISE and spans <= _MOST_PLD_POINTS * _INTERVAL:
        accountant = pld.PLDAccountant(relation, _INTERVAL)
    else:
        logging.getLogger("absl").setLevel(logging.ERROR)
        accountant = rdp.RdpAccountant(neighboring_relation=relation)
        name = _RDP
    for event in events:
        accountant.compose(_event(*event))
    return float(accountant.get_epsilon(delta)), name


def _log_delta(epsilon: float, mu: float) -> float:
    """Return log delta(epsilon) of the Gaussian mechanism, without cancellation."""
    t = mu / 2 - epsilon / mu
    s = mu / 2 + epsilon / mu
    first = float(log_ndtr(t))
    # log(e^eps Phi(-s)), where eps - s^2/2 = -t^2/2.
    second = -t * t / 2 + math.log(float(erfcx(s / math.sqrt(2))) / 2)
    return first + math.log(-math.expm1(min(second - first, -1e-300)))


def _pld_returns(z: float, releases: int, delta: float, interval: float) -> bool:
    """Return whether PLD would answer in seconds, judged by the span of its grid."""
    if z < _SMALLEST_PLD_NOISE:
        return False
    return gaussian_epsilon(z / 2, releases, delta) <= _MOST_PLD_POINTS * interval


@lru_cache(maxsize=64)
def _poisson(z: float, q: float, releases: int, delta: float) -> Epsilons:
    """Account for Poisson-subsampled Gaussians with dp-accounting."""
    if _pld_returns(z, releases, delta, _INTERVAL):
        values = [
            _pld(z, q, releases, delta, relation)
            for relation in ("REPLACE_SPECIAL", "REPLACE_ONE", "ADD_OR_REMOVE_ONE")
        ]
        return Epsilons(values[0], values[1], values[2], _PLD)
    import dp_accounting
    from dp_accounting import rdp

    # It logs a warning for every order that fails to converge, which it leaves out.
    logging.getLogger("absl").setLevel(logging.ERROR)
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    accountant.compose(_event(z, q, releases))
    spent = float(accountant.get_epsilon(delta))
    # RDP has no replace-one under Poisson sampling, so the caller's own bound holds.
    return Epsilons(spent, math.inf, spent, _RDP)


@lru_cache(maxsize=256)
def _pld(
    z: float,
    q: float,
    releases: int,
    delta: float,
    relation: str,
    interval: float = _INTERVAL,
) -> float:
    """Return the epsilon of a privacy loss distribution, rounded up to its grid."""
    import dp_accounting
    from dp_accounting import pld

    neighbours = dp_accounting.NeighboringRelation[relation]
    accountant = pld.PLDAccountant(neighbours, interval)
    accountant.compose(_event(z, q, releases))
    return float(accountant.get_epsilon(delta))


def _event(z: float, q: float, releases: int) -> Any:
    """Make dp-accounting's event of all releases."""
    import dp_accounting as dp

    sampled = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
    return dp.SelfComposedDpEvent(sampled, releases)


def noise_to_signal(
    noise_multiplier: float, num_trainable: int, num_sampled_clients: float
) -> float:
    """Return R = z * sqrt(d) / n: the norm of the averaged noise over the clip norm.

    R alone is no verdict: a language model tolerated R = 22, since noise in many dimensions
    falls mostly where the loss is flat. The noise probe is the verdict.
    """
    return noise_multiplier * math.sqrt(num_trainable) / num_sampled_clients
