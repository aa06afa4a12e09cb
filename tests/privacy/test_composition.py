"""Several runs of one client, against dp-accounting and against the formula itself."""

import math

import dp_accounting as dp
import pytest
from dp_accounting import pld
from scipy.stats import norm

from fedllm.privacy.accounting import calibrate, epsilons, gaussian_epsilon
from fedllm.privacy.composition import composed_epsilon, room_left

DELTA = 1e-5
RUNS = [(1.342, 1.0, 5), (4.0, 1.0, 20), (2.5, 1.0, 1)]
SAMPLED = (2.5, 0.3, 3)


def by_dp_accounting(events: list[tuple[float, float, int]]) -> float:
    accountant = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL)
    for z, q, count in events:
        release = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
        accountant.compose(dp.SelfComposedDpEvent(release, count))
    return float(accountant.get_epsilon(DELTA))


def test_runs_without_sampling_are_one_gaussian_of_dp_accounting():
    assert composed_epsilon(RUNS, DELTA) == pytest.approx(
        by_dp_accounting(RUNS), rel=1e-6
    )


def test_delta_at_the_composed_epsilon_is_the_nodes_own():
    mu = math.sqrt(sum(count / z**2 for z, _, count in RUNS))
    epsilon = composed_epsilon(RUNS, DELTA)

    first, second = norm.cdf(mu / 2 - epsilon / mu), norm.cdf(-mu / 2 - epsilon / mu)

    assert first - math.exp(epsilon) * second == pytest.approx(DELTA, rel=1e-6)


def test_one_run_costs_to_the_last_bit_what_it_promises():
    z = calibrate(8.0, 5, DELTA, "all", 1.0)

    assert composed_epsilon([(z, 1.0, 5)], DELTA) == gaussian_epsilon(z, 5, DELTA) <= 8


def test_one_run_by_secret_coins_costs_what_it_promises():
    z, q, count = SAMPLED
    promised = epsilons(z, count, DELTA, "poisson", q).zero_out

    assert composed_epsilon([SAMPLED], DELTA) == promised
    assert promised < gaussian_epsilon(z, count, DELTA)


def test_sampled_and_unsampled_runs_are_composed_by_dp_accountings_losses():
    events = [*RUNS[1:], SAMPLED]

    spent = composed_epsilon(events, DELTA)

    assert spent == pytest.approx(by_dp_accounting(events), rel=1e-3)
    parts = [composed_epsilon([event], DELTA) for event in events]
    assert max(parts) < spent < sum(parts)


def test_the_order_and_grouping_of_runs_count_for_nothing():
    split = [(4.0, 1.0, 8), SAMPLED, (2.5, 1.0, 1), (4.0, 1.0, 12)]

    assert composed_epsilon(split, DELTA) == composed_epsilon(
        [*RUNS[1:], SAMPLED], DELTA
    )


def test_noise_too_small_for_losses_is_bounded_all_the_same():
    spent = composed_epsilon([(0.1, 0.5, 3), (2.0, 1.0, 1)], DELTA)

    assert math.isfinite(spent)
    assert spent <= gaussian_epsilon((3 / 0.1**2 + 1 / 4) ** -0.5, 1, DELTA)


def test_nothing_spent_is_zero_and_leaves_the_whole_limit():
    assert composed_epsilon([], DELTA) == composed_epsilon([(2.0, 1.0, 0)], DELTA) == 0
    assert room_left(0.0, DELTA, 8.0) == pytest.approx(8.0, rel=1e-6)


def test_a_run_of_what_is_left_makes_the_limit_together_with_what_was_spent():
    spent = RUNS[1:]
    left = room_left(composed_epsilon(spent, DELTA), DELTA, 8.0)
    z = calibrate(left, 1, DELTA, "all", 1.0)

    together = composed_epsilon([*spent, (z, 1.0, 1)], DELTA)

    assert together == pytest.approx(8.0, rel=1e-4)
    assert 8.0 - composed_epsilon(spent, DELTA) < left < 8.0


@pytest.mark.parametrize("spent", [8.0, 9.0])
def test_nothing_is_left_once_the_limit_is_reached(spent):
    assert room_left(spent, DELTA, 8.0) == pytest.approx(0.0, abs=1e-3)
