"""Files of rows: every format, and one line for each bad file."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.columns import LINE
from fedllm.data.rows import load_rows
from fedllm.errors import DataError
from tests.helpers.rows import ROWS, write_json, write_jsonl


def write_csv(path: Path, rows: list[Any]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# A client's own file

WRITERS: dict[str, Callable[[Path, list[Any]], Path]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


@pytest.mark.parametrize("ending", WRITERS)
def test_each_kind_of_file_gives_the_rows_that_were_written(
    tmp_path: Path, ending: str
) -> None:
    path = WRITERS[ending](tmp_path / f"rows{ending}", ROWS)
    rows = load_rows(DataConfig(name=str(path)))
    place = "row {}" if ending in (".json", ".parquet") else "line {}"
    first = 2 if ending == ".csv" else 1
    # A cell of the second row takes two lines.
    lines = [2, 4, 5] if ending == ".csv" else [first, first + 1, first + 2]
    assert list(rows) == [
        {k: row[k] for k in ("instruction", "response")} | {LINE: place.format(line)}
        for row, line in zip(ROWS, lines, strict=True)
    ]


def test_a_folder_gives_the_rows_of_its_files_in_order_of_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    write_json(tmp_path / "a.json", ROWS[:2])
    (tmp_path / "README.txt").write_text("not data")
    rows = load_rows(DataConfig(name=str(tmp_path)))
    assert rows["response"][:] == [row["response"] for row in ROWS]
    assert rows[LINE][:] == ["a.json row 1", "a.json row 2", "b.jsonl line 1"]


def test_a_column_that_only_some_rows_have_is_kept(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "site": "blood"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load_rows(DataConfig(name=str(path)))["site"][:] == [None, "blood"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = f"\n{json.dumps(ROWS[0])}\n\n{json.dumps(ROWS[1])}\n\n"
    path.write_text(text, encoding="utf-8-sig")
    assert len(load_rows(DataConfig(name=str(path)))) == 2


Q = '{"instruction": "q", "response": "a"}\n'

BAD_FILES = {
    "empty": ("e.jsonl", "", "e.jsonl: holds no rows"),
    "only blank lines": ("e.jsonl", "\n \n", "e.jsonl: holds no rows"),
    "only a head line": ("e.csv", "instruction,response\n", "e.csv: holds no rows"),
    "not JSON": ("m.jsonl", Q + "\n{oops\n", "m.jsonl:3: is not JSON"),
    "cut short": ("m.jsonl", Q + Q[:20], "m.jsonl:2: is not JSON"),
    "not an object": ("m.jsonl", Q + "[1]\n", "m.jsonl:2: must be an object"),
    "nested": ("m.jsonl", "[" * 100_000, "m.jsonl:1: is nested too deeply"),
    "broken list": ("m.json", f"[{Q},\n\n]", "m.json:4: is not JSON"),
    "no list": ("m.json", Q, "m.json: must be a list"),
    "not a row": ("m.json", f"[{Q}, 7]", "m.json: row 2: must be an object"),
    "field missing": ("m.csv", "instruction,response\nq\n", "m.csv:2: has 1 fields"),
    "open quote": ("m.csv", 'instruction,response\nq,"a\n', "m.csv:2: "),
    "no parquet": ("m.parquet", "PAR1", "m.parquet: is not Parquet"),
    "wrong column": (
        "w.jsonl",
        '{"ask": "q", "response": "a"}\n',
        r"no column 'instruction' \(data.prompt-column\); .* ask, response",
    ),
    "wrong answer column": (
        "w.jsonl",
        '{"instruction": "q", "reply": "a"}\n',
        r"no column 'response' \(data.response-column\); .* instruction, reply",
    ),
    "another ending": ("r.txt", Q, "r.txt: must end in .jsonl, .ndjson, .json, .csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_what_is_wrong(
    tmp_path: Path, name: str
) -> None:
    file_name, text, message = BAD_FILES[name]
    (tmp_path / file_name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_rows(DataConfig(), str(tmp_path / file_name))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_not_text_raises_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,response\nq,\xff\xfe\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_rows(DataConfig(name=str(path)))


def test_a_folder_without_data_raises_an_error_with_the_known_endings(
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"no file that ends in \.jsonl, \.ndjson"):
        load_rows(DataConfig(name=str(tmp_path)))
