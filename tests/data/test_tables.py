"""Delimited text in its dialects, and tables of which only some columns are read."""

import bz2
import gzip
import json
import lzma
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedllm.config import DataConfig
from fedllm.data.columns import LINE
from fedllm.data.readers import read_rows
from fedllm.data.rows import load_rows
from fedllm.errors import DataError

GOOD = {"instruction": "What is a femur?", "response": "The bone; of, the thigh."}
LINE_OF_JSON = json.dumps(GOOD) + "\n"


def loaded(path: Path, content: bytes | str, **settings: str) -> tuple[list, list[str]]:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
    said: list[str] = []
    rows = load_rows(DataConfig(name=str(path), **settings), say=said.append)
    return rows.remove_columns(LINE).to_list(), said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", 'instruction,response\n{q},"{a}"\n', ""),
        ("a.csv", 'instruction;response\r\n{q};"{a}"\r\n', "separated by semicolons"),
        ("a.csv", 'sep=;\r\ninstruction;response\r\n{q};"{a}"\r\n', "semicolons"),
        ("a.csv", "sep=^\ninstruction^response\n{q}^{a}\n", "separated by '^'"),
        ("a.csv", "instruction\tresponse\n{q}\t{a}\n", "separated by tabs"),
        ("a.csv", "instruction|response\n{q}|{a}\n", "separated by bars"),
        ("a.tsv", "instruction\tresponse\n{q}\t{a}\n", ""),
        ("a.tsv", 'instruction,response\n{q},"{a}"\n', "separated by commas"),
        ("a.csv", 'Instruction, Response\n{q}, "{a}"\n', ""),
        ("a.csv", 'response,"instruction"\n"{a}",{q},,\n', ""),
        (
            "a.csv",
            'instruction,response,response\n{q},"{a}",\n',
            "the column 'response' is there twice; the first is taken",
        ),
    ],
)
def test_a_dialect_goes_by_the_first_line(tmp_path, name, text, words):
    content = text.format(q=GOOD["instruction"], a=GOOD["response"])
    rows, said = loaded(tmp_path / name, content)
    assert rows == [GOOD]
    assert words in "".join(said) and bool(said) == bool(words)


def test_the_line_of_an_error_counts_the_line_of_the_separator(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match=r"a.csv:4: has 1 fields, the first line has 2"):
        loaded(path, "sep=;\ninstruction;response\nq;a\nq\n")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "gb18030", "utf-8-sig"])
def test_an_encoding_is_taken_by_option(tmp_path, encoding):
    text = "instruction,response\nWhat is café?,é\n"
    rows, _ = loaded(tmp_path / "a.csv", text.encode(encoding), encoding=encoding)
    assert rows == [{"instruction": "What is café?", "response": "é"}]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_at_the_beginning_names_the_encoding(tmp_path, encoding):
    content = LINE_OF_JSON.encode(encoding)
    assert loaded(tmp_path / "a.jsonl", content) == ([GOOD], [])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_bytes_of_another_encoding_are_one_line_with_the_remedy(tmp_path, name):
    text = {
        "a.csv": "instruction,response\nq,é\n",
        "a.jsonl": '{"instruction": "q", "response": "é"}\n',
        "a.json": '{"instruction": "q"}\n{"instruction": "é"}\n',
    }[name]
    where = 1 if name == "a.jsonl" else 2
    with pytest.raises(DataError, match=f"{name}:{where}: is not UTF-8.*data.encoding"):
        loaded(tmp_path / name, text.encode("latin-1"))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_compressed_files_are_read_by_their_name(tmp_path, ending, compress):
    content = compress(LINE_OF_JSON.encode())
    for name in (f"a.jsonl{ending}", f"a.ndjson{ending}"):
        assert loaded(tmp_path / name, content) == ([GOOD], [])
    with pytest.raises(DataError, match=f"a.jsonl{ending}: is not {ending[1:]}: "):
        loaded(tmp_path / f"a.jsonl{ending}", LINE_OF_JSON)


def test_one_object_a_line_may_stand_in_a_json_file(tmp_path):
    rows, said = loaded(tmp_path / "a.json", LINE_OF_JSON * 2)
    assert rows == [GOOD] * 2
    assert said == [f"{tmp_path}/a.json: read as one object a line"]


META = [1, "A-2", {"page": 3}, None, 10**40, [1], 2.5]


def test_columns_that_are_not_used_are_named_and_do_no_harm(tmp_path):
    lines = [json.dumps(GOOD | {"id": value, "site": "x"}) for value in META]
    rows, said = loaded(tmp_path / "a.jsonl", "\n".join(lines))
    assert rows == [GOOD | {"site": "x"}] * len(META)
    assert said == [f"{tmp_path}/a.jsonl: columns that are not used: id"]


def test_a_column_of_parquet_that_is_not_used_is_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = {k: [v] for k, v in GOOD.items()} | {"day": pa.array([2**30], pa.date32())}
    parquet.write_table(pa.table(table), path)
    (row,) = read_rows(path)
    assert row == GOOD | {"day": None}


def test_turns_and_tool_calls_of_a_table_keep_their_own_keys_alone(tmp_path):
    calls = [
        {"function": {"name": "f", "arguments": arguments}}
        for arguments in ({"city": "Bonn"}, {"day": 3})
    ]
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    parquet.write_table(
        pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet"
    )
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row["messages"][1] == turns[1]
    assert row["messages"][0] == turns[0]


def test_half_a_character_makes_its_row_unusable_and_no_other(tmp_path):
    bad = '{"instruction": "q", "response": "cut \\ud83d"}\n'
    rows, _ = loaded(tmp_path / "a.jsonl", LINE_OF_JSON + bad)
    assert rows[0]["response"] == GOOD["response"] and rows[1]["response"] is None


def test_a_workbook_without_the_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("fedllm.data.tables.find_spec", lambda name: None)
    with pytest.raises(DataError, match="a.xlsx: needs a library .* save the sheet as"):
        loaded(tmp_path / "a.xlsx", b"PK")


def workbook(folder: Path, *rows: tuple[object, ...]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.create_sheet().append(["another", "sheet"])
    book.save(folder / "a.xlsx")
    return folder / "a.xlsx"


def test_a_workbook_is_read_by_its_first_sheet(tmp_path):
    """Numbers and days are text, a blank line is none, and cells may hold line breaks."""
    path = workbook(
        tmp_path,
        ("Instruction", "response", "note"),
        ("Wann?", datetime(2024, 5, 1), 1),
        (None, None, None),
        ("Wie viele?\nGenau?", 12, None),
    )

    rows, said = loaded(path, path.read_bytes())

    assert [row["instruction"] for row in rows] == ["Wann?", "Wie viele?\nGenau?"]
    assert [row["response"] for row in rows] == ["2024-05-01 00:00:00", "12"]
    assert said == [f"{path}: columns that are not used: note"]


def test_a_row_of_a_workbook_is_named_by_its_line(tmp_path):
    path = workbook(tmp_path, ("instruction", "response"), (None, None), ("q", "a"))

    rows = load_rows(DataConfig(name=str(path)))

    assert rows[LINE] == ["line 3"]


def test_a_workbook_without_rows_or_that_is_none_is_one_line(tmp_path):
    path = workbook(tmp_path)
    with pytest.raises(DataError, match=r"a.xlsx: holds no rows"):
        loaded(path, path.read_bytes())
    for content in (b"", b"PK\3\4", path.read_bytes()[:200]):
        with pytest.raises(DataError, match=r"a.xlsx: (is not Excel|holds no rows)"):
            loaded(path, content)


def test_bytes_that_are_no_arrow_are_one_line(tmp_path):
    for content in (b"", b"ARROW1xx", b"\0" * 64):
        with pytest.raises(DataError, match=r"a.arrow: (is not Arrow|holds no rows)"):
            loaded(tmp_path / "a.arrow", content)
