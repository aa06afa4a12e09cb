"""Readers of a client's own file or folder. Nothing is cached on disk.

An error names the line that is malformed. What a reader takes a file for, such as its
delimiter, goes by the file's name and first line, never by what rows hold.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.columns import Row, column_of
from fedllm.data.folders import Say, files_of
from fedllm.data.tables import (
    Line,
    MalformedError,
    read_arrow,
    read_delimited,
    read_excel,
    read_parquet,
)
from fedllm.errors import DataError

_DEFAULT = DataConfig()
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What Python makes of bytes that are no text in the encoding.
_NO_TEXT = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class ReadRow:
    """One row of a file.

    Attributes:
        file: The file.
        place: Where it is there, as the file's owner counts: `line 7`, or `row 7`.
        row: Its cells; None if it cannot be read.
        reason: Why it cannot.
    """

    file: Path
    place: str
    row: Row | None
    reason: str = ""


def ignore(line: str) -> None:
    """Take a line for nobody's log."""


def looks_local(name: str) -> bool:
    """Return whether a name is a path and not a hub id such as `squad` or `owner/name`."""
    path = Path(name).expanduser()
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or _ending(path) in _READERS
        or path.exists()
    )


def read_file(
    path: Path, config: DataConfig = _DEFAULT, split: str = "", say: Say = ignore
) -> list[ReadRow]:
    """Read a file, or the files of a folder that are of a split.

    Args:
        path: File or folder.
        config: Gives encoding and `data.config`.
        split: Of a folder whose files name splits; empty: that of the config.
        say: Gets a line of what a reader takes the file for, if that is unusual.

    Returns:
        All rows, also those that cannot be read: a line of .jsonl that holds no object, an
        element of .json that is none, a line of .csv with too few or too many fields, a
        row of .parquet with a date or a text that Python does not read.

    Raises:
        DataError: Missing, empty, of an unknown kind, or malformed as a whole: .json that
            is no list, .csv with a quote that is never closed, .parquet that is none.
    """
    try:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        files = [path]
        if path.is_dir():
            files = files_of(path, config, split or config.split, _is_data, say)
        if not files:
            raise DataError(
                f"{path}: holds no file that ends in {comma_list(_READERS)}"
            )
        rows = [row for file in files for row in _read(file, config, say)]
    except OSError as error:
        source, cause = error.filename or path, error.strerror or one_line(error)
        raise DataError(f"{source}: cannot be read: {cause}") from None
    except ValueError as error:  # a path with a NUL in it
        raise DataError(f"{path!r}: is no path: {one_line(error)}") from None
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_rows(
    path: Path, config: DataConfig = _DEFAULT, split: str = "", say: Say = ignore
) -> list[Row]:
    """Read as `read_file`, where every row must be one.

    Raises:
        DataError: As there; or a row is malformed (the line is named).
    """
    rows = read_file(path, config, split, say)
    return [require_row(row) for row in rows]


def require_row(read: ReadRow) -> Row:
    """Return the cells of a row.

    Raises:
        DataError: It is malformed.
    """
    if read.row is None:
        line = read.place.removeprefix("line ")
        where = f"{read.file}:{line}" if line != read.place else f"{read.file}: {line}"
        raise DataError(f"{where}: {read.reason}")
    return read.row


def read_records(
    path: Path, config: DataConfig = _DEFAULT, say: Say = ignore
) -> list[Row | None]:
    """Read as `read_file`: None for a row that cannot be read, so that none hides the others.

    Raises:
        DataError: As there.
    """
    return [read.row for read in read_file(path, config, say=say)]


def comma_list(names: Iterable[str]) -> str:
    """Return names in one line of an error message."""
    return ", ".join(names)


def one_line(error: BaseException) -> str:
    """Return another library's message in one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]


def _ending(path: Path) -> str:
    """Return what a file's name ends in, without the ending of a compression."""
    name = path.name.lower()
    for compressed in _COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _is_data(path: Path) -> bool:
    return _ending(path) in _READERS


def _read(path: Path, config: DataConfig, say: Say) -> Iterator[ReadRow]:
    """Yield the rows of a file.

    Raises:
        DataError: It cannot be read.
    """
    reader = _READERS.get(_ending(path))
    if reader is None:
        raise DataError(f"{path}: must end in {comma_list(_READERS)}")
    try:
        data = _uncompressed(path)
        for place, row in reader(data, config, lambda line: say(f"{path}: {line}")):
            if isinstance(row, str):
                yield ReadRow(path, place, None, row)
            else:
                yield ReadRow(path, place, row)
    except MalformedError as error:
        line = f":{error.line}" if error.line else ""
        raise DataError(f"{path}{line}: {error}") from None


def _uncompressed(path: Path) -> bytes:
    """Return the bytes of a file, whatever compression its name states.

    Raises:
        MalformedError: It is not so compressed.
    """
    data = path.read_bytes()
    ending = path.suffix.lower()
    try:
        if ending == ".gz":
            return gzip.decompress(data)
        if ending == ".bz2":
            return bz2.decompress(data)
        if ending == ".xz":
            return lzma.decompress(data)
        if ending == ".zst":
            import pyarrow  # type: ignore[import-untyped]

            with pyarrow.CompressedInputStream(
                pyarrow.BufferReader(data), "zstd"
            ) as file:
                return bytes(file.read())
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise MalformedError(f"is not {ending[1:]}: {one_line(error)}") from None
    return data


def _decoded(data: bytes, encoding: str) -> str:
    """Return bytes as text. What is none is marked, so that it costs its own row alone."""
    if not encoding:
        encoding = "utf-8"
        for mark, name in _MARKS:
            if data.startswith(mark):
                data, encoding = data[len(mark) :], name
                break
    wide = encoding.startswith(("utf-16", "utf-32"))
    try:
        return data.decode(encoding, "surrogatepass" if wide else "surrogateescape")
    except UnicodeError:
        return data.decode(encoding, "replace")


def _no_text(config: DataConfig) -> str:
    name = config.encoding or "UTF-8"
    return f"is not {name} text: data.encoding names another, such as 'cp1252'"


def _read_jsonl(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return _json_lines(_decoded(data, config.encoding), config)


def _json_lines(text: str, config: DataConfig) -> Iterator[Line]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield f"line {number}", _json_object(line, config)


def _json_object(text: str, config: DataConfig) -> Row | str:
    """Return the object that a line is, or why it is none."""
    if _NO_TEXT.search(text):
        return _no_text(config)
    try:
        return _as_object(_parse(text))
    except MalformedError as error:
        return str(error)


def _read_json(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    text = _decoded(data, config.encoding)
    try:
        values = _parse(text)
    except MalformedError:
        # Many programs write one object a line into a file of this name.
        first = text.lstrip().partition("\n")[0]
        if isinstance(_json_object(first, config), str):
            raise
        say("read as one object a line")
        yield from _json_lines(text, config)
        return
    if not isinstance(values, list):
        raise MalformedError(
            "must be a list of objects (one object a line goes into .jsonl)"
        )
    for number, value in enumerate(values, start=1):
        yield f"row {number}", _as_object(value)


def _read_csv(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return _checked(read_delimited(_decoded(data, config.encoding), ",", say), config)


def _read_tsv(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return _checked(read_delimited(_decoded(data, config.encoding), "\t", say), config)


def _checked(lines: Iterator[Line], config: DataConfig) -> Iterator[Line]:
    """Yield rows of which those that hold no text are none."""
    for place, row in lines:
        is_text = isinstance(row, str) or not any(map(_NO_TEXT.search, row.values()))
        yield place, row if is_text else _no_text(config)


def _read_parquet(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return read_parquet(data, lambda name: column_of(config, name) is not None)


def _read_arrow(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return read_arrow(data, lambda name: column_of(config, name) is not None)


def _read_excel(data: bytes, config: DataConfig, say: Say) -> Iterator[Line]:
    return read_excel(data)


_READERS: dict[str, Callable[[bytes, DataConfig, Say], Iterator[Line]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".xlsx": _read_excel,
}


def _parse(text: str) -> Any:
    """Return what JSON text holds.

    Raises:
        MalformedError: It is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno if "\n" in text.strip() else 0
        raise MalformedError(f"is not JSON: {error.msg}", line) from None
    except ValueError as error:  # a number of more digits than Python reads
        raise MalformedError(f"cannot be read: {one_line(error)}") from None
    except RecursionError:
        raise MalformedError("is nested too deeply") from None


def _as_object(value: object) -> Row | str:
    return value if isinstance(value, dict) else "must be an object"
