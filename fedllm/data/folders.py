"""Folders of files: which of them a data set's split is made of.

The names are read as the Hugging Face hub reads them: `train-00000-of-00002.parquet`,
`data/test.jsonl`, `validation/part.csv`, what `save_to_disk` writes, and what a README.md
declares. Rows of a split that
was not asked for are never trained on.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedllm.config import DataConfig
from fedllm.data.declared_folders import declared_patterns, matching
from fedllm.errors import DataError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
# What the hub, `datasets` and Flower put beside the rows.
_NO_ROWS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}

Say = Callable[[str], None]
"""Takes a line for the log of whom the rows belong to."""


def files_of(
    folder: Path,
    config: DataConfig,
    split: str,
    is_data: Callable[[Path], bool],
    say: Say,
) -> list[Path]:
    """Return the files of a split, in order of name; all files if none names a split.

    Args:
        folder: Exists.
        config: Gives `data.config`.
        split: The split, such as `train`.
        is_data: Whether a file's ending is known.
        say: Gets a line of what is not read.

    Raises:
        DataError: There is no such split or config, or several and none is named.
        OSError: The folder cannot be read.
    """
    declared = declared_patterns(folder, config.config)
    if declared is not None:
        return _declared_files(folder, declared, split, is_data, say)
    if config.config:
        folder = _subfolder(folder, config.config, "data.config")
    if (folder / "dataset_dict.json").is_file():
        folder = _subfolder(folder, split, "data.split")
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    found = _data_files(folder, is_data)
    by_split: dict[str | None, list[Path]] = {}
    for path in found:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if by_split.keys() <= {None}:
        return found
    # A file that names no split, beside one that does, is for training.
    chosen = by_split.pop(split, [])
    if split == "train":
        chosen = sorted(chosen + by_split.pop(None, []))
    left = ", ".join(sorted(str(name) for name in by_split if name)) or "none"
    if not chosen:
        raise DataError(
            f"{folder}: holds no files of the split {split!r}; the splits there are {left}: "
            "set data.split, or name a file"
        )
    if by_split:
        say(f"{folder}: the split {split!r} is read, and of others nothing ({left})")
    return chosen


def _declared_files(
    folder: Path,
    declared: Mapping[str, Sequence[str]],
    split: str,
    is_data: Callable[[Path], bool],
    say: Say,
) -> list[Path]:
    """Return the files that the folder's own card declares as a split.

    Raises:
        DataError: It declares no such split, or no file of it is there.
    """
    splits = ", ".join(sorted(declared))
    chosen = matching(folder, declared.get(split, ()), _data_files(folder, is_data))
    if not chosen:
        raise DataError(
            f"{folder}: its README.md declares no file of the split {split!r} that is there "
            f"(splits: {splits}): set data.split, or name a file"
        )
    if len(declared) > 1:
        say(
            f"{folder}: the split {split!r} is read, of {splits}, as README.md declares"
        )
    return chosen


def _data_files(folder: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """Return the files at any depth that may hold rows, in order of name."""
    return sorted(
        path for path in _visible(folder) if path.name not in _NO_ROWS and is_data(path)
    )


def _visible(folder: Path) -> Iterable[Path]:
    """Yield files at any depth, without those that systems hide, as a Mac's `._` files."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if not hidden and path.is_file():
            yield path


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else a folder's, stands for."""
    shard = _SHARD.fullmatch(path.name.partition(".")[0])
    if shard:
        return shard[1]
    for part in (path.name.partition(".")[0], *reversed(path.parent.parts)):
        words = re.split("[^a-z]+", part.lower())
        for split, names in _SPLITS.items():
            if any(name in words for name in names):
                return split
    return None


def _subfolder(folder: Path, name: str, key: str) -> Path:
    """Return a folder in a folder.

    Raises:
        DataError: There is none of this name.
    """
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
    )
    if name not in names:
        listed = ", ".join(names) or "none"
        raise DataError(f"{folder}: {key}: has no folder {name!r} (there: {listed})")
    return folder / name


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that `save_to_disk` wrote.

    Raises:
        DataError: Its list of them is none.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            f"{folder}: state.json names no files: save the data set to disk again"
        ) from None
    # Nothing outside of it: the list may have come with rows from elsewhere.
    files = [folder / Path(name).name for name in names]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: is missing: save the data set to disk again")
    return files
