"""What a client process keeps from message to message: the model and the tokenised rows."""

import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import Context

from fedllm.client.log import note
from fedllm.client.node_config import partition_of
from fedllm.client.preload import import_libraries
from fedllm.config import RunConfig, fedllm_home
from fedllm.errors import DataError

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.data.tokens import Example


@dataclass
class _Resident:
    """What a client process keeps from message to message."""

    adapted: "AdaptedModel"
    partitions: dict[Any, "list[Example]"] = field(default_factory=dict)
    digests: dict[Any, list[bytes]] = field(default_factory=dict)


_resident: dict[Any, _Resident] = {}


def _load(config: RunConfig) -> _Resident:
    """Return the resident base model with this run's kind of adapter on it."""
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
        _resident[key] = _Resident(load_adapted_model(config, fedllm_home()))
        # Every trainer that is built collects garbage, which walks all that imports and
        # the model left: a good part of a short training. None of it is garbage.
        gc.collect()
        gc.freeze()
    return _resident[key]


def _examples(
    resident: _Resident, context: Context, config: RunConfig, held_out: bool = False
) -> "list[Example]":
    """Return this client's tokenised examples: those to train on, or those held out.

    Raises:
        DataError: It has none.
    """
    from fedllm.data.partitions import partition
    from fedllm.data.rows import load_rows, own_rows
    from fedllm.data.tokens import tokenize

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
            rows, resident.adapted.tokenizer, config.data, config.train.max_length
        )
        if tokenized.num_truncated or tokenized.num_without_answer:
            note(
                context,
                config,
                f"client {partition_id}: train.max-length {config.train.max_length} cut "
                f"{tokenized.num_truncated} of {len(tokenized.examples)} examples; "
                f"{tokenized.num_without_answer} without an answer are not used",
            )
        resident.partitions[key] = tokenized.examples
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
