"""One client's part of a round: its data, its resident base model, its reply.

A simulation's actors live through the run, so the base model is loaded, and a
partition tokenised, once in each. On a SuperNode every message starts a new process and
the caches are empty; the quantised base comes from disk.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedllm.adapters.resolve import with_kind
from fedllm.client.cache import _examples, _load, _Resident, _share
from fedllm.client.log import log_failure, note
from fedllm.client.node_config import (
    LIMITS,
    check_node_limits,
    number_setting,
    partition_of,
)
from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FedllmError,
    TimeLimitError,
)
from fedllm.training.task import RoundTask, training_seed
from fedllm.wire.messages import (
    ADAPTER_KIND,
    ARRAYS,
    CLIENT_PHASES,
    CONFIG,
    METRICS,
    encoded_record,
    error_content,
    read_global,
)
from fedllm.wire.resumed_run import original_context

if TYPE_CHECKING:
    from fedllm.data.tokens import Example
    from fedllm.training.result import Trained


def reply_to(message: Message, context: Context) -> Message:
    """Train or evaluate as a message asks, and reply. Never raises.

    Guarantee:
        Under `privacy.unit="client"` the reply holds the trained arrays, or one code of
        a closed list, and nothing else; the error's text stays in this client's log.
        Under `record` the arrays are DP-SGD's, paid for on this client's disk before
        they leave, and the epsilon that its ledger then shows comes with them.
    """
    private = True
    try:
        context = original_context(message, context)
        config = parse_run_config(context.run_config)
        private = config.privacy.unit != "none"
        check_node_limits(context.node_config, config)
        if message.metadata.message_type.startswith("evaluate"):
            content = _evaluate(message, context, config)
        else:
            content = _train(message, context, config)
    except Exception as error:  # noqa: BLE001 - a client's failure is told by code
        code = _code(error)
        where = log_failure(context, code, error)
        text = str(error) if isinstance(error, FedllmError) else repr(error)
        # A lone surrogate, as in a file name, could not be sent.
        told = f"{text} (log: {where})".encode("utf-8", "backslashreplace").decode()
        content = error_content(code, None if private else told)
    return Message(content, reply_to=message)


def _train(message: Message, context: Context, config: RunConfig) -> RecordDict:
    """Fine-tune from the server's arrays and return the trained ones."""
    started = time.monotonic()
    # The message's own clock is the server's, which may be wrong here by any amount.
    deadline = started + config.strategy.round_timeout
    record = message.content.config_records[CONFIG]
    resident = _load(with_kind(config, record.get(ADAPTER_KIND)))
    adapted = resident.adapted
    loaded = time.monotonic()
    partition_id, _ = partition_of(context)
    examples = _examples(resident, context, config)
    shapes, encoding = adapted.spec.trained_shapes, config.wire.encoding
    arrays = read_global(message.content.array_records[ARRAYS], shapes, encoding)
    server_round = int(record["server-round"])  # type: ignore[arg-type]
    learning_rate = float(record["learning-rate"])  # type: ignore[arg-type]
    seed = training_seed(config.seed, server_round, partition_id)
    task = RoundTask(arrays, learning_rate, seed, deadline)
    ready = time.monotonic()
    metrics: dict[str, Any] = {}
    if config.privacy.unit == "record":
        trained, metrics["epsilon"] = _train_privately(
            resident, context, config, examples, task
        )
    else:
        from fedllm.training.sft import train_adapter

        trained = train_adapter(adapted, examples, config.train, task)
    ended = time.monotonic()
    began = ready if trained.began is None else trained.began
    sent = _encoded(trained.arrays, arrays, config, server_round, partition_id)
    content = RecordDict({ARRAYS: sent})
    times = (started, loaded, ready, began, ended, time.monotonic())
    if config.privacy.unit == "none":
        metrics = {"num-examples": trained.num_examples, "train-loss": trained.loss}
        # Under DP times would leave without noise: they go to this client's log only.
        for phase, since, until in zip(CLIENT_PHASES, times, times[1:], strict=False):
            metrics[f"seconds-{phase}"] = until - since
    # Until the first step, by the server's clock, which may be wrong here.
    age = time.time() - (time.monotonic() - began) - message.metadata.created_at
    note(
        context,
        config,
        f"client {partition_id}: round {server_round}: {trained.num_steps} steps on "
        f"{trained.num_examples} examples in {ended - ready:.1f} s "
        f"(ready after {ready - started:.1f} s; first step {age:.1f} s after the "
        f"message was made, {began - started:.1f} s after it was taken up)",
    )
    if metrics:
        content[METRICS] = MetricRecord(metrics)
    return content


def _encoded(
    trained: Mapping[str, Any],
    received: Mapping[str, Any],
    config: RunConfig,
    server_round: int,
    partition_id: int,
) -> ArrayRecord:
    """Return what this client sends: values, or its update where the encoding rounds.

    Rounding is a function of what would be sent exactly and of public numbers, so it
    takes nothing from a guarantee, and its seed need not be secret.
    """
    encoding = config.wire.encoding
    generator = np.random.default_rng([config.seed, server_round, partition_id])
    if encoding != "float32":
        trained = {name: value - received[name] for name, value in trained.items()}
    return encoded_record(trained, encoding, generator)


def _train_privately(
    resident: _Resident,
    context: Context,
    config: RunConfig,
    examples: "list[Example]",
    task: RoundTask,
) -> tuple["Trained", float]:
    """Train by DP-SGD, and pay on this client's disk before anything leaves.

    Returns:
        The result, and the largest epsilon over the records that this client holds.

    Raises:
        BudgetError: The round would pass the node's or the run's limit.
        ConfigError: The client has fewer records than a batch.
        PrivacyError: The ledger cannot be trusted or written.
    """
    from fedllm.client.record_budget import RecordBudget, ledger_folder
    from fedllm.privacy.record_ledger import RecordLedger
    from fedllm.training.dp_sgd import train_privately

    node = context.node_config
    partition_id, _ = partition_of(context)
    # Whoever set a floor or a file is no simulation: that ledger has to outlive the run.
    real = {"data-path", *LIMITS} & set(node)
    simulated = not real and "num-partitions" in node
    folder = ledger_folder(
        fedllm_home(), context.run_id, partition_id if simulated else None
    )
    digests = resident.digests[_share(context, config)]
    budget = RecordBudget(
        RecordLedger(folder),
        config,
        context.run_id,
        digests,
        len(examples),
        number_setting(node, "max-epsilon"),
    )
    budget.require()
    trained = train_privately(resident.adapted, examples, config, budget.plan, task)
    return trained, budget.spend()


def _evaluate(message: Message, context: Context, config: RunConfig) -> RecordDict:
    """Return the loss of the server's adapter on this client's held-out rows."""
    from fedllm.evaluation.held_out_loss import held_out

    if config.privacy.unit != "none":
        raise ConfigError("privacy.unit: clients evaluate only where it is 'none'")
    record = message.content.config_records[CONFIG]
    resident = _load(with_kind(config, record.get(ADAPTER_KIND)))
    examples = _examples(resident, context, config, held_out=True)
    adapted = resident.adapted
    shapes = adapted.spec.trained_shapes
    sent = message.content.array_records[ARRAYS]
    arrays = read_global(sent, shapes, config.wire.encoding)
    adapted.set(arrays)
    examples = examples[: config.strategy.evaluate_examples or None]
    score = held_out(adapted.model, examples, adapted.pad_token_id)
    metrics = MetricRecord({"num-examples": score.num_examples})
    metrics["eval-loss"] = score.loss
    return RecordDict({METRICS: metrics})


def _code(error: Exception) -> str:
    """Map an error to the closed list of codes."""
    if isinstance(error, BudgetError):
        return "budget-spent"
    if isinstance(error, ConfigError):
        return "bad-config"
    if isinstance(error, DataError):
        return "no-data"
    if isinstance(error, TimeLimitError):
        return "time-limit"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out-of-memory"
    # On a CPU torch says it with a plain RuntimeError.
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return "out-of-memory"
    return "failed"
