"""The noise of a run, fixed before round 1: the server adds it, and a node counts on it."""

import math
from bisect import bisect_left

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import (
    calibrate,
    default_delta,
    epsilons,
    gaussian_epsilons,
)
from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.ledger import PrivacySettings


def privacy_settings(
    config: RunConfig,
    population_size: int,
    num_trainable: int,
    earlier_mu_squared: float = 0.0,
    start_note: str = "",
    trustees: int | None = None,
) -> PrivacySettings:
    """Return the privacy settings, with the noise given or calibrated to the target epsilon.

    Args:
        config: The run config, with `privacy.unit="client"`.
        population_size: Clients in the federation, N.
        num_trainable: Trained values d.
        earlier_mu_squared: Sum of 1 / z^2 over the rounds of the runs before, if this one
            starts from their adapter and samples as they did, without a coin; the target
            bounds all of them together.
        start_note: What is not known of the start adapter.
        trustees: How many there are of a sealed run; None: all that it names.

    Raises:
        PrivacyError: The noise is larger than the grid of the sum can hold, or the runs
            before have spent the target.
    """
    privacy, strategy = config.privacy, config.strategy
    delta = privacy.delta or default_delta(population_size)
    noise_multiplier = noise_multiplier_at(config, delta)
    if earlier_mu_squared and privacy.target_epsilon:
        noise_multiplier = _what_is_left(config, delta, earlier_mu_squared)
    try:
        integer_sensitivity(noise_multiplier)
    except ValueError as error:
        raise PrivacyError(
            f"privacy.target-epsilon, privacy.noise-multiplier: {error}: ask for a larger "
            "epsilon"
        ) from None
    return PrivacySettings(
        unit="client",
        sampling=strategy.sampling,
        population_size=population_size,
        num_sampled_clients=strategy.expected_cohort(population_size),
        clipping_norm=privacy.clipping_norm,
        noise_multiplier=noise_multiplier,
        delta=delta,
        target_epsilon=privacy.target_epsilon,
        max_epsilon=privacy.max_epsilon,
        num_trainable=num_trainable,
        planned_rounds=config.num_server_rounds,
        earlier_mu_squared=earlier_mu_squared,
        start_note=start_note,
        trustees=len(config.trustees) if trustees is None else trustees,
        colluding=config.privacy.colluding_trustees if config.is_sealed else 0,
    )


def _what_is_left(config: RunConfig, delta: float, earlier: float) -> float:
    """Return the z with which earlier rounds and this run's spend the target together.

    Raises:
        PrivacyError: Nothing is left of it.
    """
    target = config.privacy.target_epsilon
    # One round of this z spends the target: mu^2 of all rounds adds up to its 1 / z^2.
    left = calibrate(target, 1, delta, "all", 1.0) ** -2 - earlier
    # Rounding may leave a trace of a target that is spent.
    if left <= earlier * 1e-6:
        spent = gaussian_epsilons(earlier, delta).zero_out
        raise PrivacyError(
            f"privacy.target-epsilon: must be above {spent:.4g}, which the runs that "
            f"adapter.start-from comes from have spent (got {target:g})"
        )
    return math.sqrt(config.num_server_rounds / left) * (1 + 1e-9)


def noise_multiplier_at(config: RunConfig, delta: float) -> float:
    """Return z, as given or calibrated to the target epsilon.

    Args:
        config: The run config, with `privacy.unit="client"`.
        delta: The run's.
    """
    privacy, strategy = config.privacy, config.strategy
    return privacy.noise_multiplier or calibrate(
        privacy.target_epsilon,
        config.num_server_rounds,
        delta,
        strategy.sampling,
        strategy.fraction_train,
    )


def affordable_rounds(config: RunConfig, noise_multiplier: float, delta: float) -> int:
    """Return how many rounds a run will release: it stops before `privacy.max-epsilon`.

    Args:
        config: The run config, with `privacy.unit="client"`.
        noise_multiplier: z.
        delta: The run's.
    """
    limit, strategy = config.privacy.max_epsilon, config.strategy
    most = config.num_server_rounds

    def fits(rounds: int) -> bool:
        spent = epsilons(
            noise_multiplier,
            rounds,
            delta,
            strategy.sampling,
            strategy.fraction_train,
        )
        return spent.zero_out <= limit

    # A target is never above the limit.
    if limit == 0 or config.privacy.target_epsilon > 0 or fits(most):
        return most
    return bisect_left(range(1, most + 1), True, key=lambda rounds: not fits(rounds))
