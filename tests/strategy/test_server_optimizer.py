"""Server optimizers against their formulas."""

import numpy as np
import pytest

from fedllm.strategy.server_optimizer import ServerOptimizer, cosine


def test_server_optimizers_follow_their_formulas():
    update = np.array([1.0, -2.0])

    momentum = ServerOptimizer("momentum", 0.5)
    momentum.step(update, 1.0)
    np.testing.assert_allclose(momentum.step(update, 0.1), 0.1 * 1.5 * update)

    adam = ServerOptimizer("adam", 0.9)
    expected = 0.1 * update / (np.sqrt(0.01 * update**2) + 1e-3)
    np.testing.assert_allclose(adam.step(update, 1.0), expected)

    yogi = ServerOptimizer("yogi", 0.9)
    np.testing.assert_allclose(yogi.step(update, 1.0), expected)

    np.testing.assert_allclose(
        ServerOptimizer("none", 0.9).step(update, 2.0), 2 * update
    )


def test_the_learning_rate_falls_as_a_half_cosine():
    assert [cosine(1.0, 0.0, r, 3) for r in (1, 2, 3)] == pytest.approx([1, 0.5, 0])
    assert cosine(0.7, 0.1, 1, 1) == 0.7


def test_yogi_lets_its_second_moment_fall_slowly():
    optimizer = ServerOptimizer("yogi", 0.9)
    optimizer.step(np.array([1.0]), 1.0)
    step = optimizer.step(np.array([0.05]), 1.0)

    # Second moments: 0.01 * 1, then less 0.01 * 0.05**2, for it is above that square.
    first, second = 0.9 * 0.1 + 0.1 * 0.05, 0.01 - 0.01 * 0.05**2
    assert step == pytest.approx(first / (second**0.5 + 1e-3))
