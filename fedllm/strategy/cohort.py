"""Which clients take part in a round."""

import numpy as np

from fedllm.config import RunConfig
from fedllm.privacy.mechanism import SecureGenerator


def choose_cohort(
    config: RunConfig,
    population: list[int],
    server_round: int,
    generator: SecureGenerator,
) -> list[int]:
    """Return the node ids of a round's cohort.

    Under privacy the draws are the operating system's; without it they follow from the
    seed and the round.

    Args:
        config: The run config.
        population: Node ids of all clients.
        server_round: The round.
        generator: Draws from the operating system, which cannot be predicted.
    """
    strategy, size = config.strategy, len(population)
    if strategy.sampling == "all":
        return population
    if strategy.sampling == "poisson":
        # Amplification rests on coins that cannot be predicted.
        coins = generator.bernoulli(strategy.fraction_train, size)
        return [n for n, coin in zip(population, coins, strict=True) if coin]
    count = strategy.num_sampled(size)
    if config.privacy.unit == "none":
        return seeded_cohort(config.seed, population, server_round, count)
    chosen = generator.sample_without_replacement(size, count)
    return [population[index] for index in sorted(chosen)]


def seeded_cohort(
    seed: int, population: list[int], stream: int, count: int
) -> list[int]:
    """Return `count` node ids that follow from a seed and a stream, in order."""
    generator = np.random.default_rng([seed, stream])
    chosen = generator.choice(len(population), size=count, replace=False)
    return [population[index] for index in sorted(chosen)]
