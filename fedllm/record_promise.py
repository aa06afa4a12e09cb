"""What a run with record-level privacy promises before round 1, and plans for one client."""

import logging
from typing import Any

from fedllm.config import RunConfig
from fedllm.noise_plan import expected_cohort
from fedllm.privacy.accounting import plain, record_epsilon, strength
from fedllm.privacy.record_report import RecordSettings
from fedllm.record_budget import client_plan

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


def record_plan(config: RunConfig, num_records: int) -> dict[str, Any]:
    """Return what a client of this many records does, and what that spends on one.

    Raises:
        ConfigError: There are fewer records than one expected batch.
    """
    plan = client_plan(config, num_records, config.privacy.target_epsilon)
    z, q, steps = plan.event
    releases = steps * config.num_server_rounds
    return {
        "num_records": num_records,
        "expected_batch_size": plan.expected_batch_size,
        "sampling_probability": q,
        "steps_per_round": steps,
        "num_rounds": config.num_server_rounds,
        "noise_multiplier": z,
        "epsilon": record_epsilon([(z, q, releases)], plan.delta),
        "delta": plan.delta,
    }


def record_plan_lines(config: RunConfig, plan: dict[str, Any]) -> list[str]:
    """Return what a person reads of a client's plan."""
    z, batch = plan["noise_multiplier"], plan["expected_batch_size"]
    return [
        f"a client of {plan['num_records']:,} records: batches of about {batch} by "
        f"secret coins, {plan['steps_per_round']} steps in each of "
        f"{plan['num_rounds']} rounds",
        f"noise multiplier {z:.4g} <-> epsilon {plain(plan['epsilon'])} for adding or "
        f"removing one record, at delta {plan['delta']:.3g} (pld): protection is "
        f"{strength(plan['epsilon'])}",
        f"a step's mean gradient has noise of {z / batch:.3g} times "
        f"privacy.max-grad-norm {config.privacy.max_grad_norm:g} in each trained value",
    ]
