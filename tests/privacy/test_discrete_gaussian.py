"""The discrete Gaussian is the one that its proof is about."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fedllm.privacy.discrete_gaussian import (
    BASE,
    LARGEST_SENSITIVITY,
    SPREAD,
    VARIANCE,
    Table,
    integer_sensitivity,
    sample,
)
from fedllm.privacy.mechanism import SecureGenerator

WORDS = SecureGenerator().words()
SIGMA = math.sqrt(VARIANCE)


def density(k, sigma):
    return math.exp(-(k**2) / (2 * sigma**2))


@pytest.mark.parametrize("base", [3, 8])
def test_the_tables_probabilities_are_the_discrete_gaussians(base):
    cumulative = Table(base)._cumulative
    reach = 20 * base
    total = sum(density(k, base) for k in range(-reach, reach + 1))

    for k in range(-reach, reach):
        below = cumulative[k + reach - 1] if k > -reach else 0
        probability = float(Fraction(cumulative[k + reach] - below, 2**512))
        # Relative, so it holds in the tails as well.
        assert probability == pytest.approx(density(k, base) / total, rel=1e-11)


def test_a_sum_of_two_is_a_discrete_gaussian_in_every_value():
    # s' = 1 / sqrt(4^2 / 12^2 + 1 / 20^2) = 2.97: the formula allows a factor of 1e-74.
    first, spread, second = 12, 4, 20
    whole = math.sqrt(first**2 + spread**2 * second**2)
    values = range(-300, 301)
    sums = [
        math.fsum(
            density(y - spread * m, first) * density(m, second)
            for m in range(-400, 401)
        )
        for y in values
    ]

    ratios = [s / density(y, whole) for s, y in zip(sums, values, strict=True)]

    assert max(ratios) / min(ratios) - 1 < 1e-11


def test_the_levels_are_close_enough_for_the_sum_of_two():
    inner = BASE * math.sqrt(1 + SPREAD**2)

    for scale in (BASE, inner):
        assert 1 / math.sqrt(SPREAD**2 / BASE**2 + 1 / scale**2) > 3
    assert VARIANCE == BASE**2 + SPREAD**2 * BASE**2 + SPREAD**4 * BASE**2


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
@pytest.mark.parametrize("shift", [1, 6, 18])
def test_delta_is_at_most_the_gaussians_of_a_variance_less_four(epsilon, shift):
    sigma, reach = 6, 200
    total = sum(density(k, sigma) for k in range(-reach, reach + 1))
    ours = math.fsum(
        max(0.0, density(y - shift, sigma) - math.exp(epsilon) * density(y, sigma))
        for y in range(-reach, reach + 1)
    )

    mu = shift / math.sqrt(sigma**2 - 4)
    theirs = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(
        -mu / 2 - epsilon / mu
    )

    assert ours / total <= theirs * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("z", [2e-4, 0.3, 1.3421878, 7.7, 1e4, 1e7])
def test_the_integer_sensitivity_keeps_the_noise_multiplier_and_a_margin(z):
    a = integer_sensitivity(z)

    assert 1 <= a <= LARGEST_SENSITIVITY
    assert math.sqrt(VARIANCE - 4) / a >= z * (1 + 2.0**-41)
    # And costs next to nothing, for each z that trains anything.
    assert math.sqrt(VARIANCE - 4) / a <= z * (1 + 3 / a)


@pytest.mark.parametrize("z", [2e-4, 0.3, 0.5, 1.0, 1.3421878, 7.7, 1e4, 1e7])
def test_one_unit_and_no_more_is_left_between_the_sensitivity_and_its_bound(z):
    a = integer_sensitivity(z)

    # In fractions, so that no rounding of the test's own hides one of the code's.
    assert ((a + 1) * Fraction(z)) ** 2 <= VARIANCE - 4
    assert ((a + 2) * Fraction(z)) ** 2 > VARIANCE - 4


def test_a_tiny_noise_multiplier_gets_more_noise_than_it_asks_for():
    assert integer_sensitivity(1e-9) == LARGEST_SENSITIVITY


@pytest.mark.parametrize("z", [0.0, -1.0, math.inf, math.nan, 1e9])
def test_no_grid_for_noise_that_is_none_or_too_much(z):
    with pytest.raises(ValueError, match="noise multiplier"):
        integer_sensitivity(z)


def test_draws_have_the_distribution():
    drawn = sample(1_000_000, WORDS)

    edges = np.floor(stats.norm.ppf(np.linspace(0, 1, 65)[1:-1]) * SIGMA)
    observed = np.histogram(drawn, bins=[-1e18, *(edges + 0.5), 1e18])[0]
    expected = np.diff([0, *stats.norm.cdf((edges + 0.5) / SIGMA), 1]) * len(drawn)
    assert stats.chisquare(observed, expected).pvalue > 1e-6
    residues = np.bincount(drawn % SPREAD, minlength=SPREAD)
    assert stats.chisquare(residues).pvalue > 1e-6


def test_a_table_draws_its_own_probabilities_and_searches_as_its_guide_says():
    table = Table(BASE)
    drawn = table.draw(1_000_000, WORDS)

    cells = np.arange(-3 * BASE, 3 * BASE, 64)
    observed = np.histogram(drawn, bins=[-(10**9), *cells, 10**9])[0]
    cumulative = [float(c / 2**512) for c in table._cumulative]
    inner = [cumulative[c - 1 + 20 * BASE] for c in cells]
    expected = np.diff([0, *inner, 1]) * len(drawn)
    assert stats.chisquare(observed, expected).pvalue > 1e-6
    words = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    guided = table.draw(len(words), lambda size: words[:size])
    table._guide[:] = -1
    searched = table.draw(len(words), lambda size: words[:size])
    assert guided[1:4].tolist() == searched[1:4].tolist()


def test_words_that_do_not_decide_are_followed_by_words_that_do():
    # The first word alone is a tie with thousands of values of the far tail.
    table = Table(BASE)

    def stream(last):
        words = iter([[0], last])
        return lambda size: np.array(next(words), np.uint64)

    lowest = table.draw(1, stream([0] * 7))[0]
    higher = table.draw(1, stream([2**63] + [0] * 6))[0]

    assert lowest == -20 * BASE
    assert -20 * BASE < higher < -9 * BASE
