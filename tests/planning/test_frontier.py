"""The frontier's noise levels and rows, and the rule for the step."""

import math
from dataclasses import replace

import pytest

from fedllm.planning.frontier import (
    Measured,
    bracket,
    load_frontier,
    noise_level,
    step_by_rule,
)
from fedllm.privacy.accounting import calibrate, gaussian_epsilon
from fedllm.strategy.server_optimizer import cosine


def measured(clients: int, *losses: float) -> Measured:
    """A federation of four rounds with noise multiplier 1."""
    return Measured(
        kind="ffa-lora",
        rank=8,
        clients=clients,
        rounds=4,
        noise_multiplier=1.0,
        clipping_norm=0.6,
        server_learning_rate=12.0 / clients,
        server_learning_rate_min=12.0 / clients,
        batch_size=8,
        num_trainable=1000,
        epsilon=8.0,
        test_losses=losses,
    )


# The loss rises by 0.1 with each doubling of the noise.
ROWS = [measured(20, 3.0, 3.1), measured(40, 2.95), measured(80, 2.85)]


def test_the_noise_that_adds_up_is_that_of_the_sum_of_all_rounds():
    # Four rounds of noise z = 1 on a sum of 20 clients, each divided by 20.
    assert noise_level(1.0, 4, 20) == pytest.approx(0.1)


def test_a_noise_level_lies_between_its_neighbours():
    sides = bracket(ROWS, 0.1 / math.sqrt(2))

    assert sides is not None
    assert (sides.below, sides.above) == (ROWS[1], ROWS[0])
    assert sides.share == pytest.approx(0.5)
    assert sides.loss == pytest.approx((3.05 + 2.95) / 2)
    assert sides.step == pytest.approx(0.36 / math.sqrt(2))


def test_beyond_what_was_measured_both_sides_are_the_nearest_end():
    for level, row in ((10.0, ROWS[0]), (1e-4, ROWS[2])):
        sides = bracket(ROWS, level)

        assert sides is not None
        assert sides.below is sides.above is sides.nearest is row
        assert sides.loss == pytest.approx(row.loss)


def test_of_several_settings_at_one_noise_the_best_counts():
    worse = replace(ROWS[1], test_losses=(3.5,))
    for rows in ((worse, *ROWS), (*ROWS, worse)):
        sides = bracket(rows, 0.05)

        assert sides is not None and sides.loss == pytest.approx(2.95)


def test_without_rows_there_is_no_bracket():
    assert bracket([], 0.1) is None


def test_the_mean_rate_is_that_of_a_half_cosine_over_the_rounds():
    falling = replace(ROWS[0], server_learning_rate=1.5, server_learning_rate_min=0.5)
    rates = [cosine(1.5, 0.5, server_round, 4) for server_round in range(1, 5)]

    assert falling.mean_server_learning_rate == pytest.approx(sum(rates) / 4)
    assert replace(falling, rounds=1).mean_server_learning_rate == 1.5
    assert falling.step == pytest.approx(0.6)


def test_the_frontier_that_comes_along_holds_what_its_epsilons_say():
    frontier = load_frontier()

    assert frontier.loss_without_privacy < frontier.loss_before
    for row in frontier.rows:
        assert all(1 < loss < 12 for loss in row.test_losses), row
        if row.epsilon is None:
            assert row.noise_multiplier == 0
        else:
            spent = gaussian_epsilon(row.noise_multiplier, row.rounds, 1e-5)
            assert spent == pytest.approx(row.epsilon, rel=1e-2), row


@pytest.mark.parametrize(
    ("clients", "epsilon", "rounds", "used"),
    # Mean server learning rates that were the best of those run (docs/results.md).
    [(20, 8.0, 5, 0.6), (20, 2.0, 5, 0.2), (100, 8.0, 8, 1.0), (100, 2.0, 8, 0.55)],
)
def test_the_rule_gives_the_steps_that_were_good(clients, epsilon, rounds, used):
    z = calibrate(epsilon, rounds, 1e-5, "all", 1.0)

    rate = step_by_rule(noise_level(z, rounds, clients))

    assert rate == pytest.approx(used, rel=0.12)
