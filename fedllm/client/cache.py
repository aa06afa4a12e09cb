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
from fedllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from datasets import Dataset

    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.data.columns import Row
    from fedllm.data.held_out import Part, RowSplit
    from fedllm.data.persons import Persons
    from fedllm.data.tokens import Example
    from fedllm.training.person_gradients import Record
    from fedllm.training.personal import PersonalRows

_MOST_LISTED = 50
"""Rows without an id that a line of the client's log lists."""


@dataclass(frozen=True)
class OwnRecords:
    """A client's rows under record level, what each is for, and whose it is.

    Attributes:
        examples: One a row; None for a row that nothing can be learned from.
        split: The places of the rows, by what they are for.
        persons: The places of each person's rows; None if every row is a record.
    """

    examples: "list[Example | None]"
    split: "RowSplit"
    persons: "Persons | None"


@dataclass
class ResidentModel:
    """The base model with one run's adapter, and the rows tokenised for it."""

    adapted: "AdaptedModel"
    rows: dict[Any, "list[Example]"] = field(default_factory=dict)
    records: dict[Any, OwnRecords] = field(default_factory=dict)


_resident: dict[Any, ResidentModel] = {}

_TOO_FEW = (
    "has too few rows for a personal adapter: of those that it holds out, at least two "
    "that differ are needed, one to stop the training and one to choose by; four rows are "
    "enough, and at record level, where a tenth is held out by content, some 80 almost "
    "always"
)
_WITHOUT: "dict[Part, str]" = {
    "training": "has no usable example, so its update is zero",
    "evaluation": "has no held-out example, so it does not evaluate",
    "stopping": _TOO_FEW,
    "choosing": _TOO_FEW,
}


def resident_model(config: RunConfig, rank: int | None = None) -> ResidentModel:
    """Return the resident base model with this run's adapter on it.

    Args:
        config: The run config, with a kind of adapter that is not `auto`.
        rank: How many columns of each factor are trained; None: all.

    Raises:
        FedllmError: The model cannot be loaded, or has too few positions.
    """
    from fedllm.data.model_limits import require_positions

    key = (config.model, config.adapter, config.seed, rank)
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
        adapted = load_adapted_model(config, fedllm_home(), rank=rank)
        _resident[key] = ResidentModel(adapted)
        # Every trainer that is built collects garbage, which walks all that imports and
        # the model left: a good part of a short training. None of it is garbage.
        gc.collect()
        gc.freeze()
    resident = _resident[key]
    require_positions(config.train.max_length, resident.adapted.model.config)
    return resident


def client_rows(
    resident: ResidentModel,
    node: NodeConfig,
    config: RunConfig,
    log: ClientLog,
    part: "Part" = "training",
) -> "list[Example]":
    """Return one part of this client's examples, tokenised once.

    Args:
        resident: Its tokenizer makes the tokens, and it keeps them.
        node: Names the file or the partition.
        config: The run config.
        log: Gets a line of what rows are read as, and of each reason why some are not used.
        part: Those to train on, or those held out for one purpose.

    Raises:
        DataError: The client has no usable row in this part.
    """
    key = (*_rows_key(node, config), part)
    if key not in resident.rows:
        loaded = _load_rows(node, config, log, part)
        resident.rows[key] = _tokenize(loaded, resident.adapted, config, log)
    examples = resident.rows[key]
    if not examples:
        raise DataError(f"client {node.partition_id}: {_WITHOUT[part]}")
    return examples


def client_records(
    resident: ResidentModel, node: NodeConfig, config: RunConfig, log: ClientLog
) -> "list[Record | None]":
    """Return this client's records, tokenised once: all its rows, whatever they hold.

    With `data.person-column` a record is a person, the tuple of all examples of their rows.
    A row without an id is in no record: it adds nothing, and neither refuses nor counts.

    Args:
        resident: Its tokenizer makes the tokens, and it keeps them.
        node: Names the file or the partition.
        config: The run config, under record level.
        log: Gets a line of how many records have no example, and why.

    Returns:
        An entry for each record, None for one that nothing can be learned from, or that is
        held out. It takes its coin all the same: the number of records is that of rows, or
        of persons.

    Raises:
        ConfigError: There is no such partition, or it would depend on what rows hold.
        DataError: There is no such file, it holds no rows, or it is malformed as a whole.
    """
    own = _own_records(resident, node, config, log)
    training = _only(own.examples, own.split.training)
    return list(training if own.persons is None else own.persons.records(training))


def personal_rows(
    resident: ResidentModel, node: NodeConfig, config: RunConfig, log: ClientLog
) -> "PersonalRows":
    """Return what this client's personal adapter is trained on, stopped and chosen by.

    For the node's own use: what it raises and returns depends on what rows hold.

    Args:
        resident: Its tokenizer makes the tokens, and it keeps them.
        node: Names the file or the partition.
        config: The run config, with personal training.
        log: Gets what `client_rows` or `client_records` logs.

    Raises:
        ConfigError: There is no such partition.
        DataError: The client has too few rows.
    """
    from fedllm.training.personal import PersonalRows

    parts: tuple[Part, ...] = ("training", "stopping", "choosing")
    if config.privacy.unit != "record":
        return PersonalRows(
            *(client_rows(resident, node, config, log, part) for part in parts)
        )
    own = _own_records(resident, node, config, log)
    chosen: list[list[Example]] = []
    for part in parts:
        examples = _only(own.examples, own.split.places(part))
        usable = [example for example in examples if example is not None]
        if not usable:
            raise DataError(f"client {node.partition_id}: {_WITHOUT[part]}")
        chosen.append(usable)
    return PersonalRows(*chosen)


def _only(
    examples: "Sequence[Example | None]", places: "Iterable[int]"
) -> "list[Example | None]":
    """Return as many entries, with None at all other places."""
    kept = set(places)
    return [example if i in kept else None for i, example in enumerate(examples)]


def _own_records(
    resident: ResidentModel, node: NodeConfig, config: RunConfig, log: ClientLog
) -> OwnRecords:
    """Return all records of this client, tokenised once, and what each is for."""
    from fedllm.data.held_out import split_rows
    from fedllm.data.model_limits import vocabulary_of
    from fedllm.data.row_report import row_lines
    from fedllm.data.tokens import tokenize

    key = _rows_key(node, config)
    if key not in resident.records:
        rows = _load_records(node, config, log)
        public: set[int] = set()
        if node.data_path is not None:
            public = _public_places(config, rows, log)
        found = tokenize(
            rows,
            resident.adapted.tokenizer,
            config.data,
            config.train.max_length,
            vocabulary_of(resident.adapted.model.config),
        )
        for line in row_lines(found, rows, config.train.max_length):
            log.write(f"client {log.number}: {line}")
        if found.unusable:
            log.write(
                f"client {log.number}: rows of which nothing is learned count as records "
                "all the same"
            )
        column, persons = config.data.person_column, None
        if column:
            persons = _persons(rows, column)
            _log_persons(persons, rows, column, log)
        resident.records[key] = OwnRecords(
            [
                None if place in public else example
                for place, example in enumerate(found.records)
            ],
            split_rows(config, rows),
            persons,
        )
    return resident.records[key]


def num_partition_records(node: NodeConfig, config: RunConfig) -> int:
    """Return how many rows, or persons, a virtual client has, whatever the rows hold.

    Raises:
        ConfigError: There is no such partition, or it would depend on what rows hold.
        DataError: There are no rows, or they are malformed as a whole.
    """
    rows = _load_records(node, config)
    column = config.data.person_column
    return len(_persons(rows, column).places) if column else len(rows)


def _persons(rows: "Sequence[Row | None]", column: str) -> "Persons":
    """Group a client's rows by person; a broken row is nobody's."""
    from fedllm.data.persons import by_person

    return by_person(None if row is None else row.get(column) for row in rows)


def _log_persons(
    persons: "Persons", rows: "Sequence[Row | None]", column: str, log: ClientLog
) -> None:
    """Log how many persons there are, and which rows are nobody's.

    A column that is missing is a line here, and no refusal: it may be in one row alone, and
    then a refusal would say whether that row was there.
    """
    if not any(row is not None and column in row for row in rows):
        log.write(
            f"client {log.number}: data.person-column: no row has the column {column!r}, so "
            "nothing is learned from these rows; fedllm doctor --node says so before a run"
        )
        return
    text = f"client {log.number}: {len(persons.places)} persons by {column!r}"
    if persons.without_id:
        shown = ", ".join(str(place + 1) for place in persons.without_id[:_MOST_LISTED])
        more = ", ..." if len(persons.without_id) > _MOST_LISTED else ""
        text += (
            f"; {len(persons.without_id)} of {len(rows)} rows name none and add nothing: "
            f"row {shown}{more}"
        )
    log.write(text)


def _load_records(
    node: NodeConfig, config: RunConfig, log: ClientLog | None = None
) -> "list[Row | None]":
    """Read all rows of the client's own file, or of its partition of `data.name`."""
    from fedllm.data.records import load_records, own_records

    say = None if log is None else _say(log)
    rows = load_records(config.data, node.data_path, say)
    if node.data_path is None:
        _require_public_partition(node, config)
        where = (node.partition_id, node.num_partitions, config.seed)
        rows = own_records(config.data, rows, *where)
    if not rows:
        raise DataError(f"client {node.partition_id}: has no rows")
    return rows


def _rows_key(node: NodeConfig, config: RunConfig) -> tuple[Any, ...]:
    """Return all that a client's rows and their tokens depend on, but for the model."""
    share = (node.data_path, node.partition_id, node.num_partitions, config.seed)
    return (config.data, config.is_personal, config.train.max_length, share)


def _require_public_partition(node: NodeConfig, config: RunConfig) -> None:
    """Check that how many rows a real client has does not depend on what they hold.

    Raises:
        ConfigError: It does.
    """
    kind = config.data.partition
    if kind in ("dirichlet", "natural") and not node.is_simulated:
        raise ConfigError(
            f"data.partition: must be 'iid' or 'size-skew' for a real client under "
            f"privacy.unit='record' (got {kind!r}): what rows hold would decide how many "
            "each client has, or name a file of its own by data-path"
        )


def _load_rows(
    node: NodeConfig, config: RunConfig, log: ClientLog, part: "Part"
) -> "Dataset":
    """Read a part of the client's file, without public rows, or of its partition."""
    from fedllm.data.held_out import split_rows
    from fedllm.data.partitions import partition
    from fedllm.data.rows import load_rows

    rows = load_rows(config.data, node.data_path, _say(log))
    if node.data_path is None:
        rows = partition(
            config.data, rows, node.partition_id, node.num_partitions, config.seed
        )
    elif public := _public_places(config, rows, log):
        rows = rows.select([i for i in range(len(rows)) if i not in public])
    return rows.select(split_rows(config, rows).places(part))


def _public_places(
    config: RunConfig, rows: "Iterable[Row | None]", log: ClientLog
) -> set[int]:
    """Return the places of a node's own rows that are public, and log how many."""
    from fedllm.data.overlap import judged_by_embedded, public_rows_among

    if judged_by_embedded(config.data):
        log.write(
            f"client {log.number}: it trains on rows of its own (data-path), but public rows "
            f"of {config.data.name} choose the round and report; data.name='own' uses none"
        )
    public = public_rows_among(config.data, rows)
    if public:
        log.write(
            f"client {log.number}: {len(public)} of its rows are public rows of "
            f"{config.data.name}, whose losses are published: it does not train on them"
        )
    return public


def _tokenize(
    rows: "Dataset", adapted: "AdaptedModel", config: RunConfig, log: ClientLog
) -> "list[Example]":
    """Return labelled tokens, and log what became of the rows."""
    from fedllm.data.model_limits import vocabulary_of
    from fedllm.data.row_report import row_lines
    from fedllm.data.tokens import tokenize

    length = config.train.max_length
    tokenized = tokenize(
        rows,
        adapted.tokenizer,
        config.data,
        length,
        vocabulary_of(adapted.model.config),
        whole_texts=True,
    )
    if tokenized.records:
        for line in row_lines(tokenized, rows.to_list(), length):
            log.write(f"client {log.number}: {line}")
    return tokenized.packed(length)


def _say(log: ClientLog) -> "Callable[[str], None]":
    """Return what writes a line about a client's rows into its log."""
    return lambda line: log.write(f"client {log.number}: {line}")
