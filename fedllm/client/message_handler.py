"""One client's part of a round: one message in, arrays or one code out.

The order: the limits of the node's owner, before anything is loaded; the base model and
the tokenised rows; the training; the reply.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)

from fedllm.adapters.resolve import with_kind
from fedllm.client.base_model import require_same_base
from fedllm.client.cache import (
    client_records,
    client_rows,
    num_partition_rows,
    resident_model,
)
from fedllm.client.log import ClientLog
from fedllm.client.node_config import (
    NodeConfig,
    check_node_limits,
    log_number,
    parse_node_config,
)
from fedllm.client.refusals import Refusals
from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FedllmError,
    TimeLimitError,
)
from fedllm.training.task import RoundTask, training_seed
from fedllm.wire.masking import WIRE_FORMAT, masked
from fedllm.wire.messages import (
    ADAPTER_KIND,
    ARRAYS,
    BASE_MODEL,
    CLIENT_PHASES,
    CONFIG,
    DECLARED_ROWS,
    METRICS,
    WIRE_FORMAT_KEY,
    array_record,
    encoded_record,
    error_content,
    read_global,
)
from fedllm.wire.resumed_run import original_context

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.data.tokens import Example
    from fedllm.training.result import Trained

_CODES: tuple[tuple[type[Exception], str], ...] = (
    (BudgetError, "budget-spent"),
    (ConfigError, "bad-config"),
    (DataError, "no-data"),
    (TimeLimitError, "time-limit"),
    (MemoryError, "out-of-memory"),
)


@dataclass(frozen=True)
class _Client:
    """One client in one run."""

    config: RunConfig
    node: NodeConfig
    run_id: int
    attempt: int
    """Flower's id of the run that asks: another than `run_id` once a run was resumed."""

    @property
    def log(self) -> ClientLog:
        """The client's own log."""
        is_shown = self.config.privacy.unit == "none" or not self.node.is_partition
        return ClientLog(self.node.partition_id, self.run_id, is_shown)


@dataclass(frozen=True)
class _Times:
    """`time.monotonic()` at each border between two of CLIENT_PHASES."""

    started: float
    loaded: float
    ready: float
    began: float
    trained: float
    encoded: float

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, by the name of its metric."""
        borders = pairwise(dataclasses.astuple(self))
        return {
            f"seconds-{phase}": until - since
            for phase, (since, until) in zip(CLIENT_PHASES, borders, strict=True)
        }


def reply_to(message: Message, context: Context) -> Message:
    """Train, evaluate or count a run as a message asks, and reply. Never raises.

    Guarantee:
        Under `privacy.unit="client"` the reply holds the trained arrays, or one code of
        a closed list, and nothing else; the error's text stays in this client's log.
        Under `record` the arrays are DP-SGD's, paid for on this client's disk before
        they leave, and the epsilon that its ledger then shows comes with them. Which code
        leaves, and which epsilon, is a function of settings and of the number of rows, but
        for limits of time and memory; after a few requests without a release it is one
        code for the rest of the run.
        No object of a reply can be foreseen by who knows the rows (`wire.masking`).
    """
    private = True
    # What Flower says, not what the server says of a resumed run.
    attempt = context.run_id
    try:
        context = original_context(message, context)
        config = parse_run_config(context.run_config)
        private = config.privacy.unit != "none"
        node = parse_node_config(context.node_config)
        client = _Client(config, node, context.run_id, attempt)
        if config.privacy.unit == "record":
            content = masked(_counted(message, client))
        else:
            content = masked(_answer(message, client))
    except Exception as error:  # noqa: BLE001 - a client's failure becomes a code
        content = _failure(error, context, private)
    return Message(content, reply_to=message)


def _declared(client: _Client) -> RecordDict:
    """Return how many rows this client declares as public, which no row decides.

    Raises:
        ConfigError: The node's owner declares nothing.
        DataError: A virtual client's rows cannot be read.
    """
    config, node = client.config, client.node
    rows = node.declared_rows
    if rows is None and not node.is_simulated:
        raise ConfigError(
            "node config: declared-rows: is missing: under privacy.noise='joint' the owner "
            "declares how many rows the node has, as a public number"
        )
    if rows is None:
        rows = num_partition_rows(node, config)
    return RecordDict({METRICS: MetricRecord({DECLARED_ROWS: rows})})


def _counted(message: Message, client: _Client) -> RecordDict:
    """Answer a request, which counts as refused until its release is paid for.

    Raises:
        BudgetError: Too many of the run's were refused.
    """
    folder = fedllm_home() / "refusals"
    refusals = Refusals(folder, client.attempt, client.node.partition_id)
    refusals.begin()
    content = _answer(message, client)
    refusals.release()
    return content


def _answer(message: Message, client: _Client) -> RecordDict:
    """Check the limits of the node's owner, and do what is asked."""
    check_node_limits(client.node, client.config)
    _check_format(message)
    if message.metadata.message_type.startswith("query"):
        return _declared(client) if client.config.is_joint else _announced(client)
    if message.metadata.message_type.startswith("evaluate"):
        return _evaluate(message, client)
    return _train(message, client)


def _check_format(message: Message) -> None:
    """Raise if the server does not read replies in this node's format.

    Raises:
        ConfigError: Their versions of fedllm differ.
    """
    read = message.content.config_records[CONFIG].get(WIRE_FORMAT_KEY, 1)
    if read != WIRE_FORMAT:
        raise ConfigError(
            f"fedllm: the server reads wire format {read!r} and this node writes "
            f"{WIRE_FORMAT}: install the same version on both"
        )


def _failure(error: Exception, context: Context, private: bool) -> RecordDict:
    """Log an error and return its code, with its text only without privacy."""
    code = _code(error)
    log = ClientLog(log_number(context.node_config), context.run_id)
    path = log.write_failure(code, error)
    if private:
        return error_content(code, None)
    text = str(error) if isinstance(error, FedllmError) else repr(error)
    # A lone surrogate, as in a file name, could not be sent.
    sent = f"{text} (log: {path})".encode("utf-8", "backslashreplace").decode()
    return error_content(code, sent)


def _code(error: Exception) -> str:
    """Map an error to the closed list of codes."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    # An accelerator raises torch's own error; on a CPU torch raises a RuntimeError.
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if type(error).__name__ == "OutOfMemoryError" or is_cpu:
        return "out-of-memory"
    return "failed"


def _train(message: Message, client: _Client) -> RecordDict:
    """Fine-tune from the server's arrays and return the trained ones."""
    started = time.monotonic()
    config, node = client.config, client.node
    # The message's own clock is the server's, which may be wrong here by any amount.
    deadline = started + config.strategy.round_timeout
    record = message.content.config_records[CONFIG]
    # Flower allows lists and bytes here: those raise, and the reply is a code.
    server_round = int(record["server-round"])  # type: ignore[arg-type]
    learning_rate = float(record["learning-rate"])  # type: ignore[arg-type]
    require_same_base(config.model.name, record.get(BASE_MODEL))
    _charge(client, server_round)
    resident = resident_model(with_kind(config, record.get(ADAPTER_KIND)))
    loaded = time.monotonic()
    examples: Sequence[Example | None]
    if config.privacy.unit == "record":
        examples = client_records(resident, node, config, client.log)
    else:
        examples = client_rows(resident, node, config, client.log)
    arrays = _received(message, resident.adapted, config)
    seed = training_seed(config.seed, server_round, node.partition_id)
    task = RoundTask(arrays, learning_rate, seed, deadline)
    if config.is_joint:
        return _sum_batch(client, record, resident.adapted, examples, task)
    ready = time.monotonic()
    trained, metrics = _fit(client, resident.adapted, examples, task)
    ended = time.monotonic()
    began = ready if trained.began is None else trained.began
    sent = _encoded(trained.arrays, arrays, config, server_round, node.partition_id)
    times = _Times(started, loaded, ready, began, ended, time.monotonic())
    if config.privacy.unit == "none":
        # Under DP times would leave without noise: they go to this client's log only.
        metrics |= times.seconds()
    _log_training(client, server_round, trained, times, message.metadata.created_at)
    content = RecordDict({ARRAYS: sent})
    if metrics:
        content[METRICS] = MetricRecord(metrics)
    return content


def _announced(client: _Client) -> RecordDict:
    """Charge a run before any client is drawn for it, and return nothing.

    Raises:
        BudgetError: It would pass the node's limit.
        ConfigError: Its cohorts are not secret: then nothing is announced.
        PrivacyError: The node's ledger cannot be trusted or written.
    """
    if not client.config.cohorts_are_secret:
        raise ConfigError(
            "strategy.sampling: only a run with secret cohorts is announced (got "
            f"{client.config.strategy.sampling!r})"
        )
    _charge(client, None)
    return RecordDict()


def _charge(client: _Client, server_round: int | None) -> None:
    """Charge a client-level run to the node before anything of it is computed.

    Raises:
        BudgetError: It would pass the node's limit, or its round was not planned.
        PrivacyError: The node's ledger cannot be trusted or written.
    """
    config = client.config
    if config.privacy.unit == "client":
        from fedllm.client.node_budget import asked_of, charge_run

        asked = asked_of(config, client.run_id, client.attempt, server_round)
        charge_run(config, client.node, asked, client.log)


def _fit(
    client: _Client,
    adapted: "AdaptedModel",
    examples: "Sequence[Example | None]",
    task: RoundTask,
) -> tuple["Trained", dict[str, Any]]:
    """Train, and return the result with the metrics that may leave beside it."""
    if client.config.privacy.unit == "record":
        trained, epsilon = _fit_privately(client, adapted, examples, task)
        return trained, {"epsilon": epsilon}
    from fedllm.training.sft import train_adapter

    usable = [example for example in examples if example is not None]
    trained = train_adapter(adapted, usable, client.config.train, task)
    if client.config.privacy.unit != "none":
        return trained, {}
    return trained, {"num-examples": trained.num_examples, "train-loss": trained.loss}


def _fit_privately(
    client: _Client,
    adapted: "AdaptedModel",
    records: "Sequence[Example | None]",
    task: RoundTask,
) -> tuple["Trained", float]:
    """Train by DP-SGD, and pay on this client's disk before anything leaves.

    Returns:
        The result, and the epsilon of all that this client has released.

    Raises:
        BudgetError: The round would pass the node's or the run's limit.
        ConfigError: The client has fewer records than a batch.
        PrivacyError: The ledger cannot be trusted or written.
    """
    from fedllm.client.record_budget import open_budget
    from fedllm.training.dp_sgd import train_privately

    config = client.config
    budget = open_budget(config, client.node, client.run_id, len(records), client.log)
    budget.require()
    trained = train_privately(adapted, records, config, budget.plan, task)
    return trained, budget.spend()


def _sum_batch(
    client: _Client,
    record: ConfigRecord,
    adapted: "AdaptedModel",
    records: "Sequence[Example | None]",
    task: RoundTask,
) -> RecordDict:
    """Return the sum of a batch's clipped gradients, paid for before its coins are tossed.

    A step that fails afterwards stays paid for: its cost is no function of rows.

    Raises:
        BudgetError: The step would pass the node's or the run's limit.
        ConfigError: The server's numbers are not those of the run.
        PrivacyError: The ledger cannot be trusted or written.
        TimeLimitError: The time was up before the step began.
    """
    from fedllm.client.record_budget import open_joint_budget
    from fedllm.training.joint_step import batch_sum

    config, node = client.config, client.node
    began = time.monotonic()
    budget = open_joint_budget(config, node, client.run_id, record, client.log)
    task.check_deadline(0)
    epsilon = budget.spend()
    summed = batch_sum(adapted, records, config, budget.plan, task)
    client.log.write(
        f"client {node.partition_id}: step {record['server-round']!r}: sum of a batch after "
        f"{time.monotonic() - began:.1f} s; {summed.num_unfit} of the examples drawn could "
        f"not be taken; epsilon {epsilon:.3f} of this client's records so far, if the server "
        "adds the noise that it names"
    )
    return RecordDict({ARRAYS: array_record(summed.integers)})


def _received(
    message: Message, adapted: "AdaptedModel", config: RunConfig
) -> dict[str, Any]:
    """Decode the server's arrays.

    Raises:
        ValueError: They are not those of the adapter.
    """
    record = message.content.array_records[ARRAYS]
    return read_global(record, adapted.spec.trained_shapes, config.wire.encoding)


def _encoded(
    trained: Mapping[str, Any],
    received: Mapping[str, Any],
    config: RunConfig,
    server_round: int,
    partition_id: int,
) -> ArrayRecord:
    """Return what this client sends: values, or its update if the encoding rounds.

    Rounding is a function of what would be sent exactly and of public numbers, so it
    takes nothing from a guarantee, and its seed need not be secret.
    """
    encoding = config.wire.encoding
    generator = np.random.default_rng([config.seed, server_round, partition_id])
    if encoding != "float32":
        trained = {name: value - received[name] for name, value in trained.items()}
    return encoded_record(trained, encoding, generator)


def _log_training(
    client: _Client,
    server_round: int,
    trained: "Trained",
    times: _Times,
    created_at: float,
) -> None:
    """Log what a training did and how long it took.

    Args:
        client: Whose log it is.
        server_round: The round.
        trained: The result.
        times: Its times, by this machine's clock.
        created_at: When the server made the message, by the server's clock, which may
            differ from this machine's.
    """
    age = time.time() - (time.monotonic() - times.began) - created_at
    client.log.write(
        f"client {client.node.partition_id}: round {server_round}: "
        f"{trained.num_steps} steps on {trained.num_examples} examples in "
        f"{times.trained - times.ready:.1f} s "
        f"(ready after {times.ready - times.started:.1f} s; first step {age:.1f} s after "
        f"the message was made, {times.began - times.started:.1f} s after it was taken "
        "up)"
    )
    if trained.num_unfit:
        client.log.write(
            f"client {client.node.partition_id}: round {server_round}: the model could not "
            f"take {trained.num_unfit} of the examples drawn, which added nothing"
        )


def _evaluate(message: Message, client: _Client) -> RecordDict:
    """Return the loss of the server's adapter on this client's held-out rows."""
    from fedllm.evaluation.held_out_loss import held_out

    config = client.config
    if config.privacy.unit != "none":
        raise ConfigError(
            "privacy.unit: clients evaluate only if it is 'none' "
            f"(got {config.privacy.unit!r})"
        )
    record = message.content.config_records[CONFIG]
    require_same_base(config.model.name, record.get(BASE_MODEL))
    resident = resident_model(with_kind(config, record.get(ADAPTER_KIND)))
    held = client_rows(resident, client.node, config, client.log, held_out=True)
    adapted = resident.adapted
    adapted.set(_received(message, adapted, config))
    examples = held[: config.strategy.evaluate_examples or None]
    score = held_out(adapted.model, examples, adapted.pad_token_id)
    metrics = MetricRecord({"num-examples": score.num_examples})
    metrics["eval-loss"] = score.loss
    return RecordDict({METRICS: metrics})
