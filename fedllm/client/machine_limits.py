"""What a run becomes on a machine that its owner limits: micro-batches, and time.

A micro-batch is how a step is computed, and accumulation keeps the step: no promise rests on
it. The steps of record level are those of its plan, so there a node that lacks the time
declines. Everything here is a function of settings and of the machine: no row is read.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedllm.client.node_config import NodeConfig
from fedllm.client.run_client import RunClient
from fedllm.config import RunConfig, TrainConfig, fedllm_home
from fedllm.errors import ConfigError, TimeLimitError
from fedllm.wire.messages import TOTAL_ROWS

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel

_GB = 1e9


def fitted_to_machine(config: RunConfig, node: NodeConfig) -> RunConfig:
    """Return a run config whose micro-batches fit the node's limits, and whose steps are the same.

    Args:
        config: The run config, with a kind of adapter that is not `auto`.
        node: The node config.

    Raises:
        ConfigError: A micro-batch of one example needs more than `max-memory`.
    """
    if node.batch_size is None and node.max_memory is None:
        return config
    sizes = _micro_batches(config.train, node.batch_size)
    if node.max_memory is None:
        return _with_micro_batch(config, sizes[0])
    need = 0.0
    for size in sizes:
        fitted = _with_micro_batch(config, size)
        need = _bytes_of(fitted, node)
        if need <= node.max_memory * _GB:
            return fitted
    raise ConfigError(
        f"max-memory: this node allows {node.max_memory:g} GB, and one example of "
        f"train.max-length {config.train.max_length} tokens needs {need / _GB:.2f}: lower "
        "that, or set train.gradient-checkpointing=true"
    )


def micro_batch_line(asked: TrainConfig, fitted: TrainConfig) -> str:
    """Return what became of the micro-batches, for the node's own log; empty: nothing."""
    if asked == fitted:
        return ""
    return (
        f"its limits make micro-batches of {fitted.batch_size} examples, "
        f"{fitted.gradient_accumulation} a step, of the run's {asked.batch_size} and "
        f"{asked.gradient_accumulation}; the step is the same"
    )


def require_time(
    adapted: "AdaptedModel",
    client: RunClient,
    fitted: RunConfig,
    message: Mapping[str, Any],
    stop_at: float,
) -> None:
    """Raise if the steps of record level would probably end after the node's limit of time.

    Args:
        adapted: The resident model, on which one micro-batch of public tokens is timed.
        client: The client.
        fitted: The run config with the micro-batches of this machine.
        message: The server's message: under joint noise the rows of all clients.
        stop_at: `time.monotonic()` when `max-seconds` is over; infinity: not set.

    Raises:
        ConfigError: How long the steps take cannot be known without the rows.
        TimeLimitError: They would take too long.

    Guarantee:
        It is decided before any row is read, and by no row.
    """
    if stop_at == math.inf:
        return
    from fedllm.training.step_time import seconds_of_micro_batch

    steps, examples = _steps(client, message)
    # Three deviations above the expected size of a Poisson batch.
    passes = math.ceil((examples + 3 * math.sqrt(examples)) / fitted.train.batch_size)
    seconds = steps * passes * seconds_of_micro_batch(adapted, fitted)
    left = stop_at - time.monotonic()
    if seconds > left:
        raise TimeLimitError(
            f"max-seconds: {steps} steps of some {examples:.0f} records take about "
            f"{seconds:.0f} s here, and {left:.0f} are left: under privacy.unit='record' the "
            "steps are the plan's, so this node takes no part"
        )


def _steps(client: RunClient, message: Mapping[str, Any]) -> tuple[int, float]:
    """Return the steps of a round, and the records of an expected batch of this client.

    Raises:
        ConfigError: They depend on what is not known without the rows.
    """
    config, node = client.config, client.node
    train, declared = config.train, node.declared_rows
    if config.data.person_column:
        raise ConfigError(
            "max-seconds: cannot be held with data.person-column, since how many rows a "
            "person has is not known before they are read: drop max-seconds"
        )
    if declared is None and (config.is_joint or train.local_steps == 0):
        raise ConfigError(
            "max-seconds: needs declared-rows beside it here, since how many steps or "
            "records a round has is not read from the rows"
        )
    batch = train.expected_batch_size
    if config.is_joint:
        return 1, batch * (declared or 0) / max(int(message[TOTAL_ROWS]), 1)
    if train.local_steps:
        return train.local_steps, batch
    return math.ceil(train.local_epochs * (declared or 0) / batch), batch


def _micro_batches(train: TrainConfig, most: int | None) -> list[int]:
    """Return the sizes that divide a step's batch, largest first; 1 is always one.

    None is above the run's own or above `most`.
    """
    batch = train.expected_batch_size
    largest = min(train.batch_size, most or train.batch_size)
    return [size for size in range(largest, 0, -1) if batch % size == 0]


def _with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """Return a run config with another micro-batch and the same step."""
    accumulation = config.train.expected_batch_size // size
    train = replace(config.train, batch_size=size, gradient_accumulation=accumulation)
    return replace(config, train=train)


def _bytes_of(config: RunConfig, node: NodeConfig) -> float:
    """Return the bytes that a training of the longest rows needs here, by an estimate."""
    import torch

    from fedllm.models.location import load_config, locate
    from fedllm.planning.memory import PROCESS_BYTES, memory_need

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if node.adapter_rank is not None and node.adapter_rank < config.adapter.rank:
        adapter = replace(config.adapter, rank=node.adapter_rank)
        config = replace(config, adapter=adapter)
    model_config = load_config(locate(config.model.name, fedllm_home()))
    need = memory_need(config, model_config, device)
    process = PROCESS_BYTES if device == "cpu" else 0.0
    return process + need.base + need.adapter + need.activations
