"""Readers of a client's own file: .jsonl, .json, .csv or .parquet.

Nothing is cached on disk. An error names the line that is malformed.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedllm.errors import DataError

Row = dict[str, Any]
"""One row of a data set: column -> cell."""


def looks_local(name: str) -> bool:
    """Return whether a name is a path and not a hub id such as `squad` or `owner/name`."""
    path = Path(name).expanduser()
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or path.suffix.lower() in _READERS
        or path.exists()
    )


def read_rows(path: Path) -> list[Row]:
    """Read a file, or all files with known endings of a folder in order of name.

    Raises:
        DataError: Missing, empty, malformed (the line is named), or of an unknown kind.
    """
    files = [path]
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in _READERS)
        rows = [row for file in files for row in _read_file(file)]
    except OSError as error:
        source, cause = error.filename or path, error.strerror or one_line(error)
        raise DataError(f"{source}: cannot be read: {cause}") from None
    if not files:
        raise DataError(f"{path}: holds no file that ends in {comma_list(_READERS)}")
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def comma_list(names: Iterable[str]) -> str:
    """Return names in one line of an error message."""
    return ", ".join(names)


def one_line(error: BaseException) -> str:
    """Return another library's message in one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]


def _read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        DataError: It cannot be read, or is malformed (the line is named).
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: must end in {comma_list(_READERS)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {one_line(error)}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    # -sig skips the mark that some editors put at the start of a file.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _read_object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    values = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(values, list):
        raise DataError(
            f"{path}: must be a list of objects (one object a line goes into .jsonl)"
        )
    for number, value in enumerate(values, start=1):
        yield _read_object(value, f"{path}: row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if len(cells) not in (0, len(names)):
                    raise DataError(
                        f"{path}:{reader.line_num}: has {len(cells)} fields, the first "
                        f"line has {len(names)}"
                    )
                if cells:
                    yield dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        yield from parquet.ParquetFile(path).read().to_pylist()
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: is not Parquet: {one_line(error)}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise DataError(f"{at}: is not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply") from None


def _read_object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object (got {value!r:.80})")
    return value
