"""What an attacker can reach at most, against the mechanism itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.wording import (
    BANDS,
    default_delta,
    delta_caution,
    gaussian_guesses_right,
    guesses_right,
    percent,
    strength,
)


def test_delta_shrinks_with_the_population():
    assert default_delta(20) == 1e-5
    assert default_delta(1_000_000) == pytest.approx(1e6**-1.1)


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (0.5, "strong"),
        (1.0, "strong"),
        (1.01, "reasonable"),
        (10.0, "reasonable"),
        (10.1, "weak"),
        (50.1, "none to speak of"),
        (math.inf, "none to speak of"),
        (None, "none"),
    ],
)
def test_strength_follows_the_tiers(epsilon, words):
    assert strength(epsilon) == words
    assert strength(epsilon, 1e-5, 20) == words


@pytest.mark.parametrize(
    ("epsilon", "delta", "units", "words"),
    [
        (0.9, 0.5, 20, "none to speak of"),
        (1.0, 0.05, 20, "none to speak of"),
        (0.9, 1e-4, 20, "reasonable"),
        (8.0, 1e-4, 20, "weak"),
        (30.0, 1e-4, 20, "none to speak of"),
        (60.0, 1e-4, 20, "none to speak of"),
        (0.9, 1e-5, 1_000_000, "none to speak of"),
        (0.9, 1e-5, 50_000, "reasonable"),
        (0.9, 1e-4, None, "reasonable"),
        (None, 0.5, 20, "none"),
    ],
)
def test_a_large_delta_takes_from_the_word(epsilon, delta, units, words):
    assert strength(epsilon, delta, units) == words
    assert delta_caution(delta, units)


@given(st.integers(2, 10**9), st.sampled_from([0.5, 5.0, 20.0, 60.0]))
def test_the_default_delta_takes_nothing_from_the_word(units, epsilon):
    delta = default_delta(units)

    assert strength(epsilon, delta, units) == strength(epsilon)
    assert delta_caution(delta, units) is None


@given(st.floats(0, 100), st.floats(1e-12, 1), st.integers(2, 10**6))
def test_no_delta_makes_a_word_stronger(epsilon, delta, units):
    words = [word for _, word in BANDS]

    assert words.index(strength(epsilon, delta, units)) >= words.index(
        strength(epsilon)
    )


@given(st.floats(0, 100), st.floats(1e-12, 0.1))
def test_a_bound_by_epsilon_lies_between_chance_and_certainty(epsilon, delta):
    assert 0.5 <= guesses_right(epsilon, delta) <= 1.0


@given(st.floats(0.3, 50), st.integers(1, 50), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_what_is_known_of_the_noise_is_never_above_the_bound_by_epsilon(z, t, delta):
    epsilon = gaussian_epsilon(z, t, delta)

    exact = gaussian_guesses_right(z, t)

    assert 0.5 < exact <= guesses_right(epsilon, delta) * (1 + 1e-9)


def test_a_real_attacker_reaches_the_limit_and_does_not_pass_it():
    z, rounds, n = 1.3, 5, 200_000
    draws = np.random.default_rng(3)
    took_part = draws.integers(0, 2, n)
    releases = took_part[:, None] + z * draws.standard_normal((n, rounds))

    right = ((releases.sum(1) > rounds / 2) == took_part).mean()

    assert right == pytest.approx(gaussian_guesses_right(z, rounds), abs=0.004)
    assert right == pytest.approx(norm.cdf(math.sqrt(rounds) / z / 2), abs=0.004)


def test_known_values():
    assert guesses_right(0.0, 0.0) == 0.5
    assert guesses_right(math.inf, 1e-5) == 1.0
    assert guesses_right(math.log(3), 0.0) == pytest.approx(0.75)
    e8 = math.exp(8)
    by_hand = (1 + (e8 - 1 + 2e-5) / (e8 + 1)) / 2
    assert guesses_right(8.0, 1e-5) == pytest.approx(by_hand, abs=1e-12)


def test_shares_are_rounded_up():
    assert percent(0.99966) == "99.97 %"
    assert percent(0.5) == "50.00 %"
    assert percent(0.9999999) == "100.00 %"
