"""Rows: load those that clients train on, and those declared public.

Everything stays in memory: no cache of a client's rows is left on its disk. `datasets`
takes a second to import and `flwr_datasets` another (it imports matplotlib), so both are
imported in the functions that use them.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedllm.config import DataConfig, fedllm_home
from fedllm.data.embedded import BUILT_IN_DATA, EMBEDDED
from fedllm.data.prompts import MESSAGES, to_prompt_completion
from fedllm.data.readers import Row, comma_list, looks_local, one_line, read_rows
from fedllm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_COMMIT = re.compile("[0-9a-f]{40}")


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
    if config.name in EMBEDDED:
        return _load_embedded(config, "train")
    if looks_local(config.name):
        return _load_local(config, config.name)
    return _load_hub(config)


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
        return _load_local(config, path)
    if split == "train":
        return None
    return _load_embedded(config, split) if config.name in EMBEDDED else None


def _load_embedded(config: DataConfig, split: str) -> "Dataset":
    """Load a split of a data set that comes with the package."""
    rows = _read_shards(EMBEDDED[config.name].folder, split)
    _check_columns(config, rows.column_names, config.name)
    return rows


@lru_cache(maxsize=3)
def _read_shards(folder: Path, split: str) -> "Dataset":
    """Read the embedded shards of a split, once a process."""
    shards = sorted(folder.glob(f"{split}*.jsonl"))
    rows = [row for shard in shards for row in read_rows(shard)]
    if not rows:
        raise DataError(f"{folder}: no {split} rows there: install fedllm again")
    return _make_dataset(rows, folder)


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


def is_hub_id(name: str) -> bool:
    """Return whether `data.name` names a data set of a hub."""
    return name not in EMBEDDED and not looks_local(name)


def _load_hub(config: DataConfig) -> "Dataset":
    """Load a split of a hub data set.

    The hub's client caches its downloads in its usual place (HF_HOME); what `datasets`
    makes of them is kept in our own folder.
    """
    import datasets

    (name, _, commit), split = config.name.partition("@"), config.split
    if commit and not _COMMIT.fullmatch(commit):
        raise DataError(
            f"data.name: {config.name!r}: a hub id is pinned by @ and a commit of 40 "
            "hexadecimal digits"
        )
    try:
        with _quiet_hub():
            rows = datasets.load_dataset(
                name,
                split=split,
                revision=commit or None,
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
    _check_columns(config, rows.column_names, source)
    if len(rows) == 0:
        raise DataError(f"{source}: holds no rows")
    return rows


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


def _make_dataset(rows: list[Row], source: Path) -> "Dataset":
    """Return rows as a data set; a row without a column has None in it."""
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [r.get(name) for r in rows] for name in names})
    except (NotImplementedError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{source}: a column mixes kinds of values: {one_line(error)}"
        ) from None


def _check_columns(config: DataConfig, names: list[str], source: object) -> None:
    """Check that the columns of questions and answers exist."""
    if MESSAGES in names:
        return
    required = {
        "data.prompt-column": config.prompt_column,
        "data.response-column": config.response_column,
    }
    for key, column in required.items():
        if column not in names:
            raise DataError(
                f"{source}: there is no column {column!r} ({key}); the columns are "
                f"{comma_list(names)}"
            )
