"""Epsilon against numbers that we did not compute."""

import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedllm.privacy import accounting
from fedllm.privacy.accounting import (
    calibrate,
    epsilons,
    gaussian_epsilon,
    noise_to_signal,
)

RELATION = dp_accounting.NeighboringRelation


def pld_epsilon(z, q, rounds, delta, relation):
    accountant = pld.PLDAccountant(relation)
    event = dp_accounting.GaussianDpEvent(z)
    if q < 1:
        event = dp_accounting.PoissonSampledDpEvent(q, event)
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
    return accountant.get_epsilon(delta)


# Table of the exact noise multiplier at delta 1e-5, zero-out, all clients.
TABLE = [
    (1, 3.73, 1.99, 1.08, 0.60),
    (3, 6.46, 3.45, 1.87, 1.04),
    (5, 8.34, 4.46, 2.42, 1.34),
    (10, 11.80, 6.30, 3.42, 1.90),
    (30, 20.43, 10.92, 5.92, 3.29),
    (100, 37.31, 19.94, 10.81, 6.00),
]


@pytest.mark.parametrize("row", TABLE)
def test_calibration_gives_the_published_noise(row):
    rounds, *noise = row

    found = [calibrate(e, rounds, 1e-5, "all", 1.0) for e in (1.0, 2.0, 4.0, 8.0)]

    # 3.73 sqrt(30) is 20.43 and so on: the table is rounded, sometimes down.
    assert found == pytest.approx(noise, abs=0.012)


@pytest.mark.parametrize(("z", "expected"), [(0.5, 9.997), (1.0, 4.377), (2.0, 1.993)])
def test_one_release_has_the_published_epsilon(z, expected):
    assert gaussian_epsilon(z, 1, 1e-5) == pytest.approx(expected, abs=6e-4)


def test_the_known_blueprint_is_worth_127131():
    assert gaussian_epsilon(0.02, 100, 1e-5) == pytest.approx(127_131, abs=1)


@pytest.mark.parametrize(("target", "replaced"), [(8.0, 19.1), (4.0, 9.1), (1.0, 2.2)])
def test_replace_one_has_the_published_value(target, replaced):
    z = calibrate(target, 3, 1e-5, "all", 1.0)

    spent = epsilons(z, 3, 1e-5, "all", 1.0)

    assert spent.zero_out <= target
    assert spent.zero_out == pytest.approx(target, rel=1e-4)
    assert spent.replace_one == pytest.approx(replaced, abs=0.06)
    assert spent.replace_one == gaussian_epsilon(z / 2, 3, 1e-5)
    assert spent.add_or_remove is None


@settings(max_examples=200, deadline=None)
@given(st.floats(0.3, 50), st.integers(1, 200), st.floats(1e-9, 1e-2))
def test_the_closed_form_satisfies_its_equation(z, rounds, delta):
    epsilon = gaussian_epsilon(z, rounds, delta)
    mu = math.sqrt(rounds) / z

    if epsilon > 30:  # the naive form below cancels there
        return
    found = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
        -mu / 2 - epsilon / mu
    )

    assert found <= delta * (1 + 1e-3)
    if epsilon > 0:
        assert found == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize(("z", "rounds"), [(1.04, 3), (0.6, 1), (3.0, 50)])
def test_the_closed_form_agrees_with_dp_accounting(z, rounds):
    theirs = pld_epsilon(z, 1.0, rounds, 1e-5, RELATION.REPLACE_SPECIAL)

    assert gaussian_epsilon(z, rounds, 1e-5) == pytest.approx(theirs, rel=2e-3)


@settings(deadline=None)
@given(st.floats(1e-3, 1e5), st.integers(1, 1000))
def test_less_noise_or_more_rounds_never_cost_less(z, rounds):
    here = gaussian_epsilon(z, rounds, 1e-5)

    assert gaussian_epsilon(z * 1.1, rounds, 1e-5) <= here
    assert gaussian_epsilon(z, rounds + 1, 1e-5) >= here
    assert math.isfinite(here)


@pytest.mark.parametrize(("z", "q", "rounds"), [(1.0, 0.1, 20), (4.0, 0.5, 3)])
def test_poisson_values_are_dp_accountings_for_the_same_events(z, q, rounds):
    spent = epsilons(z, rounds, 1e-5, "poisson", q)

    assert spent.zero_out == pld_epsilon(z, q, rounds, 1e-5, RELATION.REPLACE_SPECIAL)
    assert spent.replace_one == pld_epsilon(z, q, rounds, 1e-5, RELATION.REPLACE_ONE)
    assert spent.add_or_remove == pld_epsilon(
        z, q, rounds, 1e-5, RELATION.ADD_OR_REMOVE_ONE
    )


def test_replace_one_under_poisson_tends_to_half_the_noise_where_all_are_drawn():
    nearly_all = epsilons(3.0, 3, 1e-5, "poisson", 0.9999)

    everyone = gaussian_epsilon(1.5, 3, 1e-5)
    assert nearly_all.replace_one == pytest.approx(everyone, rel=5e-3)


def test_fixed_cohorts_claim_no_amplification():
    fixed = epsilons(1.0, 10, 1e-5, "fixed", 0.1)

    assert fixed == epsilons(1.0, 10, 1e-5, "all", 1.0)


def test_tiny_noise_under_poisson_returns_at_once_with_a_true_bound():
    spent = epsilons(0.02, 100, 1e-5, "poisson", 0.1)

    assert spent.accountant.startswith("RDP")
    assert spent.zero_out == pytest.approx(127_131, abs=1)  # RDP alone says 135,000
    assert spent.replace_one == gaussian_epsilon(0.01, 100, 1e-5)


def test_very_many_rounds_under_poisson_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(accounting, "_pld", lambda *_: pytest.fail("PLD was asked"))

    spent = epsilons(0.25, 10_000, 1e-5, "poisson", 0.9)

    assert spent.accountant.startswith("RDP")
    assert spent.zero_out <= gaussian_epsilon(0.25, 10_000, 1e-5)


def test_poisson_needs_less_noise_for_the_same_epsilon_and_keeps_it():
    z = calibrate(2.0, 20, 1e-5, "poisson", 0.2)

    assert z < calibrate(2.0, 20, 1e-5, "all", 1.0)
    assert 1.99 < epsilons(z, 20, 1e-5, "poisson", 0.2).zero_out <= 2.0


def test_nothing_released_has_spent_nothing():
    assert epsilons(1.0, 0, 1e-5, "all", 1.0).zero_out == 0


def test_a_tiny_delta_never_asks_for_more_noise_than_without_sampling():
    # Of a delta of this size PLD knows no bound, whatever the noise.
    z = calibrate(8.0, 5, 1e-16, "poisson", 0.1)

    assert z <= calibrate(8.0, 5, 1e-16, "all", 1.0) * 1.01
    assert epsilons(z, 5, 1e-16, "poisson", 0.1).zero_out <= 8.0


@pytest.mark.parametrize(
    ("d", "clients", "rounds", "ratio"),
    [(184_320, 20, 3, 22), (184_320, 100, 5, 5.8), (3_840, 20, 3, 3.2)],
)
def test_r_has_the_published_value(d, clients, rounds, ratio):
    z = calibrate(8.0, rounds, 1e-5, "all", 1.0)

    assert noise_to_signal(z, d, clients) == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize(
    ("rounds", "epsilon", "d", "clients"),
    [
        (10, 1.0, 2_662_400, 19_250),
        (10, 8.0, 3_328, 110),
        (100, 8.0, 50_900_000, 43_188),
    ],
)
def test_the_published_number_of_clients_brings_r_to_1(rounds, epsilon, d, clients):
    z = calibrate(epsilon, rounds, 1e-5, "all", 1.0)

    assert noise_to_signal(z, d, clients) == pytest.approx(1.0, rel=0.01)
