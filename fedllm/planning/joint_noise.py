"""The noise of a run with one noise for all records of a federation, fixed before round 1."""

from collections.abc import Sequence
from typing import Any

from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.privacy.accounting import (
    calibrate,
    default_delta,
    record_accountant,
    record_epsilon,
)
from fedllm.privacy.joint_ledger import JointSettings


def joint_settings(
    config: RunConfig,
    declared_rows: Sequence[int],
    num_trainable: int,
    trustees: int | None = None,
) -> JointSettings:
    """Return the privacy settings, with the noise given or calibrated to the target epsilon.

    Args:
        config: The run config, with `privacy.noise="joint"`.
        declared_rows: The rows, or persons, that each client declared.
        num_trainable: Trained values d.
        trustees: How many there are of a sealed run; None: all that it names.

    Raises:
        ConfigError: The clients declared fewer rows than one expected batch.
    """
    privacy, total = config.privacy, sum(declared_rows)
    batch = config.train.expected_batch_size
    if total < batch:
        raise ConfigError(
            f"train.gradient-accumulation: privacy.noise='joint' draws batches of {batch} "
            f"records from all clients (times train.batch-size {config.train.batch_size}), "
            f"and {len(declared_rows)} clients declared {total} rows together; use a smaller "
            "batch"
        )
    delta = privacy.delta or default_delta(total)
    noise_multiplier = privacy.noise_multiplier or calibrate(
        privacy.target_epsilon,
        config.num_server_rounds,
        delta,
        "poisson",
        batch / total,
        "ADD_OR_REMOVE_ONE",
    )
    return JointSettings(
        unit="record",
        noise="joint",
        sampling="all",
        population_size=len(declared_rows),
        num_sampled_clients=len(declared_rows),
        declared_rows=declared_rows,
        expected_batch_size=batch,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplier=noise_multiplier,
        delta=delta,
        target_epsilon=privacy.target_epsilon,
        max_epsilon=privacy.max_epsilon,
        num_trainable=num_trainable,
        planned_rounds=config.num_server_rounds,
        person_column=config.data.person_column,
        trustees=len(config.trustees) if trustees is None else trustees,
        colluding=privacy.colluding_trustees if config.is_sealed else 0,
    )


def joint_plan(config: RunConfig, num_records: int, num_clients: int) -> dict[str, Any]:
    """Return the plan of all clients together, with the keys of `record_plan`.

    If trustees open the steps it has also their number, both noises and both epsilons.

    Args:
        config: The run config, with `privacy.noise="joint"`.
        num_records: Rows that each client declares.
        num_clients: Clients.

    Raises:
        ConfigError: The clients declared fewer rows than one expected batch.
    """
    settings = joint_settings(config, [num_records] * num_clients, 1)
    z, q = settings.noise_multiplier, settings.sampling_probability
    events = [(z, q, settings.planned_rounds)]
    sealed: dict[str, Any] = {}
    if settings.trustees:
        noise = settings.opened_noise
        adapters = [(noise, q, settings.planned_rounds)]
        sealed = {
            "trustees": settings.trustees,
            "colluding_trustees": settings.colluding,
            "opened_noise": noise,
            "epsilon_adapters": record_epsilon(adapters, settings.delta),
        }
    return {
        "num_records": settings.total_rows,
        "expected_batch_size": settings.expected_batch_size,
        "sampling_probability": q,
        "steps_per_round": 1,
        "num_rounds": settings.planned_rounds,
        "noise_multiplier": z,
        "epsilon": record_epsilon(events, settings.delta),
        "accountant": record_accountant(events, settings.delta),
        "delta": settings.delta,
        **sealed,
    }
