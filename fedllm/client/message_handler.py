"""One client's part of a round: one message in, arrays or one code out.

The order: the limits of the node's owner, before anything is loaded; the base model and
the tokenised rows; the training; the reply.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedllm.adapters.resolve import with_kind
from fedllm.client.base_model import require_same_base
from fedllm.client.cache import client_records, client_rows, resident_model
from fedllm.client.delivery import keep_delivery
from fedllm.client.failures import failure
from fedllm.client.machine_limits import (
    fitted_to_machine,
    micro_batch_line,
    require_time,
)
from fedllm.client.node_config import parse_node_config
from fedllm.client.node_limits import check_node_limits, rank_line, trained_rank
from fedllm.client.record_steps import declare_rows, fit_privately, sum_batch
from fedllm.client.refusals import Refusals
from fedllm.client.run_client import RunClient, Times, log_training
from fedllm.config import RunConfig, fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError
from fedllm.training.task import RoundTask, training_seed
from fedllm.wire.masking import WIRE_FORMAT, masked
from fedllm.wire.messages import (
    ADAPTER_KIND,
    ARRAYS,
    BASE_MODEL,
    CONFIG,
    DELIVER,
    METRICS,
    WIRE_FORMAT_KEY,
    encoded_record,
    read_global,
)
from fedllm.wire.resumed_run import original_context

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.training.person_gradients import Record
    from fedllm.training.result import Trained


_ASKED_OF_TRUSTEES = ("query.hello", "query.tally")


def reply_to(message: Message, context: Context) -> Message:
    """Train, evaluate, count a run or keep its adapter as asked, and reply. Never raises.

    Guarantee:
        Under `privacy.unit="client"` the reply holds the trained arrays, or one code of
        a closed list, and nothing else; the error's text stays in this client's log. With
        `privacy.trust="trustees"` the arrays are an update under pads, or zero under such
        (`client.sealing`), at record level the sum of a batch (`client.sealed_records`).
        Under `record` the arrays are DP-SGD's, paid for on this client's disk before
        they leave, and the epsilon that its ledger then shows comes with them. Which code
        leaves, and which epsilon, is a function of settings and of the number of rows, but
        for limits of time and memory; after a few requests without a release it is one
        code for the rest of the run.
        What a delivered adapter is answered with is a function of settings and this
        machine's disk: it is answered before any row is read.
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
        client = RunClient(config, node, context.run_id, attempt)
        # What a sealed step fails at leaves as zeros, and is counted where it is made.
        is_counted = message.metadata.message_type != DELIVER and not config.is_sealed
        if config.privacy.unit == "record" and is_counted:
            content = masked(_counted(message, client))
        else:
            content = masked(_answer(message, client))
    except Exception as error:  # noqa: BLE001 - a client's failure becomes a code
        content = failure(error, context, private)
    return Message(content, reply_to=message)


def _counted(message: Message, client: RunClient) -> RecordDict:
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


def _answer(message: Message, client: RunClient) -> RecordDict:
    """Check the limits of the node's owner, and do what is asked."""
    _require_data(message, client)
    check_node_limits(client.node, client.config)
    _check_format(message)
    if message.metadata.message_type == DELIVER:
        return keep_delivery(message, client)
    if client.config.is_sealed:
        return _answer_sealed(message, client)
    if message.metadata.message_type.startswith("query"):
        return declare_rows(client) if client.config.is_joint else _announced(client)
    if message.metadata.message_type.startswith("evaluate"):
        return _evaluate(message, client)
    return _train(message, client)


def _answer_sealed(message: Message, client: RunClient) -> RecordDict:
    """Do what a server that is not trusted asks: there is nothing else that it may.

    Raises:
        ConfigError: It asks for something else.
    """
    from fedllm.client.sealed_records import sealed_step
    from fedllm.client.sealing import say_hello, sealed_reply, tally

    match message.metadata.message_type:
        case "query.hello":
            return say_hello(message, client)
        case "query.tally":
            return tally(message, client)
        case "train" if client.config.is_joint:
            config = _fitted_config(message, client)
            return sealed_step(
                message, client, config, lambda: _records(message, client, config)
            )
        case "train":
            config = _fitted_config(message, client)
            return sealed_reply(
                message, client, lambda: _update_alone(message, client, config)
            )
    raise ConfigError(
        "privacy.trust: under 'trustees' a node answers no message of type "
        f"{message.metadata.message_type!r}"
    )


def _require_data(message: Message, client: RunClient) -> None:
    """Raise if a node without data is asked for what only a client does.

    Raises:
        ConfigError: It is: such a node is a trustee, and never trains.
    """
    kind = message.metadata.message_type
    is_for_trustees = client.config.is_sealed and kind in _ASKED_OF_TRUSTEES
    if not client.node.has_data and not is_for_trustees:
        raise ConfigError(
            f"node config: data-path: is not set, so this node is trustee "
            f"{client.node.trustee_name!r} alone, and answers no message of type {kind!r}"
        )


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


@dataclass(frozen=True)
class _Round:
    """What a client trains on in a round.

    Attributes:
        server_round: The round.
        config: The run config, its adapter's kind resolved and its micro-batches fitted to
            this machine.
        adapted: The model with its adapter.
        examples: The client's rows, or its records under record level.
        task: Where the training starts, and until when.
        started: `time.monotonic()` when the message was taken up.
        loaded: The same when the model was there.
    """

    server_round: int
    config: RunConfig
    adapted: "AdaptedModel"
    examples: "Sequence[Record | None]"
    task: RoundTask
    started: float
    loaded: float


def _train(message: Message, client: RunClient) -> RecordDict:
    """Fine-tune from the server's arrays and return the trained ones."""
    config = client.config
    fitted = _fitted_config(message, client)
    _charge(client, _server_round(message))
    taken = _take_up(message, client, fitted)
    if config.is_joint:
        record = message.content.config_records[CONFIG]
        return sum_batch(
            client, record, taken.adapted, taken.examples, taken.task, fitted
        )
    trained, metrics, times = _fitted(client, taken)
    received, server_round = taken.task.arrays, taken.server_round
    sent = _encoded(
        trained.arrays, received, config, server_round, client.node.partition_id
    )
    times = replace(times, encoded=time.monotonic())
    if config.privacy.unit == "none":
        # Under DP times would leave without noise: they go to this client's log only.
        metrics |= times.seconds()
    log_training(client, server_round, trained, times, message.metadata.created_at)
    content = RecordDict({ARRAYS: sent})
    if metrics:
        content[METRICS] = MetricRecord(metrics)
    return content


def _update_alone(
    message: Message, client: RunClient, fitted: RunConfig
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Fine-tune, and return the trained arrays and those that were received."""
    taken = _take_up(message, client, fitted)
    trained, _, times = _fitted(client, taken)
    created_at = message.metadata.created_at
    log_training(client, taken.server_round, trained, times, created_at)
    return trained.arrays, taken.task.arrays


def _records(
    message: Message, client: RunClient, fitted: RunConfig
) -> "tuple[AdaptedModel, Sequence[Record | None], RoundTask]":
    """Load what a step at record level is made of."""
    taken = _take_up(message, client, fitted)
    return taken.adapted, taken.examples, taken.task


def _fitted_config(message: Message, client: RunClient) -> RunConfig:
    """Return the run config as this node trains it, before anything is charged.

    Raises:
        ConfigError: The server has another base model, the rank is above the node's, or the
            memory is.
    """
    record = message.content.config_records[CONFIG]
    require_same_base(client.config.model.name, record.get(BASE_MODEL))
    config = with_kind(client.config, record.get(ADAPTER_KIND))
    fitted = fitted_to_machine(config, client.node)
    lines = (
        rank_line(client.node, config.adapter),
        micro_batch_line(config.train, fitted.train),
    )
    for line in filter(None, lines):
        client.log.write(f"client {client.log.number}: {line}")
    return fitted


def _server_round(message: Message) -> int:
    # Flower allows lists and bytes here: those raise, and the reply is a code.
    record = message.content.config_records[CONFIG]
    return int(record["server-round"])  # type: ignore[arg-type]


def _take_up(message: Message, client: RunClient, config: RunConfig) -> _Round:
    """Load the model, the rows and the server's arrays."""
    started, node = time.monotonic(), client.node
    # The message's own clock is the server's, which may be wrong here by any amount.
    deadline = started + config.strategy.reply_seconds
    record, server_round = message.content.config_records[CONFIG], _server_round(
        message
    )
    learning_rate = float(record["learning-rate"])  # type: ignore[arg-type]
    resident = resident_model(config, trained_rank(node, config.adapter))
    loaded = time.monotonic()
    examples: Sequence[Record | None]
    stop_at = math.inf if node.max_seconds is None else started + node.max_seconds
    if config.privacy.unit == "record":
        # Its steps are the plan's, so that the limit decides before a row is read.
        require_time(resident.adapted, client, config, record, stop_at)
        stop_at = math.inf
        examples = client_records(resident, node, config, client.log)
    else:
        examples = client_rows(resident, node, config, client.log)
    arrays = _received(message, resident.adapted, config)
    seed = training_seed(config.seed, server_round, node.partition_id)
    task = RoundTask(arrays, learning_rate, seed, deadline, stop_at)
    return _Round(
        server_round, config, resident.adapted, examples, task, started, loaded
    )


def _fitted(
    client: RunClient, taken: _Round
) -> tuple["Trained", dict[str, Any], Times]:
    """Train, and return the result, the metrics that may leave beside it, and times."""
    ready = time.monotonic()
    trained, metrics = _fit(client, taken)
    ended = time.monotonic()
    began = ready if trained.began is None else trained.began
    times = Times(taken.started, taken.loaded, ready, began, ended, ended)
    return trained, metrics, times


def _announced(client: RunClient) -> RecordDict:
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


def _charge(client: RunClient, server_round: int | None) -> None:
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


def _fit(client: RunClient, taken: _Round) -> tuple["Trained", dict[str, Any]]:
    """Train, and return the result with the metrics that may leave beside it."""
    adapted, examples, task = taken.adapted, taken.examples, taken.task
    if client.config.privacy.unit == "record":
        trained, epsilon = fit_privately(client, adapted, examples, task, taken.config)
        return trained, {"epsilon": epsilon}
    from fedllm.training.sft import train_adapter

    usable = [e for e in examples if e is not None and not isinstance(e, tuple)]
    trained = train_adapter(adapted, usable, taken.config.train, task)
    if client.config.privacy.unit != "none":
        return trained, {}
    return trained, {"num-examples": trained.num_examples, "train-loss": trained.loss}


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


def _evaluate(message: Message, client: RunClient) -> RecordDict:
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
    resolved = with_kind(config, record.get(ADAPTER_KIND))
    rank = trained_rank(client.node, resolved.adapter)
    resident = resident_model(resolved, rank)
    held = client_rows(resident, client.node, config, client.log, "evaluation")
    adapted = resident.adapted
    adapted.set(_received(message, adapted, config))
    examples = held[: config.strategy.evaluate_examples or None]
    score = held_out(adapted.model, examples, adapted.pad_token_id, config.train)
    metrics = MetricRecord({"num-examples": score.num_examples})
    metrics["eval-loss"] = score.loss
    return RecordDict({METRICS: metrics})
