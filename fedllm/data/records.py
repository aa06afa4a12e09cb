"""A client's records under record level: every row is one, whatever it holds.

How many records there are, and that a client trains at all, may not depend on what a row
holds: it would leave without noise. So a row that nothing can be learned from is a record
without an example. It takes its coin like any other and adds nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.columns import LINE, Row
from fedllm.data.folders import Say
from fedllm.data.partitions import partition
from fedllm.data.persons import person_id
from fedllm.data.readers import comma_list, ignore, looks_local, read_file
from fedllm.data.rows import is_hub_id, load_rows, local_row, say_unused
from fedllm.errors import DataError


def load_records(
    config: DataConfig, path: str | None = None, say: Say | None = None
) -> list[Row | None]:
    """Load all rows of a client's file, or of the data set; None for a broken one.

    Args:
        config: Names the data set.
        path: A client's own file or folder, instead of `config.name`.
        say: Gets a line of what is unusual, and of what is not used.

    Raises:
        DataError: The data is missing, empty, or malformed as a whole, or the hub cannot
            be reached.
    """
    say = say or ignore
    name = path
    if name is None and looks_local(config.name):
        name = config.name
    if name is None:
        return list(load_rows(config, say=say).to_list())
    root = Path(name).expanduser().absolute()
    read = read_file(root, config, say=say)
    names = dict.fromkeys(str(name) for one in read for name in one.row or ())
    say_unused(config, names, root, say)
    return [None if one.row is None else local_row(config, one, root) for one in read]


def require_person_column(config: DataConfig) -> None:
    """Check that the data set names persons, if it is on this machine and no hub's.

    Raises:
        DataError: No row has the person column, or the rows cannot be read.
    """
    column = config.person_column
    if not column or is_hub_id(config.name):
        return
    unused: list[str] = []
    rows = load_records(config, say=unused.append)
    if not any(row is not None and column in row for row in rows):
        names = dict.fromkeys(str(name) for row in rows if row for name in row)
        raise DataError(
            f"data.person-column: {config.name}: no row has the column {column!r}; the "
            f"columns are {comma_list(name for name in names if name != LINE)}"
            + "".join(f"; {line}" for line in unused)
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
