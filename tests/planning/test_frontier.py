"""R against the published table, and advice with numbers."""

import math
from dataclasses import replace

import pytest

from fedllm.planning.frontier import (
    Frontier,
    Measured,
    expected,
    load_frontier,
    noise_level,
    step_by_rule,
)
from fedllm.privacy.accounting import calibrate, gaussian_epsilon


def frontier() -> Frontier:
    """A frontier of three runs, whose loss rises by 0.1 with each doubling of noise."""
    rows = tuple(
        Measured("ffa-lora", 8, 1000, clients, 8.0, 4, 1.0, 0.6, 0.6, 0.6, losses)
        for clients, losses in ((20, (3.0, 3.1)), (40, (2.95,)), (80, (2.85,)))
    )
    quiet = Measured("ffa-lora", 8, 1000, 20, None, 4, 0.0, 0.6, 0.6, 0.6, (2.8,))
    return Frontier("a model", "some data", 4.0, 2.5, (*rows, quiet))


def test_the_noise_that_adds_up_is_that_of_the_sum_of_all_rounds():
    # Four rounds of noise z = 1 on a sum of 20 clients, each divided by 20.
    assert noise_level(1.0, 4, 20) == pytest.approx(0.1)


def test_an_expected_loss_lies_between_its_neighbours():
    found = expected("ffa-lora", 0.1 / math.sqrt(2), frontier())

    assert found is not None
    assert found.loss == pytest.approx((3.05 + 2.95) / 2)
    assert found.share == pytest.approx((4.0 - 3.0) / 1.5)
    assert found.inside
    # Half of the way to either neighbour, and half of the seeds' range.
    assert found.high - found.loss == pytest.approx(0.05 + 0.05)


def test_beyond_what_was_measured_the_nearest_end_is_taken_and_said():
    for level, loss in ((10.0, 3.05), (1e-4, 2.85)):
        found = expected("ffa-lora", level, frontier())
        assert found is not None and not found.inside
        assert found.loss == pytest.approx(loss)


def test_of_several_settings_at_one_noise_the_best_counts():
    rows = frontier().rows
    worse = replace(rows[1], test_losses=(3.5,))
    for both in ((worse, *rows), (*rows, worse)):
        found = expected("ffa-lora", 0.05, replace(frontier(), rows=both))

        assert found is not None and found.loss == pytest.approx(2.95)


def test_nothing_is_expected_of_a_kind_that_was_not_measured():
    assert expected("lora", 0.1, frontier()) is None


def test_the_frontier_that_comes_along_holds_what_its_epsilons_say():
    found = load_frontier()

    assert found.loss_without_privacy < found.loss_before
    for row in found.rows:
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

    found = step_by_rule(noise_level(z, rounds, clients))

    assert found == pytest.approx(used, rel=0.12)
