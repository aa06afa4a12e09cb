"""The sum of all clients' records: what one record changes, and what no reply can do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedllm.auditing.harness import ZeroNoise
from fedllm.errors import PrivacyError
from fedllm.privacy.discrete_gaussian import VARIANCE, integer_sensitivity
from fedllm.privacy.joint_sum import JointSum, most_records, record_units
from fedllm.privacy.mechanism import FixedPointSum, SecureGenerator, clipped

D, Z, B, C = 50, 1.0, 16, 0.5
A = integer_sensitivity(Z)
U = record_units(D, Z, B)
EXPECTED = 4.0
RADIUS = most_records(EXPECTED) * U


def added(integers, expected=EXPECTED, size=D):
    """Return what one client's integers add to the sum, as integers."""
    total = JointSum(size, Z, B)
    total.add(np.asarray(integers, np.int64), expected)
    return [int(value) for value in total._total]


def length(integers):
    """Return the exact norm of integers, rounded up."""
    return math.isqrt(sum(int(v) ** 2 for v in integers)) + 1


def direction(seed, size=D):
    draw = np.random.default_rng(seed).normal(size=size)
    return draw / np.linalg.norm(draw)


def test_a_records_units_leave_room_for_the_cut_and_the_error_of_a_projection():
    slack = A - U

    assert slack >= math.isqrt(D) + 1 + 2e-12 * most_records(B) * U
    assert U > 0.999999 * A


@pytest.mark.parametrize("norm", [0.0, 0.5 * C, C, 1e6, 1e300])
def test_a_record_of_any_norm_adds_integers_of_norm_at_most_its_units(norm):
    total = FixedPointSum(D, C, U)
    update = clipped(direction(3) * norm, C).update
    assert update is not None
    total.add(update)

    assert length(total.integers()) <= U + 1


@hypothesis_settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 0.999, 1.0, 1.0 + 1e-15, 1.001, 3.0, 1e4]),
    st.floats(-1, 1),
)
def test_one_record_changes_what_its_client_adds_by_at_most_the_noise_is_made_for(
    seed, share, cosine
):
    """Inside, across and outside of the ball, along it and across it."""
    one, two = direction(seed), direction(seed + 1)
    with_it = np.trunc(one * share * RADIUS)
    step = cosine * one + math.sqrt(1 - cosine**2) * two
    without = np.trunc(with_it + step / np.linalg.norm(step) * (U - 8))

    moved = [x - y for x, y in zip(added(with_it), added(without), strict=True)]

    assert length(np.subtract(with_it, without)) <= U
    assert length(moved) <= A


def test_an_honest_sum_is_added_bit_for_bit():
    batch = np.trunc(direction(1) * 8 * U).astype(np.int64)

    assert added(batch) == batch.tolist()


@pytest.mark.parametrize(
    "hostile",
    [
        np.full(D, 2**63 - 1),
        np.full(D, -(2**63)),
        np.eye(1, D, 3, dtype=np.int64)[0] * 2**62,
        np.where(np.arange(D) % 2, 2**63 - 1, -(2**63)),
    ],
)
def test_whatever_a_client_sends_adds_no_more_than_its_share(hostile):
    assert length(added(hostile)) <= RADIUS * (1 + 1e-11) + 1


def test_a_batch_has_more_records_than_its_ball_once_in_10_to_the_11():
    from scipy.stats import poisson

    for expected in (0.01, 0.5, 4, 40, 512, 1e5):
        assert poisson.sf(most_records(expected), expected) < 1e-11


def test_the_sum_is_in_units_of_the_gradient():
    total = JointSum(D, Z, B)
    gradient = direction(5) * C / 2
    fixed = FixedPointSum(D, C, U)
    fixed.add(gradient)
    for _ in range(3):
        total.add(fixed.integers(), EXPECTED)

    np.testing.assert_allclose(total.noised(C, ZeroNoise()), 3 * gradient, atol=1e-7)


def test_the_noise_is_that_of_the_multiplier_and_added_once():
    """20,000 values: the spread is known to 0.5 %, so half or twice the noise is seen."""
    size = 20_000
    released = JointSum(size, Z, B).noised(C, SecureGenerator())
    units = record_units(size, Z, B)

    assert released.std() == pytest.approx(Z * C, rel=0.03)
    assert math.sqrt(VARIANCE - 4) / A >= Z
    assert units <= A


def test_noise_that_leaves_no_grid_is_an_error():
    with pytest.raises(PrivacyError, match=r"noise-multiplier: 1e\+06 is too large"):
        record_units(10**6, 1e6, B)
    with pytest.raises(PrivacyError, match="above"):
        record_units(10, 1e9, B)


def test_more_clients_than_64_bits_hold_are_an_error():
    total = JointSum(2, 1e-4, 2**22)
    with pytest.raises(PrivacyError, match="do not fit"):
        total.add(np.zeros(2, np.int64), 2.0**22)
