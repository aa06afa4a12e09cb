"""The bound of a person at two clients, against dp-accounting and by numeric integration."""

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy.integrate import trapezoid
from scipy.stats import norm

from fedllm.privacy.accounting import gaussian_epsilon, record_epsilon
from fedllm.privacy.group_privacy import group_epsilon


@pytest.mark.parametrize("event", [(1.2, 0.1, 3), (0.9, 0.02, 50), (3.0, 0.3, 10)])
def test_a_group_of_one_is_dp_accountings_own_poisson_batch(event):
    z, q, count = event
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    accountant.compose(step, count)
    truth = accountant.get_epsilon(1e-5)

    # Never below, and above by its coarser grid alone.
    assert truth - 1e-6 <= group_epsilon(event, 1e-5, 1) <= 1.02 * truth


@pytest.mark.parametrize(("z", "q"), [(1.0, 0.2), (2.0, 0.5), (0.8, 0.05)])
def test_a_release_of_two_is_the_mixture_by_numeric_integration(z, q):
    """delta(epsilon) of both directions of N(0, z^2) and the binomial mixture."""
    epsilon = group_epsilon((z, q, 1), 1e-5, 2)
    x = np.linspace(-20 * z - 4, 20 * z + 4, 2_000_001)
    without = norm.pdf(x, 0, z)
    mixed = sum(
        chance * norm.pdf(x, mean, z)
        for mean, chance in ((0, (1 - q) ** 2), (1, 2 * q * (1 - q)), (2, q * q))
    )

    def delta(at: float) -> float:
        two = (mixed - np.exp(at) * without, without - np.exp(at) * mixed)
        return max(float(trapezoid(np.maximum(d, 0), x)) for d in two)

    assert delta(epsilon) <= 1e-5 * (1 + 1e-6)
    assert delta(0.98 * epsilon) > 1e-5


def test_two_cost_more_than_one_and_no_more_than_twice_the_sensitivity():
    for event in ((1.2, 0.1, 3), (0.9, 0.02, 50)):
        one, two = record_epsilon([event], 1e-5), group_epsilon(event, 1e-5, 2)
        assert one < two <= gaussian_epsilon(event[0] / 2, event[2], 1e-5)


def test_without_sampling_two_are_one_of_twice_the_norm():
    assert group_epsilon((2.0, 1.0, 4), 1e-5, 2) == gaussian_epsilon(1.0, 4, 1e-5)


def test_at_little_noise_the_bound_is_the_one_without_sampling():
    assert group_epsilon((0.3, 0.1, 2), 1e-5, 2) == gaussian_epsilon(0.15, 2, 1e-5)
    assert group_epsilon((0.3, 0.1, 0), 1e-5, 2) == 0.0
