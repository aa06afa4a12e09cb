"""Lines of a client's own log about its rows."""

from fedllm.config import DataConfig
from fedllm.data.columns import LINE
from fedllm.data.row_report import row_lines
from fedllm.data.tokens import tokenize
from tests.helpers.rows import load_tokenizer

SECRET = "xylographometry"


def row(line: int, **cells: object):
    return {"instruction": "q", "response": SECRET, LINE: f"line {line}", **cells}


def test_rows_are_counted_by_shape_and_by_reason_with_their_lines(tiny_chat_llama):
    rows = [
        row(1),
        row(3, context=SECRET),
        row(4, response=""),
        None,
        row(7, response=""),
        row(8, response=f"{SECRET} " * 99),
        row(9, instruction="q " * 99),
    ]
    found = tokenize(rows, load_tokenizer(tiny_chat_llama), DataConfig(), 80)

    lines = row_lines(found, rows, 80)

    assert lines == [
        "3 of 7 rows are read as instruction + response",
        "1 of 7 rows are read as instruction + context + response",
        "train.max-length 80 cut the end of 1 of 7 rows: line 8",
        "nothing is learned from 2 of 7 rows: no answer: line 4, line 7",
        "nothing is learned from 1 of 7 rows: cannot be read: row 4",
        "nothing is learned from 1 of 7 rows: no answer within train.max-length: line 9",
    ]
    assert SECRET not in "".join(lines)


def test_long_lists_are_cut(tiny_chat_llama):
    rows = [row(n, response="") for n in range(1, 100)]
    found = tokenize(rows, load_tokenizer(tiny_chat_llama), DataConfig(), 80)
    (line,) = row_lines(found, rows, 80)
    assert "line 50, ..." in line and "line 51" not in line
