"""Readers of tables: delimited text in its dialects, Parquet, Arrow and Excel."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from fedllm.data.columns import Row
from fedllm.errors import DataError

Line = tuple[str, Row | str]
"""Where a row stands, such as `line 7`, and the row, or why it cannot be read."""
_DELIMITERS = (",", ";", "\t", "|")


class MalformedError(DataError):
    """A file is malformed as a whole; without the file's name.

    Args:
        text: What is wrong.
        line: The line where it shows; 0: none.
    """

    def __init__(self, text: str, line: int = 0) -> None:
        super().__init__(text)
        self.line = line


_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_delimited(
    text: str, first_choice: str, say: Callable[[str], None]
) -> Iterator[Line]:
    """Yield the rows of delimited text. The dialect goes by the first line alone.

    That may be `sep=;`, as spreadsheets write it. Else the delimiter is the one that most
    often stands in the line of the column names. A name that is there twice is the first
    column's; later ones get a number.

    Args:
        text: All of the file.
        first_choice: The delimiter of a line that has none, or several as often.
        say: Gets what is unusual.

    Raises:
        MalformedError: A quote is not closed, or closed within a cell.
    """
    # By default the module rejects a file for one cell of more than 131,072 characters.
    csv.field_size_limit(2**31 - 1)
    skipped = 0
    first = re.match("sep=(.)(?:\r\n|\n|\r)", text, re.IGNORECASE)
    if first:
        text, skipped, delimiter = text[first.end() :], 1, first[1]
    else:
        delimiter = _delimiter(text, first_choice)
    if delimiter != first_choice:
        say(f"read as separated by {_NAMES.get(delimiter, repr(delimiter))}")
    head = re.split("\r\n|\n|\r", text, maxsplit=1)[0]
    spaced = head.count(delimiter) == head.count(f"{delimiter} ") > 0
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""),
            strict=True,
            delimiter=delimiter,
            # With a blank after each delimiter a quote would not begin its cell.
            skipinitialspace=spaced,
        )
    except (TypeError, ValueError):  # `sep="`
        raise MalformedError(f"{delimiter!r} separates no columns", 1) from None
    try:
        names = _unique(next(reader, []), say)
        for cells in reader:
            if cells:
                yield f"line {reader.line_num + skipped}", _row(names, cells)
    except csv.Error as error:
        raise MalformedError(str(error), reader.line_num + skipped) from None


def _delimiter(text: str, first_choice: str) -> str:
    head = re.split("\r\n|\n|\r", text, maxsplit=1)[0]
    bare = re.sub('"[^"]*"', "", head)
    choices = sorted(_DELIMITERS, key=lambda delimiter: delimiter != first_choice)
    return max(choices, key=bare.count)


def _unique(names: list[str], say: Callable[[str], None]) -> list[str]:
    """Return column names of which none is there twice."""
    unique: list[str] = []
    for name in names:
        number, chosen = 1, name
        while chosen in unique:
            number += 1
            chosen = f"{name}.{number}"
        if number > 1 and name.strip():
            say(f"the column {name!r} is there twice; the first is taken")
        unique.append(chosen)
    return unique


def _row(names: list[str], cells: list[str]) -> Row | str:
    while len(cells) > len(names) and not cells[-1]:
        cells = cells[:-1]
    if len(cells) != len(names):
        return f"has {len(cells)} fields, the first line has {len(names)}"
    return dict(zip(names, cells, strict=True))


def read_parquet(data: bytes, is_used: Callable[[str], bool]) -> Iterator[Line]:
    """Yield the rows of Parquet: of unused columns the name alone, without a value.

    Raises:
        MalformedError: It is no Parquet.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = list(file.schema_arrow.names)
        table = file.read(columns=[name for name in names if is_used(name)])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise MalformedError(f"is not Parquet: {_one_line(error)}") from None
    yield from _table_rows(table, names, file.metadata.num_rows)


def read_arrow(data: bytes, is_used: Callable[[str], bool]) -> Iterator[Line]:
    """Yield the rows of an Arrow stream or file, as `save_to_disk` writes them.

    Raises:
        MalformedError: It is neither.
    """
    import pyarrow

    try:
        opens = (
            pyarrow.ipc.open_file if data[:6] == b"ARROW1" else pyarrow.ipc.open_stream
        )
        table = opens(pyarrow.py_buffer(data)).read_all()
        # Bytes that only look like a table must not crash what reads its cells.
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise MalformedError(f"is not Arrow: {_one_line(error)}") from None
    names = list(table.column_names)
    used = table.select([i for i, name in enumerate(names) if is_used(name)])
    yield from _table_rows(used, names, table.num_rows)


def _table_rows(table: Any, names: list[str], count: int) -> Iterator[Line]:
    """Yield each row, or why it has none: a date out of Python's range, text that is none."""
    without: Row = dict.fromkeys(names)
    for index in range(count):
        row: Row | str
        try:
            cells = table.slice(index, 1).to_pylist()[0] if table.num_columns else {}
            row = without | {name: _without_none(cell) for name, cell in cells.items()}
        # A date out of range, a type that pyarrow has no value of, bytes that are no text.
        except (ArithmeticError, NotImplementedError, ValueError) as error:
            row = f"cannot be read: {_one_line(error)}"
        yield f"row {index + 1}", row


def _without_none(value: Any) -> Any:
    """Return a nested value without the keys that a table adds to make all rows alike."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def read_excel(data: bytes) -> Iterator[Line]:
    """Yield the rows of an Excel workbook's first sheet.

    Raises:
        MalformedError: The library is missing, or it is no workbook.
    """
    if find_spec("openpyxl") is None:
        raise MalformedError(
            'needs a library to be read: pip install "fedllm[excel]", or save the sheet as .csv'
        )
    import openpyxl  # type: ignore[import-untyped, import-not-found, unused-ignore]

    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        rows = [list(row) for row in book.worksheets[0].iter_rows(values_only=True)]
    except Exception as error:  # noqa: BLE001 - a foreign file, in another's parser
        raise MalformedError(f"is not Excel: {_one_line(error)}") from None
    if not rows:
        return
    names = _unique(["" if n is None else str(n) for n in rows[0]], lambda _: None)
    for number, cells in enumerate(rows[1:], start=2):
        if any(cell is not None for cell in cells):
            yield f"line {number}", dict(zip(names, cells, strict=False))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
