"""The embedded preferences are what their script makes, and fit to be learned from."""

import importlib.util
import json
from collections import Counter
from typing import Any

import pytest

from fedllm.data.embedded import PREFERENCES
from tests.helpers.rows import ROOT


def built() -> Any:
    path = ROOT / "tools" / "build_preferences.py"
    spec = importlib.util.spec_from_file_location("build_preferences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(split: str) -> list[dict[str, str]]:
    text = (PREFERENCES.folder / f"{split}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_files_are_what_the_script_makes(split):
    path = PREFERENCES.folder / f"{split}.jsonl"

    assert built().build(split) == path.read_text("utf-8")


def test_no_question_is_in_two_splits():
    questions = [{row["prompt"] for row in rows(s)} for s in built().ROWS]

    assert sum(map(len, questions)) == len(set.union(*questions))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_length_alone_decides_nothing(split):
    """A model that likes short answers, or long ones, is right in about half of the pairs."""
    pairs = rows(split)

    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in pairs)

    assert 0.4 < shorter / len(pairs) < 0.6
    assert min(Counter(row["flaw"] for row in pairs).values()) > len(pairs) // 3 - 1
    assert all(row["chosen"] != row["rejected"] for row in pairs)


def test_the_set_is_smaller_than_a_megabyte():
    assert sum(p.stat().st_size for p in PREFERENCES.folder.iterdir()) < 1e6
