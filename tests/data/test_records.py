"""Every row of a client's file is a record, whatever it holds."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedllm.config import DataConfig
from fedllm.data import tokens
from fedllm.data.columns import LINE
from fedllm.data.readers import read_rows
from fedllm.data.records import (
    load_records,
    own_records,
    require_person_column,
)
from fedllm.data.tokens import tokenize
from fedllm.errors import DataError
from fedllm.models.loading import load_tokenizer

GOOD = {"instruction": "What is a vaccine?", "response": "A preparation."}
BROKEN = [
    b"{",
    b"[1]",
    b"7",
    b"null",
    b'{"instruction": "\xff", "response": "a"}',
    b'{"n": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
]


def rows_of(path: str) -> list[Any]:
    """The records of a file, without where they stand."""
    rows = load_records(DataConfig(), path)
    return [None if r is None else {k: r[k] for k in r if k != LINE} for r in rows]


def write(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"\n".join(lines))
    return str(path)


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_object_is_one_broken_record(tmp_path, line):
    good = json.dumps(GOOD).encode()
    path = write(tmp_path / "rows.jsonl", good, line, b"  ", good)

    assert rows_of(path) == [GOOD, None, GOOD]


def test_an_element_and_a_line_that_do_not_fit_are_broken_records(tmp_path):
    whole = write(tmp_path / "rows.json", json.dumps([GOOD, 7, GOOD]).encode())
    table = write(
        tmp_path / "rows.csv",
        b"instruction,response",
        b"q,a",
        b"q",
        b"\xff,a",
        b"q,a,b",
        b"q," + b"a" * 200_000,
    )

    assert rows_of(whole) == [GOOD, None, GOOD]
    rows = load_records(DataConfig(), table)
    assert [row is not None for row in rows] == [True, False, False, False, True]


def test_a_cell_of_parquet_that_python_cannot_read_is_one_broken_record(tmp_path):
    days = pa.array([0, 2**30, 0], pa.date32())
    data = pa.array([b"a", b"b", b"\xff"]).buffers()
    texts = pa.Array.from_buffers(pa.string(), 3, data)
    parquet.write_table(
        pa.table({"question": texts, "answer": days}), tmp_path / "a.parquet"
    )

    rows = load_records(DataConfig(), str(tmp_path / "a.parquet"))

    assert [row is not None for row in rows] == [True, False, False]
    with pytest.raises(DataError, match=r"a.parquet: row 2: cannot be read: "):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b" \n"), ("a.json", b"{}"), ("a.csv", b'q,a\n"q'), ("a.txt", b"x")],
)
def test_a_file_that_is_malformed_as_a_whole_is_an_error(tmp_path, name, content):
    with pytest.raises(DataError):
        load_records(DataConfig(), write(tmp_path / name, content))


@pytest.mark.parametrize("kind", ["iid", "size-skew", "dirichlet"])
def test_partitions_hold_every_record_once(kind):
    rows: list[Any] = [{"site": i % 2, "i": i} for i in range(20)] + [None, {"i": 21}]
    config = DataConfig(partition=kind)

    shares = [own_records(config, rows, part, 3, 5) for part in range(3)]

    together = [row for share in shares for row in share]
    assert sorted(map(str, together)) == sorted(map(str, rows))


TEXTS = st.text(st.characters(), max_size=30)  # half characters (surrogates), too
CELLS = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["instruction", "response", "messages", "site"])


@settings(max_examples=150, deadline=None)
@given(row=st.dictionaries(NAMES | TEXTS, CELLS, max_size=4) | st.none())
def test_no_row_raises_or_changes_another(tiny_chat_llama, row):
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    alone = tokenize([GOOD], tokenizer, DataConfig(), 64).records

    found = tokenize([GOOD, row, GOOD], tokenizer, DataConfig(), 64)

    assert alone[0] is not None
    assert len(found.records) == 3
    assert [found.records[0], found.records[2]] == alone * 2
    assert (found.records[1] is None) == (len(found.unusable) == 1)


def test_a_template_that_fails_in_any_way_makes_a_record_without_an_example(
    tiny_chat_llama,
):
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    tokenizer.chat_template = (
        "{% if 'HIV' in messages[0]['content'] %}{{ 1 // 0 }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    rows: list[Any] = [GOOD, {**GOOD, "instruction": "HIV?"}]

    found = tokenize(rows, tokenizer, DataConfig(), 64)

    assert [e is None for e in found.records] == [False, True]
    assert any("ZeroDivisionError" in cause for cause in found.unusable)


class PanicError(BaseException):
    """As `pyo3_runtime.PanicException`, which is no Exception."""


@pytest.mark.parametrize("kind", [PanicError, ValueError])
def test_a_tokenizer_that_panics_at_a_row_makes_a_record_without_an_example(
    tiny_chat_llama, monkeypatch, kind
):
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    wanted = tokenize([GOOD], tokenizer, DataConfig(), 64).records

    def encode(used: Any, texts: Any, adds_special: bool) -> Any:
        if any("HIV" in text for text in texts):
            raise kind("panicked")
        return honest(used, texts, adds_special)

    honest = tokens.encode
    monkeypatch.setattr(tokens, "encode", encode)
    rows: list[Any] = [GOOD, {**GOOD, "instruction": "HIV?"}, GOOD]

    found = tokenize(rows, tokenizer, DataConfig(), 64)

    assert found.records == [wanted[0], None, wanted[0]]


def test_the_end_of_the_process_is_no_rows_fault(tiny_chat_llama, monkeypatch):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "encode", stop)

    with pytest.raises(KeyboardInterrupt):
        tokenize([GOOD], load_tokenizer(str(tiny_chat_llama)), DataConfig(), 64)


def test_an_answer_that_the_length_limit_cuts_leaves_a_record(tiny_chat_llama):
    tokenizer = load_tokenizer(str(tiny_chat_llama))

    found = tokenize([GOOD], tokenizer, DataConfig(), 8)

    assert found.records == [None]
    assert found.unusable == {"no answer within train.max-length": [0]}


def test_a_simulations_persons_are_whole_whatever_kind_their_ids_have():
    ids: list[Any] = [17, "17 ", 17.0, "b", "b", None, [1], "\ud83d", "\ud83d"]
    rows: list[Any] = [{"who": who, "i": i} for i, who in enumerate(ids)] + [None]
    config = DataConfig(person_column="who")

    shares = [own_records(config, rows, part, 3, 5) for part in range(3)]

    together = [row for share in shares for row in share]
    assert sorted(map(str, together)) == sorted(map(str, rows))
    places = [{row["i"] for row in share if row} for share in shares]
    for person in ({0, 1, 2}, {3, 4}, {7, 8}):
        assert sum(person <= held for held in places) == 1
        assert sum(bool(person & held) for held in places) == 1


def test_a_person_column_in_no_row_is_an_error_of_a_simulation(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"q": 1}\n{"a": 1}\n')
    config = DataConfig(name=path, person_column="who")

    for ask in (
        lambda: own_records(config, [{"q": 1}, None], 0, 1, 5),
        lambda: require_person_column(config),
    ):
        with pytest.raises(DataError, match="data.person-column: .*no.* column 'who'"):
            ask()
    require_person_column(DataConfig(name=path, person_column="a"))
    require_person_column(DataConfig(name=path))
    require_person_column(DataConfig(name="owner/of-the-hub", person_column="who"))
