"""The grid of a sealed sum keeps its bounds, and its noise is what is promised."""

import math

import numpy as np
import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.discrete_gaussian import SPREAD, sample_of_two, variance_of_two
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.pads import add_pad, fresh_seed, integers_of, residues
from fedllm.privacy.sealed_sum import (
    SealedGrid,
    deviation,
    is_plausible,
    sealed_grid,
)

Z, C = 1.342, 0.6
GENERATOR = SecureGenerator()


@pytest.mark.parametrize("trustees", range(1, 11))
@pytest.mark.parametrize("z", [0.3, 1.342, 12.0])
def test_the_honest_noise_is_at_least_z_times_the_sensitivity(trustees, z):
    for colluding in range(trustees):
        grid = sealed_grid(z, trustees, colluding, 100, 4000)
        variance = (trustees - colluding) * variance_of_two(grid.spread) - 4

        # In integers and exact fractions: no float decides.
        numerator, denominator = z.as_integer_ratio()
        assert variance * denominator**2 >= (numerator * grid.sensitivity) ** 2
        # And no more than a hundredth of a percent is given away.
        assert math.sqrt(variance) / (z * grid.sensitivity) < 1.0001


def test_an_honest_sum_has_room():
    for n in (3, 1000, 3000):
        grid = sealed_grid(0.3, 10, 0, n, 1)
        noise = 10 * math.sqrt(10 * variance_of_two(grid.spread))
        assert n * grid.sensitivity + noise < 2**31
    assert sealed_grid(Z, 3, 1, 20, 184_320).spread == SPREAD


@pytest.mark.parametrize(
    ("z", "trustees", "colluding", "clients", "size"),
    [
        (Z, 3, 3, 20, 10),
        (Z, 11, 1, 20, 10),
        (Z, 0, 0, 20, 10),
        (0.0, 3, 1, 20, 10),
        (math.inf, 3, 1, 20, 10),
        (Z, 3, 1, 0, 10),
        (1e-3, 3, 1, 10**7, 10),
        (300.0, 3, 1, 20, 2_662_400),
    ],
)
def test_numbers_without_a_grid_are_refused(z, trustees, colluding, clients, size):
    with pytest.raises(PrivacyError):
        sealed_grid(z, trustees, colluding, clients, size)


def test_integers_are_never_longer_than_the_sensitivity():
    grid = sealed_grid(Z, 3, 1, 20, 1000)
    draw = np.random.default_rng(0)
    for factor in (0.0, 1e-9, 1e-3, 1.0, 1e9, 1e200):
        v = grid.encode(draw.normal(size=1000) * factor, C)
        assert int(np.dot(v, v)) <= grid.sensitivity**2
        if factor >= 1.0:
            assert math.sqrt(np.dot(v, v)) > 0.999 * grid.sensitivity


def test_a_short_update_is_kept_to_a_unit():
    grid = sealed_grid(Z, 3, 1, 20, 1000)
    update = np.random.default_rng(0).normal(size=1000) * 1e-3

    kept = grid.decode(grid.encode(update, C), C)

    assert np.abs(kept - update).max() <= C / grid.sensitivity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_zero(value):
    update = np.ones(10)
    update[3] = value
    assert not sealed_grid(Z, 3, 1, 20, 10).encode(update, C).any()


def test_a_trustees_noise_has_its_deviation_and_never_repeats():
    grid = SealedGrid(100, 1)
    sigma = math.sqrt(variance_of_two(100))
    first, second = (grid.noise(200_000, GENERATOR) for _ in range(2))

    # A share 5 % off would be 30 standard deviations away.
    for noise in (first, second):
        assert noise.std() / sigma == pytest.approx(1, abs=0.01)
        assert abs(noise.mean()) < 0.02 * sigma
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="spread"):
        sample_of_two(1, SPREAD + 1, GENERATOR.words())


@pytest.mark.parametrize(("k", "c"), [(2, 1), (3, 0), (3, 1), (5, 2)])
def test_the_noise_of_all_is_what_the_sums_readers_are_promised(k, c):
    size = 200_000
    grid = sealed_grid(Z, k, c, 20, size)
    total = sum(grid.noise(size, GENERATOR) for _ in range(k))
    honest = sum(grid.noise(size, GENERATOR) for _ in range(k - c))

    of_all = float(np.std(grid.decode(total, C))) / C
    of_honest = float(np.std(grid.decode(honest, C))) / C

    assert of_all == pytest.approx(deviation(Z, k, c), rel=0.01)
    assert of_honest == pytest.approx(Z, rel=0.01)


def test_a_thousand_random_federations_open_to_the_plain_sum():
    draw = np.random.default_rng(1)
    for _ in range(1000):
        size, clients = int(draw.integers(1, 6)), int(draw.integers(1, 8))
        trustees = int(draw.integers(1, 5))
        colluding = int(draw.integers(0, trustees))
        grid = sealed_grid(float(draw.uniform(0.3, 5)), trustees, colluding, 8, size)
        total, plain = np.zeros(size, np.uint32), np.zeros(size, np.int64)
        answers = np.zeros((trustees, size), np.uint32)
        for _ in range(clients):
            integers = grid.encode(draw.normal(size=size) * draw.uniform(0, 2), C)
            y = residues(integers)
            seeds = [fresh_seed() for _ in range(trustees)]
            for seed in seeds:
                add_pad(y, seed)
            if draw.random() < 0.3:
                continue  # vanished: in no list
            total += y
            plain += integers
            for answer, seed in zip(answers, seeds, strict=True):
                add_pad(answer, seed)
        for answer in answers:
            total -= answer
        assert np.array_equal(integers_of(total), plain)


@pytest.mark.parametrize("size", [10, 4000])
def test_the_length_of_honest_sums_is_plausible(size):
    draw = np.random.default_rng(2)
    n, sigma = 20, deviation(Z, 3, 1)
    signal = np.zeros(size)
    signal[0] = n * C
    for _ in range(200):
        noise = draw.normal(scale=sigma * C, size=size)
        assert is_plausible(noise, C, sigma, n)
        assert is_plausible(signal + noise, C, sigma, n)


def test_a_sum_that_is_too_long_or_lacks_noise_is_not_plausible():
    draw = np.random.default_rng(3)
    size, n, sigma = 184_320, 20, deviation(Z, 3, 1)
    noise = draw.normal(scale=sigma * C, size=size)
    long = noise.copy()
    long[0] += 200 * C

    assert not is_plausible(long, C, sigma, n)
    # One of three trustees kept its noise back.
    assert not is_plausible(noise * math.sqrt(2 / 3), C, sigma, n)
    # A wrong modulus or a missing pad: uniform values.
    assert not is_plausible(draw.integers(-(2**31), 2**31, size) * 1e-6, C, sigma, n)
