"""Lower bounds on epsilon: published values, and honest on mechanisms that we know."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.lower_bounds import (
    SIGNIFICANCE,
    certified_bound,
    equivalent_mu,
    guess,
    membership_bound,
    one_run_p_value,
    one_shot_estimate,
    planned_guesses,
    plausible_spread,
)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "bound"),
    [(1000, 100, 75, 1e-4, "0.673"), (100_000, 1510, 1439, 1e-5, "2.6759")],
)
def test_the_certified_bound_has_the_published_value(m, r, v, delta, bound):
    found = certified_bound(m, r, v, delta).epsilon

    assert f"{found:.{len(bound) - 2}f}" == bound


def test_the_p_value_has_the_published_value():
    assert f"{one_run_p_value(100, 100, 75, math.log(3), 0.0):.4f}" == "0.5535"


def test_the_p_value_follows_its_formula_term_by_term():
    m, r, v, epsilon, delta = 50, 20, 16, 0.8, 1e-3
    pmf = binom(r, math.exp(epsilon) / (1 + math.exp(epsilon))).pmf
    tail = sum(pmf(k) for k in range(v, r + 1))
    windows = [sum(pmf(k) for k in range(v - i, v)) / i for i in range(1, v + 1)]

    expected = tail + 2 * m * delta * max(windows)

    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected)


def test_the_bound_is_the_largest_epsilon_that_is_refuted():
    epsilon = certified_bound(1000, 100, 90, 1e-5).epsilon

    assert one_run_p_value(1000, 100, 90, epsilon, 1e-5) < SIGNIFICANCE
    assert one_run_p_value(1000, 100, 90, epsilon + 1e-5, 1e-5) >= SIGNIFICANCE


def test_as_many_right_guesses_as_a_coin_would_make_certify_nothing():
    assert certified_bound(1000, 100, 50, 1e-5).epsilon == 0.0


def test_all_guesses_right_is_still_a_finite_bound():
    # Without delta: q^r = 0.05.
    found = certified_bound(1000, 1000, 1000, 0.0).epsilon

    q = 0.05 ** (1 / 1000)
    assert found == pytest.approx(math.log(q / (1 - q)), abs=1e-4)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta"),
    [
        (10, 11, 1, 0.0),
        (10, 5, 6, 0.0),
        (10, 0, 0, 0.0),
        (10, 5, -1, 0.0),
        (10, 5, 5, 1.0),
        (10, 5, 5, -1e-9),
        (10, 5, 5, math.nan),
    ],
)
def test_impossible_counts_and_deltas_are_rejected(m, r, v, delta):
    with pytest.raises(ValueError, match="right guesses"):
        certified_bound(m, r, v, delta)


def test_guesses_are_the_most_extreme_scores():
    scores_in = np.array([9.0, 8.0, 0.1])
    scores_out = np.array([-9.0, 7.0, 0.2])

    # 9 and 8 are "in", -9 and 0.1 are "out".
    assert guess(scores_in, scores_out, 4) == 3
    assert guess(scores_in, scores_out, 1) == 1
    assert guess(scores_in, scores_out, 6) == 4


def test_equal_scores_are_no_evidence_whatever_their_order():
    assert guess(np.zeros(50), np.zeros(50), 20) == 0


def test_a_score_that_is_not_a_number_is_rejected():
    with pytest.raises(ValueError, match="not a number"):
        guess(np.array([1.0, math.nan]), np.array([0.0]), 2)


def test_more_guesses_than_canaries_are_rejected():
    with pytest.raises(ValueError, match="3 guesses of 2"):
        guess(np.array([1.0]), np.array([0.0]), 3)


def gaussian_scores(rng, m, mu):
    coins = rng.random(m) < 0.5
    scores = rng.standard_normal(m) + mu * coins
    return scores[coins], scores[~coins]


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
def test_a_gaussian_mechanism_is_not_accused_and_not_missed(z):
    rng = np.random.default_rng(3)
    delta, m = 1e-5, 1000
    true = gaussian_epsilon(z, 1, delta)
    count = planned_guesses(m, 1 / z, delta)

    bounds = [
        certified_bound(m, count, guess(*gaussian_scores(rng, m, 1 / z), count), delta)
        for _ in range(30)
    ]

    assert all(bound.epsilon < true for bound in bounds)
    assert np.mean([bound.epsilon for bound in bounds]) > 0.25 * true


def test_a_mechanism_at_its_bound_is_accused_as_rarely_as_promised():
    # Randomised response is the worst mechanism of its epsilon: every guess is right
    # with probability e^eps/(1 + e^eps), and the test has its full size.
    rng = np.random.default_rng(4)
    epsilon, m = 1.0, 200
    right = rng.binomial(m, math.e / (1 + math.e), size=2000)

    false = [certified_bound(m, m, int(v), 0.0).epsilon > epsilon for v in set(right)]
    share = np.mean([dict(zip(set(right), false, strict=True))[v] for v in right])

    assert 0.01 < share < SIGNIFICANCE + 0.015


@pytest.mark.parametrize(("z", "epsilon"), [(0.5, 9.997), (1.0, 4.377), (2.0, 1.993)])
def test_the_estimate_is_the_exact_epsilon_of_a_gaussian(z, epsilon):
    # Cosines with means that are exactly mu / sqrt(d) apart.
    d = 10_000
    ones = np.full(500, 1 / z / math.sqrt(d))

    found = one_shot_estimate(ones, np.zeros(500), d, 1e-5)

    assert found.epsilon == pytest.approx(epsilon, abs=1e-3)
    assert found.low < found.epsilon < found.high
    assert found.mu_stddev == pytest.approx(math.sqrt(4 / 1000))


def test_the_interval_of_the_estimate_covers_the_truth_as_often_as_it_claims():
    rng = np.random.default_rng(5)
    true, d = gaussian_epsilon(1.0, 1, 1e-5), 100
    covered = 0
    for _ in range(400):
        scores_in, scores_out = gaussian_scores(rng, 200, 1.0)
        found = one_shot_estimate(scores_in / 10, scores_out / 10, d, 1e-5)
        covered += found.low <= true <= found.high

    assert 0.92 < covered / 400 < 0.98


def test_an_estimate_needs_both_groups():
    with pytest.raises(ValueError, match="took part"):
        one_shot_estimate(np.zeros(3), np.zeros(0), 10, 1e-5)


@pytest.mark.parametrize("epsilon", [0.1, 8.0, 127_131.0])
def test_the_equivalent_mu_has_that_epsilon(epsilon):
    mu = equivalent_mu(epsilon, 1e-5)

    assert gaussian_epsilon(1 / mu, 1, 1e-5) == pytest.approx(epsilon, rel=1e-6)


def test_losses_of_members_that_fall_are_a_bound_and_a_fixed_number_is_sharper():
    rng = np.random.default_rng(6)
    scores_in, scores_out = gaussian_scores(rng, 1000, 3.0)

    chosen = membership_bound(-scores_in, -scores_out, 1e-5)
    fixed = membership_bound(-scores_in, -scores_out, 1e-5, num_guesses=500)

    assert 1.0 < chosen.epsilon <= gaussian_epsilon(1 / 3, 1, 1e-5)
    assert fixed.num_guesses == 500
    assert chosen.num_canaries == 1000
    right = guess(scores_in, scores_out, chosen.num_guesses)
    assert chosen.num_correct == right
    uncorrected = certified_bound(1000, chosen.num_guesses, right, 1e-5)
    assert chosen.epsilon < uncorrected.epsilon


def test_losses_that_rise_for_members_certify_nothing():
    rng = np.random.default_rng(7)
    scores_in, scores_out = gaussian_scores(rng, 1000, 3.0)

    assert membership_bound(scores_in, scores_out, 1e-5).epsilon == 0.0


def test_choosing_the_number_of_guesses_does_not_accuse_the_innocent():
    rng = np.random.default_rng(8)
    accused = sum(
        membership_bound(*gaussian_scores(rng, 200, 0.0), 0.0).epsilon > 0
        for _ in range(400)
    )

    # Without the correction of the significance it is about 60 of 400.
    assert accused <= 28


@pytest.mark.parametrize(
    ("losses_in", "losses_out", "guesses"),
    [([], [], None), ([math.nan], [0.0], None), ([1.0], [0.0], 3)],
)
def test_impossible_losses_are_rejected(losses_in, losses_out, guesses):
    with pytest.raises(ValueError, match="canar"):
        membership_bound(np.array(losses_in), np.array(losses_out), 1e-5, guesses)


def test_a_spread_2_percent_off_is_not_plausible():
    values = np.random.default_rng(9).standard_normal(200_000)
    squares = float(np.sum(values**2))

    assert plausible_spread(squares, 200_000, 1.0, 1e-9)
    assert not plausible_spread(squares, 200_000, 1.02, 1e-9)
    assert not plausible_spread(squares, 200_000, 0.98, 1e-9)
