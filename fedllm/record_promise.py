"""What a run with record-level privacy promises before round 1."""

import logging

from fedllm.config import RunConfig
from fedllm.noise_plan import expected_cohort
from fedllm.privacy.accounting import plain
from fedllm.privacy.record_report import RecordSettings

logger = logging.getLogger(__name__)

_LARGEST_DELTA = 1e-5
"""What a client's default delta, the smaller of this and n^-1.1, is at most."""


def record_settings(
    config: RunConfig, population_size: int, num_trainable: int
) -> RecordSettings:
    """Say what is fixed for all clients; each calibrates for its own records."""
    privacy, strategy = config.privacy, config.strategy
    return RecordSettings(
        unit="record",
        sampling=strategy.sampling,
        population_size=population_size,
        num_sampled_clients=expected_cohort(strategy, population_size),
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=privacy.noise_multiplier or None,
        delta=privacy.delta or _LARGEST_DELTA,
        target_epsilon=privacy.target_epsilon,
        max_epsilon=privacy.max_epsilon,
        num_trainable=num_trainable,
        planned_rounds=config.num_server_rounds,
    )


def say_record_promise(settings: RecordSettings) -> None:
    """Say what a record may lose in the planned rounds, and who sees to it."""
    if settings.target_epsilon > 0:
        logger.info(
            "privacy: each client calibrates its own noise, so that %d rounds spend at "
            "most epsilon %s on any of its records (add-or-remove one record) at delta "
            "%g; largest gradient norm %g",
            settings.planned_rounds,
            plain(settings.target_epsilon),
            settings.delta,
            settings.max_grad_norm,
        )
    else:
        logger.info(
            "privacy: noise multiplier %.4g on each client; what it spends on a record "
            "depends on how many it has, and each client reports it; largest gradient "
            "norm %g",
            settings.noise_multiplier,
            settings.max_grad_norm,
        )
    if settings.max_epsilon > 0:
        logger.info(
            "a client stops before a record has spent epsilon %s in all runs together",
            plain(settings.max_epsilon),
        )
    if settings.target_epsilon > 50:
        logger.warning(
            "epsilon %s is no protection to speak of: this run is not private",
            plain(settings.target_epsilon),
        )
