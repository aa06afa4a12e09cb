"""One client's part of a round: its data, its resident base model, its reply.

A simulation's actors live through the run, so the base model is loaded, and a
partition tokenised, once in each. On a SuperNode every message starts a new process and
the caches are empty; the quantised base comes from disk.
"""

import gc
import logging
import math
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

from fedllm.adapter_choice import with_kind
from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FedllmError,
    TimeLimitError,
)
from fedllm.original_run import original_context
from fedllm.replies import (
    ADAPTER_KIND,
    ARRAYS,
    CLIENT_PHASES,
    CONFIG,
    METRICS,
    encoded_record,
    error_content,
    read_global,
)

if TYPE_CHECKING:
    from peft import PeftModel

    from fedllm.adapters import AdapterSpec
    from fedllm.trained import Trained

logger = logging.getLogger(__name__)

_LARGEST_DELTA = 1e-5
"""Where a node says nothing else: any epsilon can be had at a delta near 1."""

_FLOORS = ("privacy-unit", "max-epsilon", "delta")
_FLOOR_WORDS = ("privacy", "epsilon", "delta")


@dataclass
class _Resident:
    """What a client process keeps from message to message."""

    model: "PeftModel"
    tokenizer: Any
    spec: "AdapterSpec"
    partitions: dict[Any, list[dict[str, Any]]] = field(default_factory=dict)
    digests: dict[Any, list[bytes]] = field(default_factory=dict)


_resident: dict[Any, _Resident] = {}


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
        check_floors(context.node_config, config)
        if message.metadata.message_type.startswith("evaluate"):
            content = _evaluate(message, context, config)
        else:
            content = _train(message, context, config)
    except Exception as error:  # noqa: BLE001 - a client's failure is told by code
        code = _code(error)
        where = _log_failure(context, code, error)
        text = str(error) if isinstance(error, FedllmError) else repr(error)
        # A lone surrogate, as in a file name, could not be sent.
        told = f"{text} (log: {where})".encode("utf-8", "backslashreplace").decode()
        content = error_content(code, None if private else told)
    return Message(content, reply_to=message)


def check_floors(node_config: Mapping[str, Any], config: RunConfig) -> None:
    """Hold a run against the floors in this node's own config.

    Raises:
        ConfigError: The run promises less than the node's owner demands.
    """
    privacy = config.privacy
    _require_known_floors(node_config)
    unit = node_config.get("privacy-unit")
    limit = _number(node_config, "max-epsilon")
    delta = _number(node_config, "delta")
    if limit is not None or delta is not None:
        # An epsilon or delta of no guarantee at all is below every floor.
        unit = unit or "client"
    if unit is not None and unit != privacy.unit:
        raise ConfigError(
            f"privacy.unit: this node demands {unit!r} (got {privacy.unit!r})"
            + ("" if "privacy-unit" in node_config else "; its privacy-unit is not set")
        )
    promised = [e for e in (privacy.target_epsilon, privacy.max_epsilon) if e > 0]
    if limit is not None and delta is None and privacy.delta > _LARGEST_DELTA:
        raise ConfigError(
            f"privacy.delta: this node's max-epsilon is meant at {_LARGEST_DELTA:g} "
            f"or less, where it sets no delta (got {privacy.delta})"
        )
    if privacy.unit == "record":
        # This client's own ledger holds the limit, whatever the run promises.
        limit = None
    if limit is not None and (not promised or min(promised) > limit):
        raise ConfigError(
            f"privacy.target-epsilon: this node demands at most {limit} "
            f"(got {min(promised) if promised else 'no bound'})"
        )
    if delta is not None and not 0 < privacy.delta <= delta:
        raise ConfigError(
            f"privacy.delta: this node demands a set value of at most {delta} "
            f"(got {privacy.delta})"
        )


def _require_known_floors(node_config: Mapping[str, Any]) -> None:
    """Refuse a floor by a name that nothing reads: its owner would rely on it.

    Raises:
        ConfigError: There is one.
    """
    for key in node_config:
        if key not in _FLOORS and any(w in key.lower() for w in _FLOOR_WORDS):
            raise ConfigError(
                f"node config: {key}: is no floor; those are {', '.join(_FLOORS)}"
            )


def partition_of(context: Context) -> tuple[int, int]:
    """Return (partition id, number of partitions) as the node reports them.

    A SuperNode with a file of its own has one partition; its id, which only seeds the
    training, comes from the file's path, since Flower's node ids are random.
    """
    node = context.node_config
    partition_id = _number(node, "partition-id")
    if "data-path" in node:
        path = str(node["data-path"]).encode("utf-8", "backslashreplace")
        return (zlib.crc32(path) if partition_id is None else int(partition_id)), 1
    num_partitions = _number(node, "num-partitions")
    if partition_id is None or num_partitions is None:
        raise ConfigError(
            "node config: needs data-path, the client's own data file, or partition-id "
            "and num-partitions: flower-supernode --node-config 'data-path=\"...\"'"
        )
    return int(partition_id), int(num_partitions)


def _number(node_config: Mapping[str, Any], key: str) -> float | None:
    """Return a number of the node config, None where it is not set.

    Raises:
        ConfigError: It is set to something else.
    """
    value = node_config.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"node config: {key}: must be a number (got {value!r})")
    return number


def _train(message: Message, context: Context, config: RunConfig) -> RecordDict:
    """Fine-tune from the server's arrays and return the trained ones."""
    started = time.monotonic()
    # The message's own clock is the server's, which may be wrong here by any amount.
    deadline = started + config.strategy.round_timeout
    record = message.content.config_records[CONFIG]
    resident = _load(with_kind(config, record.get(ADAPTER_KIND)))
    loaded = time.monotonic()
    partition_id, _ = partition_of(context)
    examples = _examples(resident, context, config)
    shapes, encoding = resident.spec.trained_shapes, config.wire.encoding
    arrays = read_global(message.content.array_records[ARRAYS], shapes, encoding)
    server_round = int(record["server-round"])  # type: ignore[arg-type]
    learning_rate = float(record["learning-rate"])  # type: ignore[arg-type]
    ready = time.monotonic()
    metrics: dict[str, Any] = {}
    if config.privacy.unit == "record":
        trained, metrics["epsilon"] = _train_privately(
            resident, context, config, examples, arrays, learning_rate, deadline
        )
    else:
        from fedllm.training import train_adapter, training_seed

        trained = train_adapter(
            resident.model,
            resident.spec,
            resident.tokenizer,
            examples,
            arrays,
            config.train,
            learning_rate,
            training_seed(config.seed, server_round, partition_id),
            deadline,
        )
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
    _note(
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
    examples: list[dict[str, Any]],
    arrays: Mapping[str, Any],
    learning_rate: float,
    deadline: float,
) -> tuple["Trained", float]:
    """Train by DP-SGD, and pay on this client's disk before anything leaves.

    Returns:
        The result, and the largest epsilon over the records that this client holds.

    Raises:
        BudgetError: The round would pass the node's or the run's limit.
        ConfigError: The client has fewer records than a batch.
        PrivacyError: The ledger cannot be trusted or written.
    """
    from fedllm.privacy.record_ledger import RecordLedger
    from fedllm.record_budget import RecordBudget, ledger_folder
    from fedllm.record_training import train_privately

    node = context.node_config
    partition_id, _ = partition_of(context)
    # Whoever set a floor or a file is no simulation: that ledger has to outlive the run.
    real = {"data-path", *_FLOORS} & set(node)
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
        _number(node, "max-epsilon"),
    )
    budget.require()
    trained = train_privately(
        resident.model,
        resident.spec,
        resident.tokenizer.pad_token_id or 0,
        examples,
        arrays,
        config.train,
        config.privacy.max_grad_norm,
        learning_rate,
        budget.plan,
        deadline,
    )
    return trained, budget.spend()


def _evaluate(message: Message, context: Context, config: RunConfig) -> RecordDict:
    """Return the loss of the server's adapter on this client's held-out rows."""
    from fedllm.adapters import set_trained
    from fedllm.evaluation import held_out

    if config.privacy.unit != "none":
        raise ConfigError("privacy.unit: clients evaluate only where it is 'none'")
    record = message.content.config_records[CONFIG]
    resident = _load(with_kind(config, record.get(ADAPTER_KIND)))
    examples = _examples(resident, context, config, held_out=True)
    shapes = resident.spec.trained_shapes
    sent = message.content.array_records[ARRAYS]
    arrays = read_global(sent, shapes, config.wire.encoding)
    set_trained(resident.model, resident.spec, arrays)
    examples = examples[: config.strategy.evaluate_examples or None]
    score = held_out(resident.model, examples, resident.tokenizer.pad_token_id or 0)
    metrics = MetricRecord({"num-examples": score.num_examples})
    metrics["eval-loss"] = score.loss
    return RecordDict({METRICS: metrics})


def import_libraries(*, quantized: bool, per_example: bool) -> None:
    """Import what training takes, without looking for garbage in between.

    What imports make stays. Python looks through all of it again and again all the same:
    a fifth of the time that they take, and a SuperNode pays it for every message.

    Raises:
        ModelError: bitsandbytes is wanted and broken.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        if quantized:
            from fedllm.models import import_bitsandbytes

            import_bitsandbytes()
        if per_example:
            import fedllm.record_training
        else:
            import fedllm.training  # noqa: F401
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _load(config: RunConfig) -> _Resident:
    """Return the resident base model with this run's kind of adapter on it."""
    key = (config.model, config.adapter, config.seed)
    if key not in _resident:
        from fedllm.adapters import adapter_spec, attach
        from fedllm.models import load_base, load_config, load_tokenizer, locate

        import_libraries(
            quantized=bool(
                config.model.quantization or config.model.quantize_embeddings
            ),
            per_example=config.privacy.unit == "record",
        )
        # Another adapter kind would wrap the same base twice: keep one at a time.
        _resident.clear()
        home = fedllm_home()
        location = locate(config.model.name, home)
        spec = adapter_spec(config.adapter, load_config(location), config.seed)
        base = load_base(
            location,
            config.model.quantization,
            home,
            quantize_embeddings=config.model.quantize_embeddings,
        )
        model = attach(base, spec)
        _resident[key] = _Resident(model, load_tokenizer(location), spec)
        # Every trainer that is built collects garbage, which walks all that imports and
        # the model left: a good part of a short training. None of it is garbage.
        gc.collect()
        gc.freeze()
    return _resident[key]


def _examples(
    resident: _Resident, context: Context, config: RunConfig, held_out: bool = False
) -> list[dict[str, Any]]:
    """Return this client's tokenised examples: those to train on, or those held out.

    Raises:
        DataError: It has none.
    """
    from fedllm.data import load_rows, own_rows, partition, tokenize
    from fedllm.evaluation import labelled

    partition_id, num_partitions = partition_of(context)
    path = context.node_config.get("data-path")
    key = (*_share(context, config), *(["held-out"] if held_out else []))
    if key not in resident.partitions:
        rows = load_rows(config.data, str(path) if path is not None else None)
        if path is None:
            rows = partition(
                config.data, rows, partition_id, num_partitions, config.seed
            )
        rows = own_rows(config.data, rows, config.seed, held_out)
        if config.privacy.unit == "record":
            from fedllm.privacy.record_ledger import row_digest

            resident.digests[key] = [row_digest(row) for row in rows]
        tokenized = tokenize(
            rows, resident.tokenizer, config.data, config.train.max_length
        )
        if tokenized.num_truncated or tokenized.num_without_answer:
            _note(
                context,
                config,
                f"client {partition_id}: train.max-length {config.train.max_length} cut "
                f"{tokenized.num_truncated} of {tokenized.num_examples} examples; "
                f"{tokenized.num_without_answer} without an answer are not used",
            )
        resident.partitions[key] = labelled(tokenized)
    examples = resident.partitions[key]
    if not examples:
        raise DataError(
            f"client {partition_id}: has no held-out example, so it does not evaluate"
            if held_out
            else f"client {partition_id}: has no usable example, so its update is zero"
        )
    return examples


def _share(context: Context, config: RunConfig) -> tuple[Any, ...]:
    """Return what determines a client's examples."""
    path = context.node_config.get("data-path")
    share = (path, *partition_of(context), config.seed)
    # Digests of the rows are kept with them where they are needed.
    return config.data, config.train.max_length, share, config.privacy.unit == "record"


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


def _note(context: Context, config: RunConfig, text: str) -> None:
    """Write a line to this client's own log, and show it where that is no release.

    A simulation forwards what its actors print to the run's log, which is the server's.
    """
    _append_log(context, text)
    simulated = "num-partitions" in context.node_config
    if config.privacy.unit == "none" or not simulated:
        logger.info(text)


def _log_failure(context: Context, code: str, error: Exception) -> str:
    """Write the whole error to this client's own log and return the log's path."""
    trace = "".join(traceback.format_exception(error))
    return _append_log(context, f"no update (code {code})\n{trace}")


def _append_log(context: Context, text: str) -> str:
    """Append to `logs/client-<partition id>.log` and return its path."""
    try:
        partition_id, _ = partition_of(context)
    except FedllmError:
        partition_id = 0
    path = fedllm_home() / "logs" / f"client-{partition_id}.log"
    try:
        # An error's text may quote a row.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{stamp} run {context.run_id} {text}\n")
    except OSError as error:
        logger.error("%s: cannot be written: %s", path, error.strerror)
    return str(path)
