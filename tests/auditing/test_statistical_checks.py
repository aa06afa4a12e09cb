"""Checks of noise and coins convict what they should."""

import random

import numpy as np

from fedllm.privacy.mechanism import SecureGenerator
from fedllm.strategy import fedavg
from tests.helpers.audits import auditor, failed, private


def test_a_half_of_the_noise_of_the_generator_itself_is_convicted(monkeypatch):
    real = SecureGenerator.discrete_gaussian
    monkeypatch.setattr(
        SecureGenerator, "discrete_gaussian", lambda s, n: real(s, n) * 19 // 20
    )

    assert "noise scale" in failed(auditor(dimension=20_000).run())


def test_coins_of_a_seed_are_convicted(monkeypatch):
    keys = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
    keys |= {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 3.0}
    keys |= {"num-server-rounds": 2}

    def cohort(config, population, server_round, generator):
        coins = np.random.default_rng(server_round).random(len(population)) < 0.5
        return [n for n, coin in zip(population, coins, strict=True) if coin]

    monkeypatch.setattr(fedavg, "choose_cohort", cohort)

    assert "secret coins" in failed(auditor(private(**keys)).run())


def test_coins_of_another_probability_are_convicted(monkeypatch):
    keys = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
    keys |= {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 3.0}
    keys |= {"num-server-rounds": 2}
    real = SecureGenerator.bernoulli
    monkeypatch.setattr(
        SecureGenerator, "bernoulli", lambda s, p, n: real(s, p + 0.05, n)
    )

    assert "secret coins" in failed(auditor(private(**keys)).run())


def test_the_global_generators_are_left_as_they_were():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002 - what a caller may have done
    expected = (
        random.Random(5).random(),
        np.random.RandomState(5).rand(),
    )

    auditor().run()

    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002
