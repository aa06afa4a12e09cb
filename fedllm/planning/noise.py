"""The noise of a run, fixed before round 1."""

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import calibrate, default_delta
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
    noise_multiplier = privacy.noise_multiplier or calibrate(
        privacy.target_epsilon,
        config.num_server_rounds,
        delta,
        strategy.sampling,
        strategy.fraction_train,
    )
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
