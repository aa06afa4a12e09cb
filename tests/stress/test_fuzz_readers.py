"""A short run of the fuzzer; the long one is typed: python -m tests.stress.fuzz_readers."""

import pytest

from fedllm.config import DataConfig
from tests.stress.fuzz_readers import check, fuzz


def test_no_random_file_raises_anything_but_one_line():
    found = fuzz(120, start=3)

    # It reaches all sides of what is turned away. How many rows are read is left to chance.
    for outcome in ("refused", "malformed", "unusable"):
        assert found[outcome] > 2, found


def test_an_honest_file_is_counted_by_what_its_rows_are():
    rows = b'{"instruction": "Why?", "response": "So."}\n'

    found = check({"rows.jsonl": rows}, DataConfig(), is_folder=False)

    # Once by each of the two ways to read a file.
    assert found == {"Conversation": 2}


def test_the_fuzzer_finds_a_reader_that_lets_an_error_through(monkeypatch):
    def fails(text, *_):
        raise KeyError(text)

    monkeypatch.setattr("fedllm.data.readers.read_delimited", fails)
    with pytest.raises(KeyError):
        fuzz(60, start=3)
