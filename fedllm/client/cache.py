"""What a client process keeps between messages: the adapted model and tokenised rows.

The actors of a simulation live through the run, so each loads the base model and
tokenises a partition once. On a SuperNode every message starts a new process and the
cache is empty; the quantised copy of the base on disk does that work.
"""

import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedllm.client.log import ClientLog
from fedllm.client.node_config import NodeConfig
from fedllm.client.preload import import_libraries
from fedllm.config import RunConfig, fedllm_home
from fedllm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.data.tokens import Example


@dataclass(frozen=True)
class ClientRows:
    """The rows of one client.

    Attributes:
        examples: The tokenised ones that have an answer.
        digests: `row_digest` of every row, for the ledger of `privacy.unit="record"`;
            else empty.
    """

    examples: list["Example"]
    digests: list[bytes]


@dataclass
class ResidentModel:
    """The base model with one run's adapter, and the rows tokenised for it."""

    adapted: "AdaptedModel"
    rows: dict[Any, ClientRows] = field(default_factory=dict)


_resident: dict[Any, ResidentModel] = {}


def resident_model(config: RunConfig) -> ResidentModel:
    """Return the resident base model with this run's adapter on it.

    Raises:
        FedllmError: The model cannot be loaded.
    """
    key = (config.model, config.adapter, config.seed)
    if key not in _resident:
        from fedllm.adapters.adapted_model import load_adapted_model

        import_libraries(
            quantized=bool(
                config.model.quantization or config.model.quantize_embeddings
            ),
            per_example=config.privacy.unit == "record",
        )
        # Another adapter kind would wrap the same base twice: keep one at a time.
        _resident.clear()
        _resident[key] = ResidentModel(load_adapted_model(config, fedllm_home()))
        # Every trainer that is built collects garbage, which walks all that imports and
        # the model left: a good part of a short training. None of it is garbage.
        gc.collect()
        gc.freeze()
    return _resident[key]


def client_rows(
    resident: ResidentModel,
    node: NodeConfig,
    config: RunConfig,
    log: ClientLog,
    held_out: bool = False,
) -> ClientRows:
    """Return this client's rows, tokenised once: those to train on or those held out.

    Args:
        resident: Its tokenizer makes the tokens, and it keeps them.
        node: Names the file or the partition.
        config: The run config.
        log: Gets a line if `train.max-length` cuts rows.
        held_out: Whether to return the rows that are not trained on.

    Raises:
        DataError: The client has no usable row.
    """
    is_record = config.privacy.unit == "record"
    share = (node.data_path, node.partition_id, node.num_partitions, config.seed)
    key = (config.data, config.train.max_length, share, is_record, held_out)
    if key not in resident.rows:
        loaded = _load_rows(node, config, held_out)
        digests = _digests(loaded) if is_record else []
        examples = _tokenize(loaded, resident.adapted.tokenizer, config, log)
        resident.rows[key] = ClientRows(examples, digests)
    rows = resident.rows[key]
    if not rows.examples:
        raise DataError(
            f"client {node.partition_id}: has no held-out example, so it does not "
            "evaluate"
            if held_out
            else f"client {node.partition_id}: has no usable example, so its update is "
            "zero"
        )
    return rows


def _load_rows(node: NodeConfig, config: RunConfig, held_out: bool) -> "Dataset":
    """Read the client's own file, or its partition of `data.name`."""
    from fedllm.data.partitions import partition
    from fedllm.data.rows import load_rows, own_rows

    rows = load_rows(config.data, node.data_path)
    if node.data_path is None:
        rows = partition(
            config.data, rows, node.partition_id, node.num_partitions, config.seed
        )
    return own_rows(config.data, rows, config.seed, held_out)


def _digests(rows: "Dataset") -> list[bytes]:
    """Return the name by which the ledger knows each row."""
    from fedllm.privacy.record_ledger import row_digest

    return [row_digest(row) for row in rows]


def _tokenize(
    rows: "Dataset", tokenizer: Any, config: RunConfig, log: ClientLog
) -> "list[Example]":
    """Return labelled tokens, and log how many rows the length limit cut."""
    from fedllm.data.tokens import tokenize

    tokenized = tokenize(rows, tokenizer, config.data, config.train.max_length)
    if tokenized.num_truncated or tokenized.num_without_answer:
        log.write(
            f"client {log.number}: train.max-length {config.train.max_length} cut "
            f"{tokenized.num_truncated} of {len(tokenized.examples)} examples; "
            f"{tokenized.num_without_answer} without an answer are not used"
        )
    return tokenized.examples
