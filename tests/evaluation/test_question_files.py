"""Files of questions: every line has the right form, or is named."""

import re

import pytest

from fedllm.errors import DataError
from fedllm.evaluation.question_files import read_questions


def read(path):
    return read_questions(path, lambda row: row["q"] > 0, "q (above 0)")


def test_blank_lines_are_skipped_and_a_line_separator_is_no_new_line(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"q": 1}\n\n{"q": 2, "text": "a\u2028b"}\n', "utf-8")

    assert [row["q"] for row in read(path)] == [1, 2]


@pytest.mark.parametrize("bad", ['{"q": 0}', '{"q": "x"}', "{}", "[1]", "{", "null"])
def test_the_first_line_of_another_form_is_named(tmp_path, bad):
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"q": 1}}\n{bad}\n{bad}\n')

    with pytest.raises(DataError, match=re.escape(f"{path}:2: needs q (above 0)")):
        read(path)


@pytest.mark.parametrize(
    ("data", "cause"),
    [(None, "No such file"), (b"", "no question"), (b"\xff", "not UTF-8")],
)
def test_a_file_without_questions_is_one_line(tmp_path, data, cause):
    path = tmp_path / "questions.jsonl"
    if data is not None:
        path.write_bytes(data)

    with pytest.raises(DataError, match=cause):
        read(path)
