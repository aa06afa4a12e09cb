"""One client's task in one round: its deadline and its seed."""

import time

import pytest

from fedllm.errors import TimeLimitError
from fedllm.training.task import RoundTask, training_seed


def test_a_task_without_a_deadline_never_ends_a_training():
    RoundTask({}, 1.0).check_deadline(10**9)


def test_a_deadline_that_has_passed_raises_an_error_with_the_steps_taken():
    now = time.monotonic()

    RoundTask({}, 1.0, deadline=now + 60).check_deadline(3)
    with pytest.raises(TimeLimitError, match="round-timeout: is over after 3 steps"):
        RoundTask({}, 1.0, deadline=now - 1e-3).check_deadline(3)


def test_seeds_differ_by_run_round_and_partition():
    seeds = {
        training_seed(s, r, p) for s in range(5) for r in range(5) for p in range(5)
    }

    assert len(seeds) == 125
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert training_seed(42, 1, 3) == training_seed(42, 1, 3)
    assert training_seed(2**32 - 1, 100_000, 2**32 - 1) >= 0
