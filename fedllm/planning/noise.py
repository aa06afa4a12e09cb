"""The noise of a run, fixed before round 1: the server adds it, and a node counts on it."""

from bisect import bisect_left

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import calibrate, default_delta, epsilons
from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.ledger import PrivacySettings


def privacy_settings(
    config: RunConfig, population_size: int, num_trainable: int
) -> PrivacySettings:
    """Return the privacy settings, with the noise given or calibrated to the target epsilon.

    Args:
        config: The run config, with `privacy.unit="client"`.
        population_size: Clients in the federation, N.
        num_trainable: Trained values d.

    Raises:
        PrivacyError: The noise is larger than the grid of the sum can hold.
    """
    privacy, strategy = config.privacy, config.strategy
    delta = privacy.delta or default_delta(population_size)
    noise_multiplier = noise_multiplier_at(config, delta)
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
    )


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
