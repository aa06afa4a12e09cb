"""Rows: where they come from, who holds which, and how they become tokens.

Everything stays in memory: no cache of a client's rows is left on its disk. `datasets`
takes a second to import and `flwr_datasets` another (it brings matplotlib), so both are
imported where they are used.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedllm.config import DataConfig, fedllm_home
from fedllm.data_files import comma_list, looks_local, one_line, read_rows
from fedllm.errors import ConfigError, DataError
from fedllm.privacy.record_ledger import row_digest
from fedllm.prompts import (
    MESSAGES,
    Row,
    chat_prompt,
    common_prefix_length,
    encode,
    to_prompt_completion,
    training_texts,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN",
    "Tokenized",
    "chat_prompt",
    "load_public",
    "load_rows",
    "own_rows",
    "partition",
    "to_prompt_completion",
    "tokenize",
]

BUILT_IN = "wordnet-medical"

_SHARDS = Path(__file__).parent / "datasets" / "wordnet_medical"


@dataclass(frozen=True)
class Tokenized:
    """Rows as tokens, and what was lost on the way."""

    dataset: "Dataset"
    """Columns `input_ids` and `completion_mask` (1 in the answer, else 0): lists of the
    same length, at most max_length, with at least one 1."""
    num_truncated: int
    """Rows of `dataset` whose end the length limit cut."""
    num_without_answer: int
    """Rows left out: the question or the answer is missing or blank, or the length
    limit cut the whole answer."""

    @property
    def num_examples(self) -> int:
        """Rows of `dataset`."""
        return len(self.dataset)


def load_rows(config: DataConfig, path: str | None = None) -> "Dataset":
    """Load the training rows with all their columns.

    Args:
        config: Names the data set and its columns.
        path: A client's own file or folder, instead of `config.name`.

    Raises:
        DataError: The data is missing, empty or malformed, lacks a column, or the hub
            cannot be reached.
    """
    if path is not None:
        return _load_local(config, path)
    if config.name == BUILT_IN:
        return _load_built_in(config, "train")
    if looks_local(config.name):
        return _load_local(config, config.name)
    return _load_hub(config)


def load_public(
    config: DataConfig, split: Literal["validation", "test"]
) -> "Dataset | None":
    """Load the rows declared public: validation chooses, test only reports.

    Args:
        config: A file that it names wins over the embedded rows.
        split: Which of the two.

    Returns:
        The rows, or None where the user declared none.

    Raises:
        DataError: As `load_rows`.
    """
    path = config.public_validation if split == "validation" else config.public_test
    if path:
        return _load_local(config, path)
    return _load_built_in(config, split) if config.name == BUILT_IN else None


def partition(
    config: DataConfig,
    rows: "Dataset",
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> "Dataset":
    """Return the rows of one virtual client, by one of flwr-datasets' partitioners.

    The partitions are disjoint and together hold every row; the same arguments give
    the same rows in every process. A partition may be empty: under `dirichlet` with a
    small alpha, under `size-skew` with few rows, and wherever there are fewer rows than
    clients (then each row is one client's). `natural` with more clients than groups
    cuts the larger groups into several clients.

    Args:
        config: How to share the rows.
        rows: All rows.
        partition_id: In [0, num_partitions).
        num_partitions: Number of virtual clients.
        seed: The run's seed.

    Raises:
        ConfigError: No such partition, or `natural` has fewer clients than groups.
        DataError: The column to go by is missing, or has rows without a value.
    """
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"partition-id: must be in [0, {num_partitions}) (got {partition_id})"
        )
    if config.partition in ("dirichlet", "natural"):
        _check_groups(config, rows, num_partitions)
    if config.partition in ("iid", "size-skew", "natural"):
        # Those partitioners cut contiguous pieces: the shuffle makes them random.
        rows = rows.shuffle(seed=seed)
    if len(rows) < num_partitions:
        return rows.select([partition_id] if partition_id < len(rows) else [])
    if config.partition == "natural":
        groups = rows[config.partition_column][:]
        return rows.select(_parts_of_groups(groups, num_partitions)[partition_id])
    partitioner = _make_partitioner(config, len(rows), num_partitions, seed)
    partitioner.dataset = rows
    return partitioner.load_partition(partition_id)


def own_rows(
    config: DataConfig, rows: "Dataset", seed: int, held_out: bool
) -> "Dataset":
    """Return the rows that a client trains on, or those that it holds out.

    A row's place follows from its content and the seed alone: copies of a row, also at
    another client, lie on one side, and stay there when a file changes between rounds.
    The share is therefore an expected one; of a few rows none may be held out.

    Args:
        config: Says which share is held out.
        rows: One client's rows.
        seed: The run's seed.
        held_out: Which of the two.
    """
    if not config.held_out_fraction:
        return rows.select([]) if held_out else rows
    limit = config.held_out_fraction * 2**64
    key = str(seed).encode()
    chosen = []
    for index, row in enumerate(rows):
        digest = hashlib.sha256(key + row_digest(row)).digest()
        if (int.from_bytes(digest[:8], "big") < limit) == held_out:
            chosen.append(index)
    return rows.select(chosen)


def tokenize(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    max_length: int,
) -> Tokenized:
    """Turn rows into tokens as TRL's SFTTrainer does, and mark the answer.

    With a chat template: the conversation as the template renders it, where the answer
    begins at the first token that differs from the prompt rendered alone (TRL 1.16,
    `SFTTrainer._prepare_dataset`). Without one: an Alpaca-style text, with the end
    token after the answer. What is longer than max_length loses its end.

    Args:
        rows: Rows with the columns that config names, or with `messages`.
        tokenizer: The base model's tokenizer.
        config: Names the columns.
        max_length: Longest example in tokens.

    Raises:
        DataError: A row has not the right form, or the chat template refuses it.
    """
    from datasets import Dataset

    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    num_truncated = num_without_answer = 0
    texts: list[str] = []
    for number, row in enumerate(_each(rows), start=1):
        try:
            conversation = to_prompt_completion(config, row)
            if conversation is None:
                num_without_answer += 1
                continue
            texts += training_texts(tokenizer, *conversation)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
    encoded = iter(encode(tokenizer, texts))
    for prompt_ids, ids in zip(encoded, encoded, strict=True):
        start = common_prefix_length(prompt_ids, ids)
        if start >= min(len(ids), max_length):
            num_without_answer += 1
            continue
        num_truncated += len(ids) > max_length
        mask = [0] * start + [1] * (len(ids) - start)
        columns["input_ids"].append(ids[:max_length])
        columns["completion_mask"].append(mask[:max_length])
    return Tokenized(Dataset.from_dict(columns), num_truncated, num_without_answer)


def _each(rows: "Dataset") -> Iterator[Row]:
    """Yield rows one by one, read by the thousand: `datasets` takes long for a single one."""
    for columns in rows.iter(batch_size=1000):
        for cells in zip(*columns.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))


def _make_partitioner(
    config: DataConfig, num_rows: int, num_partitions: int, seed: int
) -> "Partitioner":
    """Return Flower's partitioner for this kind of federation."""
    from flwr_datasets import partitioner as flower

    if config.partition == "dirichlet":
        # A minimum size would draw again up to ten times and then give up.
        return flower.DirichletPartitioner(
            num_partitions,
            config.partition_column,
            config.partition_alpha,
            min_partition_size=0,
            seed=seed,
        )
    if config.partition == "size-skew":
        # LinearPartitioner means the same but refuses a client without a row.
        return flower.SizePartitioner(_linear_sizes(num_rows, num_partitions))
    return flower.IidPartitioner(num_partitions)


def _parts_of_groups(
    groups: Sequence[str | int], num_partitions: int
) -> list[list[int]]:
    """Cut groups into parts of one group each, the largest part in two while need be.

    Args:
        groups: The group of each row.
        num_partitions: Number of parts, at least that of the groups.

    Returns:
        Row numbers of each part, in the order of the groups' names.
    """
    rows: dict[str | int, list[int]] = {}
    for number, group in enumerate(groups):
        rows.setdefault(group, []).append(number)
    parts = dict.fromkeys(rows, 1)
    for _ in range(num_partitions - len(rows)):
        largest = max(sorted(rows, key=str), key=lambda g: len(rows[g]) / parts[g])
        parts[largest] += 1
    return [
        rows[group][part :: parts[group]]
        for group in sorted(rows, key=str)
        for part in range(parts[group])
    ]


def _linear_sizes(num_rows: int, num_partitions: int) -> list[int]:
    """Return sizes in proportion to 1, 2, 3, ... that add up to num_rows."""
    total = num_partitions * (num_partitions + 1) // 2
    ends = [num_rows * k * (k + 1) // 2 // total for k in range(num_partitions + 1)]
    return [end - start for start, end in pairwise(ends)]


def _check_groups(config: DataConfig, rows: "Dataset", num_partitions: int) -> None:
    """Check the column that `dirichlet` and `natural` go by."""
    column = config.partition_column
    if column not in rows.column_names:
        raise DataError(
            f"data.partition-column: there is no column {column!r}; the columns are "
            f"{comma_list(rows.column_names)}"
        )
    values = rows[column][:]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int):
            raise DataError(
                f"data.partition-column: {column!r} must hold text or whole numbers "
                f"(got {value!r:.80} in row {number})"
            )
    groups = len(set(values))
    if config.partition == "natural" and num_partitions < groups:
        raise ConfigError(
            f"data.partition: 'natural' makes at least one client of each of the {groups} "
            f"values of {column!r} (got {num_partitions} clients): add "
            f'--federation-config "num-supernodes={groups}"'
        )


def _load_built_in(config: DataConfig, split: str) -> "Dataset":
    rows = _read_built_in(split)
    _check_columns(config, rows.column_names, BUILT_IN)
    return rows


@lru_cache(maxsize=3)
def _read_built_in(split: str) -> "Dataset":
    """Read the embedded shards of a split, once a process."""
    shards = sorted(_SHARDS.glob(f"{split}*.jsonl"))
    rows = [row for shard in shards for row in read_rows(shard)]
    if not rows:
        raise DataError(f"{_SHARDS}: no {split} rows there: install fedllm again")
    return _make_dataset(rows, _SHARDS)


def _load_local(config: DataConfig, name: str) -> "Dataset":
    """Load a file or a folder, and check each row."""
    path = Path(name).expanduser().absolute()
    rows = read_rows(path)
    _check_columns(config, list(dict.fromkeys(n for row in rows for n in row)), path)
    for number, row in enumerate(rows, start=1):
        try:
            to_prompt_completion(config, row)
        except DataError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
    return _make_dataset(rows, path)


def _load_hub(config: DataConfig) -> "Dataset":
    """Load a split of a hub data set.

    The hub's client caches what it downloads where it always does (HF_HOME); what
    `datasets` makes of it lies under our own folder.
    """
    import datasets

    name, split = config.name, config.split
    try:
        with _quiet_hub():
            rows = datasets.load_dataset(
                name, split=split, cache_dir=str(fedllm_home() / "datasets")
            )
    except datasets.exceptions.DatasetNotFoundError:
        raise DataError(
            f"data.name: {name!r} is no file or folder here, and the hub has no such "
            "data set, or not for you (hf auth login)"
        ) from None
    except OSError as error:
        raise DataError(
            f"data.name: {name!r} is no file or folder here, and the hub is out of "
            "reach: name a local .jsonl, .json, .csv or .parquet file, or "
            f"{BUILT_IN!r} ({one_line(error)})"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise DataError(f"data.name: {name!r} ({split}): {one_line(error)}") from None
    source = f"{name} ({split})"
    _check_columns(config, rows.column_names, source)
    if len(rows) == 0:
        raise DataError(f"{source}: holds no rows")
    return rows


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's bars and its lines about retries off the screen.

    There is a bar for each file and step, from each client; what fails is said once, by
    our own error.
    """
    import datasets

    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    bars = datasets.are_progress_bars_disabled()
    hub.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _make_dataset(rows: list[Row], source: Path) -> "Dataset":
    """Return rows as a data set; a column that a row lacks is None there."""
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [r.get(name) for r in rows] for name in names})
    except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: a column mixes kinds of values: {one_line(error)}"
        ) from None


def _check_columns(config: DataConfig, names: list[str], source: object) -> None:
    """Check that the questions and answers are there."""
    if MESSAGES in names:
        return
    wanted = {
        "data.prompt-column": config.prompt_column,
        "data.response-column": config.response_column,
    }
    for key, column in wanted.items():
        if column not in names:
            raise DataError(
                f"{source}: there is no column {column!r} ({key}); the columns are "
                f"{comma_list(names)}"
            )
