"""Lower bounds on epsilon from an attack with known targets.

A canary is an update (or an example) that the auditor knows. It takes part only if its own
fair coin says so. An attacker who guesses those coins from the release better than (epsilon,
delta)-DP allows has shown that epsilon is larger. An audit can convict and never acquit: a
lower bound proves nothing about attacks that were not tried.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binom, chi2, norm

from fedllm.privacy.accounting import gaussian_epsilon

Vector = npt.NDArray[np.float64]

SIGNIFICANCE = 0.05
"""A certified bound is false with at most this probability."""

_RESOLUTION = 1e-6
# Shares of the canaries to guess. To guess all, one would have to know how many took part.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9)


@dataclass(frozen=True)
class CertifiedBound:
    """A lower bound on epsilon from one run.

    Attributes:
        epsilon: The bound; 0.0 bounds nothing.
        num_canaries: m.
        num_guesses: r, chosen before the coins are known, or corrected for the choice.
        num_correct: v.
    """

    epsilon: float
    num_canaries: int
    num_guesses: int
    num_correct: int


@dataclass(frozen=True)
class Estimate:
    """An estimate of epsilon, if the mechanism is the Gaussian that it claims to be.

    Attributes:
        epsilon: The estimate.
        low: Lower end of its 95 % interval.
        high: Upper end.
        mu: Separation of the canaries that took part from the others, in standard
            deviations of a score.
        mu_stddev: Standard deviation of `mu`.
    """

    epsilon: float
    low: float
    high: float
    mu: float
    mu_stddev: float


def one_run_p_value(
    num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float
) -> float:
    """Return the largest probability of so many right guesses under (epsilon, delta)-DP.

    With q = 1/(1 + e^-eps): P[Bin(r, q) >= v] + 2 m delta max over 1 <= i <= v of
    P[v > Bin(r, q) >= v - i] / i (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846,
    theorem 5.2).

    Args:
        num_canaries: m, each included by its own fair coin.
        num_guesses: r <= m.
        num_correct: v <= r.
        epsilon: >= 0.
        delta: In [0, 1).
    """
    _check_counts(num_canaries, num_guesses, num_correct, delta)
    chance = 1 / (1 + math.exp(-epsilon))
    likely = float(binom.sf(num_correct - 1, num_guesses, chance))
    if delta > 0 and num_correct > 0:
        steps = np.arange(1, num_correct + 1)
        below = binom.cdf(num_correct - 1, num_guesses, chance)
        window = below - binom.cdf(num_correct - steps - 1, num_guesses, chance)
        likely += 2 * num_canaries * delta * float(np.max(window / steps))
    return min(1.0, likely)


def certified_bound(
    num_canaries: int,
    num_guesses: int,
    num_correct: int,
    delta: float,
    significance: float = SIGNIFICANCE,
) -> CertifiedBound:
    """Return the largest epsilon that so many right guesses refute.

    Args:
        num_canaries: m, each included by its own fair coin.
        num_guesses: r <= m, fixed before the coins are known.
        num_correct: v <= r.
        delta: In [0, 1).
        significance: p below which an epsilon is refuted.

    Guarantee:
        If the mechanism is (epsilon, delta)-DP for a canary that takes part or sends
        nothing, the bound exceeds epsilon with probability at most
        `significance`.

    Raises:
        ValueError: The counts or delta are impossible.
    """

    def refuted(epsilon: float) -> bool:
        counts = (num_canaries, num_guesses, num_correct)
        return one_run_p_value(*counts, epsilon, delta) < significance

    low, high = 0.0, 1.0
    # Right guesses never refute 64: delta or rounding to q = 1 ends it long before.
    while refuted(high) and high < 64:
        low, high = high, high * 2
    while high - low > _RESOLUTION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return CertifiedBound(low, num_canaries, num_guesses, num_correct)


def planned_guesses(num_canaries: int, mu: float, delta: float) -> int:
    """Return the number of guesses with the best expected bound.

    It depends on nothing that is measured, so no correction is due.

    Args:
        num_canaries: m.
        mu: Expected separation in standard deviations of a score.
        delta: In [0, 1).
    """
    best, best_bound = num_canaries, -1.0
    for count in _guess_counts(num_canaries):
        accuracy = _expected_accuracy(count / num_canaries, mu)
        correct = math.floor(accuracy * count)
        bound = certified_bound(num_canaries, count, correct, delta).epsilon
        if bound > best_bound:
            best, best_bound = count, bound
    return best


def guess(scores_in: Vector, scores_out: Vector, num_guesses: int) -> int:
    """Return how many guesses are right if the most extreme scores are guessed.

    The half with the largest scores is guessed "took part", the half with the smallest "did
    not". Ties are broken to the disadvantage of the guesser.

    Args:
        scores_in: Scores of the canaries that took part.
        scores_out: Scores of the others.
        num_guesses: r, at most all.

    Raises:
        ValueError: A score is not a number, or there are fewer than r.
    """
    scores = np.concatenate([scores_in, scores_out])
    if np.isnan(scores).any():
        raise ValueError("a canary's score is not a number")
    if not 1 <= num_guesses <= len(scores):
        raise ValueError(f"{num_guesses} guesses of {len(scores)} canaries")
    took_part = np.arange(len(scores)) < len(scores_in)
    highest = (num_guesses + 1) // 2
    lowest = num_guesses - highest
    # Of equal scores the wrong guess comes first.
    downwards = np.lexsort((took_part, -scores))
    taken = downwards[:highest]
    right = int(took_part[taken].sum())
    rest = np.setdiff1d(np.arange(len(scores)), taken)
    upwards = rest[np.lexsort((~took_part[rest], scores[rest]))]
    return right + int((~took_part[upwards[:lowest]]).sum())


def one_shot_estimate(
    cosines_in: Vector, cosines_out: Vector, dimension: int, delta: float
) -> Estimate:
    """Estimate epsilon from the cosines of canaries with the release.

    A random direction has a cosine of mean 0 and variance 1/d with any vector that it took no
    part in, which is known and not fitted. mu = sqrt(d) (mean in - mean out), and
    epsilon is that of a Gaussian mechanism with this mu (Andrew et al. 2023, arXiv
    2302.03098, with the mean only). It needs d much above the number of canaries, and
    it is an estimate: its interval covers the canaries' own chance and no more.

    Args:
        cosines_in: Cosines of the canaries that took part.
        cosines_out: Cosines of the others.
        dimension: d.
        delta: In (0, 1).

    Raises:
        ValueError: One of the groups is empty.
    """
    if len(cosines_in) == 0 or len(cosines_out) == 0:
        raise ValueError("an estimate needs canaries that took part and that did not")
    mu = math.sqrt(dimension) * float(np.mean(cosines_in) - np.mean(cosines_out))
    spread = math.sqrt(1 / len(cosines_in) + 1 / len(cosines_out))
    half = float(norm.ppf(0.975)) * spread
    low, middle, high = (_epsilon_of(m, delta) for m in (mu - half, mu, mu + half))
    return Estimate(middle, low, high, mu, spread)


def equivalent_mu(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian mechanism with this epsilon.

    Args:
        epsilon: >= 0, finite.
        delta: In (0, 1).
    """
    if epsilon <= 0:
        return 0.0
    highest = 1.0
    while _epsilon_of(highest, delta) < epsilon:
        highest *= 2
    return float(brentq(lambda mu: _epsilon_of(mu, delta) - epsilon, 0.0, highest))


def membership_bound(
    losses_in: Vector,
    losses_out: Vector,
    delta: float,
    num_guesses: int | None = None,
) -> CertifiedBound:
    """Return a certified bound for records from the losses of canary examples.

    Args:
        losses_in: For each canary example that was trained on, its loss under the final
            model minus its loss under the first one.
        losses_out: The same for those that were not. Every canary's own fair coin must
            have decided which of the two groups it belongs to.
        delta: In [0, 1).
        num_guesses: r, fixed before the losses were seen. None: several are tried, and
            the significance is shared among them.

    Guarantee:
        As of `certified_bound`, for one example that is in or out.

    Raises:
        ValueError: A loss is not a number, there is no canary, or r is impossible.
    """
    num_canaries = len(losses_in) + len(losses_out)
    if num_canaries == 0:
        raise ValueError("a membership test needs at least one canary")
    fixed = num_guesses is not None
    counts = [num_guesses] if fixed else _guess_counts(num_canaries)
    bounds = [
        certified_bound(
            num_canaries,
            count,
            # An example that was trained on has the smaller loss.
            guess(-np.asarray(losses_in), -np.asarray(losses_out), count),
            delta,
            SIGNIFICANCE / len(counts),
        )
        for count in counts
        if count is not None
    ]
    return max(bounds, key=lambda bound: bound.epsilon)


def plausible_spread(
    sum_of_squares: float, num_values: int, stddev: float, significance: float
) -> bool:
    """Return whether normal values of mean 0 may have this standard deviation.

    Args:
        sum_of_squares: Of all values.
        num_values: Number of values, all independent.
        stddev: The claimed standard deviation.
        significance: Two-sided probability of rejecting a true claim.
    """
    quantile = float(chi2(num_values).cdf(sum_of_squares / stddev**2))
    return significance / 2 < quantile < 1 - significance / 2


def _epsilon_of(mu: float, delta: float) -> float:
    return gaussian_epsilon(1 / mu, 1, delta) if mu > 1e-9 else 0.0


def _guess_counts(num_canaries: int) -> list[int]:
    """Return the numbers of guesses worth trying."""
    return sorted({max(1, round(share * num_canaries)) for share in _SHARES})


def _expected_accuracy(share: float, mu: float) -> float:
    """Return the share of right guesses if scores are N(0, 1), or N(mu, 1) if in."""
    tail = share / 2

    def too_many(threshold: float) -> float:
        return float(ndtr(-threshold) + ndtr(mu - threshold)) / 2 - tail

    threshold = brentq(too_many, -10.0, mu + 40.0)
    return float(ndtr(mu - threshold)) / 2 / tail


def _check_counts(m: int, r: int, v: int, delta: float) -> None:
    if not (0 <= v <= r <= m and r >= 1 and 0 <= delta < 1):
        raise ValueError(
            "an audit needs 0 <= right guesses <= guesses <= canaries, a guess and "
            f"0 <= delta < 1 (got {v}, {r}, {m} and {delta})"
        )
