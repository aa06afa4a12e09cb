"""A client's records under record level: every row is one, whatever it holds.

How many records there are, and that a client trains at all, may not depend on what a row
holds: it would leave without noise. So a row that nothing can be learned from is a record
without an example. It takes its coin like any other and adds nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.config import DataConfig
from fedllm.data.partitions import partition
from fedllm.data.persons import person_id
from fedllm.data.prompts import to_prompt_completion, training_texts
from fedllm.data.readers import Row, comma_list, looks_local, read_records
from fedllm.data.rows import is_hub_id, load_rows
from fedllm.data.tokens import Example, encoded_pairs, labelled
from fedllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Records:
    """A client's records.

    Attributes:
        examples: One entry a record, in the order of the file; None for a record that
            nothing can be learned from.
        causes: How many records have no example, by cause; for the client's own log.
    """

    examples: list[Example | None]
    causes: Counter[str]


def load_records(config: DataConfig, path: str | None = None) -> list[Row | None]:
    """Load all rows of a client's file, or of the data set; None for a broken one.

    Args:
        config: Names the data set.
        path: A client's own file or folder, instead of `config.name`.

    Raises:
        DataError: The data is missing, empty, or malformed as a whole, or the hub cannot
            be reached.
    """
    name = path
    if name is None and looks_local(config.name):
        name = config.name
    if name is None:
        return list(load_rows(config).to_list())
    return read_records(Path(name).expanduser().absolute())


def require_person_column(config: DataConfig) -> None:
    """Check that the data set names persons, if it is on this machine and no hub's.

    Raises:
        DataError: No row has the person column, or the rows cannot be read.
    """
    column = config.person_column
    if not column or is_hub_id(config.name):
        return
    rows = load_records(config)
    if not any(row is not None and column in row for row in rows):
        names = dict.fromkeys(str(name) for row in rows if row for name in row)
        raise DataError(
            f"data.person-column: {config.name}: no row has the column {column!r}; the "
            f"columns are {comma_list(names)}"
        )


def own_records(
    config: DataConfig,
    rows: Sequence[Row | None],
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> list[Row | None]:
    """Return one virtual client's rows, as `partition` shares them.

    Raises:
        ConfigError: No such partition, or `natural` has fewer clients than groups.
        DataError: The partition column, or the person column, is in no row.
    """
    from datasets import Dataset

    columns: dict[str, list[Any]] = {"row": list(range(len(rows)))}
    column = config.partition_column
    is_by_label = config.partition in ("dirichlet", "natural")
    if is_by_label and any(row is not None and column in row for row in rows):
        # As text: a row without a value, or with another kind, is of a group of its own.
        columns[column] = [str((row or {}).get(column, "")) for row in rows]
    person = config.person_column
    if person and any(row is not None and person in row for row in rows):
        # One kind of value, in characters that a table takes: an id may be half of one.
        ids = (person_id((row or {}).get(person)) for row in rows)
        columns[person] = ["" if name is None else ascii(name) for name in ids]
    shares = Dataset.from_dict(columns)
    chosen = partition(config, shares, partition_id, num_partitions, seed)
    return [rows[index] for index in chosen["row"][:]]


def tokenize_records(
    rows: Sequence[Row | None],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    max_length: int,
) -> Records:
    """Turn every row into an example, as `tokenize` does, or into None. Total.

    Args:
        rows: The client's rows.
        tokenizer: The base model's tokenizer.
        config: Names the columns.
        max_length: Longest example in tokens.

    Guarantee:
        There are as many entries as rows. An entry is a function of its row alone, and no
        row raises an error, whatever it holds.
    """
    causes: Counter[str] = Counter()
    texts = [_texts(row, tokenizer, config, causes) for row in rows]
    known = [pair for pair in texts if pair is not None]
    encoded = iter(_encoded(known, tokenizer, causes))
    examples: list[Example | None] = []
    for pair in texts:
        ids = None if pair is None else next(encoded)
        example = None if ids is None else labelled(*ids, max_length)
        if ids is not None and example is None:
            causes["no answer within train.max-length"] += 1
        examples.append(example)
    return Records(examples, causes)


def _texts(
    row: Row | None,
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    causes: Counter[str],
) -> tuple[str, str] | None:
    """Return a row's question and whole conversation; None if it has none."""
    if row is None:
        causes["cannot be read"] += 1
        return None
    try:
        conversation = to_prompt_completion(config, row)
        if conversation is None:
            causes["no question or no answer"] += 1
            return None
        return training_texts(tokenizer, *conversation)
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        causes[f"{type(error).__name__}: {error}"[:200]] += 1
        return None


def _encoded(
    pairs: Sequence[tuple[str, str]],
    tokenizer: "PreTrainedTokenizerBase",
    causes: Counter[str],
) -> list[tuple[list[int], list[int]] | None]:
    """Return the tokens of each pair; None for one that the tokenizer rejects."""
    try:
        return list(encoded_pairs(tokenizer, pairs))
    # Half a character, for one; a tokenizer in Rust panics with a BaseException.
    except BaseException as error:  # noqa: BLE001 - see above
        _raise_if_of_process(error)
        found: list[tuple[list[int], list[int]] | None] = []
    for pair in pairs:
        try:
            found += encoded_pairs(tokenizer, [pair])
        except BaseException as error:  # noqa: BLE001 - as for all texts together
            _raise_if_of_process(error)
            causes[f"not text for the tokenizer: {type(error).__name__}"] += 1
            found.append(None)
    return found


def _raise_if_of_process(error: BaseException) -> None:
    """Raise an error again that ends the process, and is about no row."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
