"""Rows: load those that clients train on, and those declared public.

Everything stays in memory: no cache of a client's rows is left on its disk. `datasets`
takes a second to import and `flwr_datasets` another (it imports matplotlib), so both are
imported in the functions that use them.
"""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedllm.config import DataConfig, fedllm_home
from fedllm.data.columns import (
    LINE,
    MESSAGES,
    PREFERENCES,
    UNREADABLE,
    Row,
    answer_columns,
    as_cell,
    column_of,
    question_columns,
    used_part,
)
from fedllm.data.embedded import BUILT_IN_DATA, EMBEDDED, OWN
from fedllm.data.folders import Say
from fedllm.data.readers import (
    ReadRow,
    comma_list,
    ignore,
    looks_local,
    one_line,
    read_file,
    read_rows,
    require_row,
)
from fedllm.data.turns import PLAIN
from fedllm.errors import DataError
from fedllm.foreign_text import printable

if TYPE_CHECKING:
    from datasets import Dataset

_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
_HALF = re.compile("[\ud800-\udfff]")


def load_rows(
    config: DataConfig, path: str | None = None, say: Say = ignore
) -> "Dataset":
    """Load the training rows with the columns that are used.

    Args:
        config: Names the data set and its columns.
        path: A client's own file or folder, instead of `config.name`.
        say: Gets a line of what is unusual, and of what is not used.

    Raises:
        DataError: The data is missing, empty or malformed, has none of the columns, or the
            hub cannot be reached.
    """
    if path is not None:
        return _load_local(config, path, config.split, say)
    if config.name in EMBEDDED:
        return _load_embedded(config, "train")
    if config.name == OWN:
        raise DataError(
            f"data.name: {OWN!r}: every client trains on a file of its own, and this one "
            "names none: set data-path in its node config, or name the rows here"
        )
    if looks_local(config.name):
        return _load_local(config, config.name, config.split, say)
    return _load_hub(config, say)


def load_public(
    config: DataConfig, split: Literal["train", "validation", "test"]
) -> "Dataset | None":
    """Load rows declared public: the server trains, validation chooses, test only reports.

    Args:
        config: A file that it names takes the place of the embedded rows.
        split: Which of the three; of `train` none are embedded.

    Returns:
        The rows, or None if the user declared none.

    Raises:
        DataError: As `load_rows`.
    """
    named = {
        "train": config.public_train,
        "validation": config.public_validation,
        "test": config.public_test,
    }
    if path := named[split]:
        return _load_local(config, path, split, ignore)
    if split == "train":
        return None
    return _load_embedded(config, split) if config.name in EMBEDDED else None


def _load_embedded(config: DataConfig, split: str) -> "Dataset":
    """Load a split of a data set that comes with the package."""
    rows = _read_shards(EMBEDDED[config.name].folder, split)
    _require_columns(config, rows.column_names, config.name)
    return rows


@lru_cache(maxsize=6)
def _read_shards(folder: Path, split: str) -> "Dataset":
    """Read the embedded shards of a split, once a process."""
    shards = sorted(folder.glob(f"{split}*.jsonl"))
    rows = [row for shard in shards for row in read_rows(shard)]
    if not rows:
        raise DataError(f"{folder}: no {split} rows there: install fedllm again")
    return _make_dataset(rows)


def _load_local(config: DataConfig, name: str, split: str, say: Say) -> "Dataset":
    """Load a file or a folder: what is used of each row, and where it stands."""
    path = Path(name).expanduser().absolute()
    read = read_file(path, config, split, say)
    names = list(dict.fromkeys(n for one in read for n in require_row(one)))
    say_unused(config, names, path, say)
    rows = [local_row(config, one, path) for one in read]
    _require_columns(config, names, path)
    return _make_dataset(rows)


def local_row(config: DataConfig, read: ReadRow, root: Path) -> Row:
    """Return what is used of a row that a file holds, with the place where it stands.

    Args:
        config: Names the columns.
        read: The row, which is one.
        root: The file, or the folder that it is in.
    """
    where = read.place
    if read.file != root:
        where = f"{read.file.relative_to(root)} {where}"
    return used_part(config, read.row or {}) | {LINE: where}


def say_unused(
    config: DataConfig, names: Iterable[str], source: object, say: Say
) -> None:
    """Say once which columns are not read."""
    unused = [name for name in names if column_of(config, name) is None]
    if unused:
        say(f"{source}: columns that are not used: {printable(comma_list(unused))}")


def is_hub_id(name: str) -> bool:
    """Return whether `data.name` names a data set of a hub."""
    return name not in EMBEDDED and name != OWN and not looks_local(name)


def _load_hub(config: DataConfig, say: Say) -> "Dataset":
    """Load a split of a hub data set.

    The hub's client caches its downloads in its usual place (HF_HOME); what `datasets`
    makes of them is kept in our own folder.
    """
    import datasets

    (name, at, revision), split = config.name.partition("@"), config.split
    if at and not _REVISION.fullmatch(revision):
        raise DataError(
            f"data.name: {config.name!r}: after @ stands a commit, a tag or a branch"
        )
    try:
        with _quiet_hub():
            rows = datasets.load_dataset(
                name,
                config.config or None,
                split=split,
                revision=revision or None,
                cache_dir=str(fedllm_home() / "datasets"),
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
            f"{BUILT_IN_DATA.name!r} ({one_line(error)})"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise DataError(f"data.name: {name!r} ({split}): {one_line(error)}") from None
    source = f"{name} ({split})"
    if len(rows) == 0:
        raise DataError(f"{source}: holds no rows")
    names = rows.column_names
    say_unused(config, names, source, say)
    used = rows.select_columns([n for n in names if column_of(config, n) is not None])
    kept = [used_part(config, row) for row in used]
    _require_columns(config, names, source)
    return _make_dataset(kept)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hide the hub client's progress bars and its log lines about retries.

    There would be a bar for each file and step, from each client; our own error reports a
    failure once.
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


def _make_dataset(rows: list[Row]) -> "Dataset":
    """Return rows as a data set; a row without a column has None in it."""
    from datasets import Dataset

    rows = [_storable(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict({n: _of_one_kind(cells) for n, cells in columns.items()})


def _storable(row: Row) -> Row:
    """Return a row whose cells a table takes, or which says why nothing is learned from it."""
    stored: Row = {}
    for name, cell in row.items():
        if isinstance(cell, list | dict):
            try:
                cell = as_cell(cell)
            except (RecursionError, TypeError, ValueError):
                cell = (
                    b""  # No text: such as a number of more digits than Python writes.
                )
        if isinstance(cell, str) and _HALF.search(cell):
            stored[UNREADABLE] = f"column {name!r} holds half a character"
        elif cell is None or isinstance(cell, (str, bool, *PLAIN)):
            stored[name] = cell
        else:
            stored[UNREADABLE] = f"column {name!r} is not text"
    return stored


def _of_one_kind(cells: list[Any]) -> list[Any]:
    """Return cells that a table takes: of one plain kind, else all as text."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if len(kinds) <= 1 and kinds <= {str, bool, float}:
        return cells
    if kinds <= {int} and all(c is None or -(2**63) <= c < 2**63 for c in cells):
        return cells
    return [None if cell is None else str(cell) for cell in cells]


def _require_columns(config: DataConfig, names: Iterable[str], source: object) -> None:
    """Check that there are columns for a question and an answer, for a text, or for two answers.

    Raises:
        DataError: There are none.
    """
    names = list(names)
    used = {column_of(config, name) for name in names}
    if config.format == "preference":
        if used >= {*PREFERENCES}:
            return
        raise DataError(
            f"{source}: dpo needs prompt, chosen, rejected (train.objective='dpo'); the "
            f"columns are {printable(comma_list(names))}"
        )
    if config.format in ("auto", "text") and config.text_column in used:
        return
    if config.format in ("auto", "messages") and used & {*MESSAGES}:
        return
    questions = used & {*question_columns(config)}
    answers = used & {*answer_columns(config)}
    if config.format in ("auto", "question-answer") and questions and answers:
        return
    key, column = "data.prompt-column", config.prompt_column
    if questions:
        key, column = "data.response-column", config.response_column
    if config.format == "text":
        key, column = "data.text-column", config.text_column
    hint = ""
    if used >= {*PREFERENCES}:
        hint = "; train.objective='dpo' learns from chosen and rejected"
    raise DataError(
        f"{source}: there is no column {column!r} ({key}); the columns are "
        f"{printable(comma_list(names))}{hint}"
    )
