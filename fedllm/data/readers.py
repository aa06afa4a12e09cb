"""Readers of a client's own file: .jsonl, .json, .csv or .parquet.

Nothing is cached on disk. An error names the line that is malformed.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedllm.errors import DataError

Row = dict[str, Any]
"""One row of a data set: column -> cell."""
_R = TypeVar("_R", bound=Row | None)
Readers = Mapping[str, Callable[[Path], Iterator[_R]]]
"""A reader for each ending of a file's name."""


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
    return _read_rows(path, _READERS)


def read_records(path: Path) -> list[Row | None]:
    """Read as `read_rows`, but count a malformed row as one, so that none hides the others.

    Returns:
        The rows; None for one that cannot be read: a line of .jsonl that holds no object,
        an element of .json that is none, a line of .csv with too few or too many fields, a
        row of .parquet with a date or a text that Python does not read.

    Raises:
        DataError: Missing, empty, of an unknown kind, or malformed as a whole: .json that
            is no list, .csv with a quote that is never closed, .parquet that is none.
    """
    return _read_rows(path, _RECORD_READERS)


def _read_rows(path: Path, readers: "Readers[_R]") -> list[_R]:
    """Read a file, or the files of a folder, by the readers of their endings."""
    files = [path]
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in _READERS)
        rows = [row for file in files for row in _read_file(file, readers)]
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


def _read_file(path: Path, readers: "Readers[_R]") -> Iterator[_R]:
    """Yield the rows of a file.

    Raises:
        DataError: It cannot be read, or is malformed (the line is named).
    """
    reader = readers.get(path.suffix.lower())
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
    values = _read_list(path.read_text(encoding="utf-8-sig"), path)
    for number, value in enumerate(values, start=1):
        yield _read_object(value, f"{path}: row {number}")


def _read_jsonl_records(path: Path) -> Iterator[Row | None]:
    # In bytes: a line that is not UTF-8 is one broken row.
    for line in path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines():
        if line.strip():
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else None


def _read_json_records(path: Path) -> Iterator[Row | None]:
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for value in _read_list(text, path):
        yield value if isinstance(value, dict) else None


def _read_list(text: str, path: Path) -> list[Any]:
    values = _parse(text, str(path))
    if not isinstance(values, list):
        raise DataError(
            f"{path}: must be a list of objects (one object a line goes into .jsonl)"
        )
    return values


def _read_csv(path: Path) -> Iterator[Row]:
    for number, names, cells in _csv_lines(path, "strict"):
        if len(cells) != len(names):
            raise DataError(
                f"{path}:{number}: has {len(cells)} fields, the first line has {len(names)}"
            )
        yield dict(zip(names, cells, strict=True))


def _read_csv_records(path: Path) -> Iterator[Row | None]:
    for _, names, cells in _csv_lines(path, "surrogateescape"):
        fits = len(cells) == len(names)
        yield dict(zip(names, cells, strict=True)) if fits else None


def _csv_lines(path: Path, errors: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield each row's last line number, the names of the columns, and its cells."""
    # By default the module rejects a file for one cell of more than 131,072 characters.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors=errors, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if cells:
                    yield reader.line_num, names, cells
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    for number, row in enumerate(_parquet_rows(path), start=1):
        if isinstance(row, Exception):
            raise DataError(f"{path}: row {number}: cannot be read: {one_line(row)}")
        yield row


def _read_parquet_records(path: Path) -> Iterator[Row | None]:
    for row in _parquet_rows(path):
        yield None if isinstance(row, Exception) else row


def _parquet_rows(path: Path) -> Iterator[Row | Exception]:
    """Yield each row, or why it has none: a date out of Python's range, text that is none."""
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        table = parquet.ParquetFile(path).read()
    except (NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: is not Parquet: {one_line(error)}") from None
    for index in range(table.num_rows):
        try:
            yield table.slice(index, 1).to_pylist()[0]
        # A date out of range, a type that pyarrow has no value of, bytes that are no text.
        except (ArithmeticError, NotImplementedError, ValueError) as error:
            yield error


_READERS: Readers[Row] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_RECORD_READERS: Readers[Row | None] = {
    ".jsonl": _read_jsonl_records,
    ".json": _read_json_records,
    ".csv": _read_csv_records,
    ".parquet": _read_parquet_records,
}


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise DataError(f"{at}: is not JSON: {error.msg}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: cannot be read: {one_line(error)}") from None
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply") from None


def _read_object(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object (got {value!r:.80})")
    return value
