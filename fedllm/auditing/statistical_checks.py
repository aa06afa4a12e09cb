"""The checks by measurement: the noise, its place, and the secret coins."""

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from fedllm.auditing.harness import (
    NUM_CLIENTS,
    Bench,
    Finding,
    Setup,
    flat_values,
    honest_reply,
    norm_of,
)
from fedllm.privacy.lower_bounds import plausible_spread
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.strategy.fedavg import AdapterFedAvg

# A correct strategy fails a statistical check with about this probability.
_BY_CHANCE = 1e-9
_SIGMAS = 6.0
_SIZE = 4096
# Enough that two cohorts are never equal by chance if q is 0.02 to 0.98: below 1e-17.
_COINS = 1000


def noise_scale(setup: Setup) -> Finding:
    """Measure the noise of rounds without and with clients."""
    squares = {"without": 0.0, "with": 0.0}
    rounds = 2
    promised = setup.settings.noise_multiplier * setup.settings.clipping_norm
    for _ in range(rounds):
        with setup.bench(setup.dimension) as bench:
            squares["without"] += float(np.sum(bench.release(1, []) ** 2))
        releases = []
        for silent in (True, False):
            with setup.bench(setup.dimension, silent=silent) as bench:
                honest = honest_reply(bench, 2.0)
                replies = [(node, honest) for node in bench.population]
                releases.append(bench.release(1, replies))
        squares["with"] += float(np.sum((releases[1] - releases[0]) ** 2))
    count = rounds * setup.dimension
    ratios = {k: (s / count) ** 0.5 / promised for k, s in squares.items()}
    passed = all(
        plausible_spread(s, count, promised, _BY_CHANCE) for s in squares.values()
    )
    return passed, (
        f"standard deviation over the promised z C = {promised:.4g}: "
        f"{ratios['without']:.4f} without clients, {ratios['with']:.4f} with "
        f"{NUM_CLIENTS} ({count:,} values each)"
    )


def fresh_noise(setup: Setup) -> Finding:
    """Compare the noise of two strategies and two rounds with all seeds equal."""
    noise = []
    for _ in range(2):
        with setup.bench(setup.dimension) as bench, seeded():
            kind = type(bench.strategy.generator)
            if kind is not SecureGenerator:
                return False, f"the noise comes from {kind.__name__}"
            noise.append(bench.release(1, []))
            if bench.ledger.may_spend(setup.settings.max_epsilon):
                with seeded():
                    noise.append(bench.release(2, []))
    pairs = list(itertools.combinations(noise, 2))
    largest = max(
        abs(float(np.dot(a, b))) / (norm_of(a) * norm_of(b)) for a, b in pairs
    )
    limit = _SIGMAS / setup.dimension**0.5
    return largest < limit, (
        "with all seeds set alike no two of "
        f"{len(noise)} releases of two strategies resemble each other: largest "
        f"correlation {largest:.4f} (chance stays below {limit:.4f})"
    )


def order(setup: Setup) -> Finding:
    """Compare the adapter with one made of noised releases alone, for each optimiser."""
    promised = setup.promised_noise
    optimizers: tuple[Literal["none", "momentum", "adam", "yogi"], ...]
    optimizers = ("none", "momentum", "adam", "yogi")
    noised, worst, count = True, 0.0, 0
    for optimizer in optimizers:
        strategy = replace(setup.config.strategy, server_optimizer=optimizer)
        config = replace(setup.config, strategy=strategy)
        with setup.bench(_SIZE, config=config) as bench:
            for server_round in bench.rounds(3):
                bench.release(server_round, [])
            releases = np.concatenate(bench.entered)
            releases *= bench.settings.num_sampled_clients
            squares = float(np.sum(releases**2))
            noised &= plausible_spread(squares, len(releases), promised, _BY_CHANCE)
            worst = max(worst, _unexplained(bench))
            count += len(bench.entered)
    return worst < 1e-3 and noised, (
        f"what enters the server optimiser is noised{'' if noised else ': NO'}, and what "
        f"leaves is a function of it alone: in {count} rounds with {len(optimizers)} "
        f"optimisers the adapter differs from the one made of the releases by "
        f"{worst:.2g} of a step"
    )


def _unexplained(bench: Bench) -> float:
    """Return the largest distance from adapters made of the releases alone, in steps."""
    twin = AdapterFedAvg(bench.config, dict(bench.start), bench.population)
    before, worst = flat_values(bench.start, bench.start), 0.0
    for index, (entered, record) in enumerate(
        zip(bench.entered, bench.records, strict=True)
    ):
        twin.apply_update(index + 1, entered)
        expected = flat_values(twin.reference, bench.start)
        arrays = dict(zip(record, record.to_numpy_ndarrays(), strict=True))
        off = norm_of(flat_values(arrays, bench.start) - expected)
        worst = max(worst, off / norm_of(expected - before))
        before = expected
    return worst


def secret_coins(setup: Setup) -> Finding:
    """Compare the sizes of many cohorts with the binomial distribution."""
    from scipy.stats import binomtest

    q = setup.config.strategy.fraction_train
    draws: list[tuple[int, ...]] = []
    for _ in range(2):
        with setup.bench(8, num_clients=_COINS) as bench, seeded():
            draws += [tuple(bench.cohort(1)) for _ in range(10)]
    chosen, asked = sum(map(len, draws)), _COINS * len(draws)
    chance = float(binomtest(chosen, asked, q).pvalue)
    repeated = 0.02 <= q <= 0.98 and len(set(draws)) < len(draws)
    return chance > _BY_CHANCE and not repeated, (
        f"{chosen} of {asked} coins fell for their client, expected "
        f"{q * asked:.0f}; {len(draws) - len(set(draws))} cohorts were drawn twice"
    )


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Seed the global generators as a trainer does, and restore them at the end."""
    # ruff: noqa: NPY002 - the global generator is what is tested
    ours, theirs = random.getstate(), np.random.get_state()
    random.seed(1)
    np.random.seed(1)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
