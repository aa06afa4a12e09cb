"""The settings of a run with record-level privacy, and the noise of one client."""

import math
from typing import Any

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.privacy.accounting import record_accountant, record_epsilon
from fedllm.privacy.record_claims import RecordSettings
from fedllm.privacy.record_ledger import RecordPlan, make_plan

_LARGEST_DELTA = 1e-5
"""The upper bound of a client's default delta, which is the smaller of this and n^-1.1."""


def record_settings(
    config: RunConfig, population_size: int, num_trainable: int
) -> RecordSettings:
    """Return the settings of all clients; each calibrates for its own number of records."""
    privacy, strategy = config.privacy, config.strategy
    return RecordSettings(
        unit="record",
        sampling=strategy.sampling,
        population_size=population_size,
        num_sampled_clients=strategy.expected_cohort(population_size),
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=privacy.noise_multiplier or None,
        delta=privacy.delta or _LARGEST_DELTA,
        target_epsilon=privacy.target_epsilon,
        max_epsilon=privacy.max_epsilon,
        num_trainable=num_trainable,
        planned_rounds=config.num_server_rounds,
        person_column=config.data.person_column,
    )


def record_plan(config: RunConfig, num_records: int) -> dict[str, Any]:
    """Return the plan of a client with this many records, as JSON values.

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
        "accountant": record_accountant([(z, q, releases)], plan.delta),
        "delta": plan.delta,
    }


def client_plan(
    config: RunConfig, num_records: int, target_epsilon: float
) -> RecordPlan:
    """Calibrate the noise for a client's own number of records.

    Raises:
        ConfigError: There are fewer records than one expected batch.
    """
    train, privacy = config.train, config.privacy
    batch = train.expected_batch_size
    if num_records < batch:
        raise ConfigError(
            f"train.gradient-accumulation: privacy.unit='record' draws batches of "
            f"{batch} records (times train.batch-size {train.batch_size}), and this "
            f"client has {num_records}; use a smaller batch"
        )
    steps = train.local_steps
    if steps == 0:
        steps = math.ceil(train.local_epochs * num_records / batch)
    return make_plan(
        num_records,
        batch,
        steps,
        config.num_server_rounds,
        target_epsilon,
        privacy.noise_multiplier,
        privacy.delta,
    )
