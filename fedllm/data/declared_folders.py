"""Folders whose README.md declares configs and splits, as a data set's card on the hub does.

---
configs:
- config_name: questions
  data_files:
  - split: train
    path: questions/part-*.csv
---
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fedllm.errors import DataError

_CARD = "README.md"


def declared_patterns(folder: Path, config: str) -> dict[str, list[str]] | None:
    """Return split -> patterns of paths in the folder; None if its card declares none.

    Args:
        folder: Exists.
        config: Name of a config; empty: the one that is the default, or the only one.

    Raises:
        DataError: The card cannot be read, has no config of that name, or several and
            none is the default.
        OSError: The card cannot be read.
    """
    configs = _configs(folder / _CARD)
    if not configs:
        return None
    names = [str(one.get("config_name", "default")) for one in configs]
    chosen = [one for one, name in zip(configs, names, strict=True) if name == config]
    if not config:
        defaults = [
            one
            for one, name in zip(configs, names, strict=True)
            if one.get("default") is True or name == "default"
        ]
        chosen = configs if len(configs) == 1 else defaults
    if len(chosen) != 1:
        raise DataError(
            f"{folder / _CARD}: data.config: must name one of its configs: "
            f"{', '.join(names)} (got {config!r})"
        )
    return _by_split(chosen[0], folder / _CARD)


def _configs(card: Path) -> list[Mapping[str, Any]]:
    """Return the configs of a card, if any.

    Raises:
        DataError: Its front matter cannot be read.
    """
    if not card.is_file():
        return []
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(card) or {}).get("configs", [])
    except Exception as error:  # noqa: BLE001 - YAML from elsewhere
        first = (str(error).splitlines() or [""])[0]
        raise DataError(f"{card}: its front matter cannot be read: {first}") from None
    declared = found if isinstance(found, list) else []
    return [one for one in declared if isinstance(one, Mapping)]


def _by_split(config: Mapping[str, Any], card: Path) -> dict[str, list[str]]:
    """Return split -> patterns of one config.

    Raises:
        DataError: A path leads out of the folder, or is none.
    """
    found: dict[str, list[str]] = {}
    start = str(config.get("data_dir", ""))
    declared = config.get("data_files", "**" if start else [])
    if isinstance(declared, Mapping):
        declared = [{"split": s, "path": path} for s, path in declared.items()]
    for entry in _as_list(declared):
        split, path = "train", entry
        if isinstance(entry, Mapping):
            split, path = str(entry.get("split", "train")), entry.get("path")
        for pattern in _as_list(path):
            whole = PurePosixPath(start, str(pattern))
            # The card may have come with rows from elsewhere.
            if whole.is_absolute() or ".." in whole.parts:
                raise DataError(f"{card}: {pattern!r} leads out of the folder")
            found.setdefault(split, []).append(str(whole))
    if not found:
        raise DataError(f"{card}: a config of it names no files")
    return found


def _as_list(value: object) -> list[Any]:
    if isinstance(value, str):
        return [value]
    return value if isinstance(value, list) else []


def matching(
    folder: Path, patterns: Sequence[str], known: Sequence[Path]
) -> list[Path]:
    """Return the files of a folder that one of its patterns takes.

    Args:
        folder: Exists.
        patterns: As `declared_patterns` returns them.
        known: The folder's files that can be read.

    Raises:
        DataError: A pattern is none.
    """
    try:
        taken = {path for pattern in patterns for path in folder.glob(pattern)}
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"{folder / _CARD}: a path of its configs: {error}") from None
    # A pattern that is a folder takes all in it.
    return [
        path for path in known if path in taken or not taken.isdisjoint(path.parents)
    ]
