"""Loading, sharing and tokenising rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.readers import read_rows
from fedllm.data.rows import load_public, load_rows
from fedllm.errors import DataError
from fedllm.evaluation.multiple_choice import load_questions
from tests.helpers.rows import EMBEDDED, ROWS, write_jsonl

# The embedded rows


def test_the_embedded_splits_hold_the_rows_they_should() -> None:
    config = DataConfig()
    train = load_rows(config)
    validation, test = load_public(config, "validation"), load_public(config, "test")
    assert validation is not None
    assert test is not None
    assert (len(train), len(validation), len(test)) == (4863, 256, 266)
    assert train.column_names == ["id", "site", "term", "instruction", "response"]
    assert len(set(train["site"])) == 11
    ids = [*train["id"], *validation["id"], *test["id"]]
    assert len(set(ids)) == 5385


def test_no_question_is_in_two_of_the_embedded_splits() -> None:
    config = DataConfig()
    train = set(load_rows(config)["instruction"])
    validation = set(load_public(config, "validation")["instruction"])  # type: ignore[index]
    test = set(load_public(config, "test")["instruction"])  # type: ignore[index]
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_every_embedded_file_fits_the_app_bundle_and_travels_in_it() -> None:
    files = sorted(EMBEDDED.iterdir())
    assert [file.name for file in files] == [
        "LICENSE.md",
        "choice.jsonl",
        "test.jsonl",
        "train-0.jsonl",
        "train-1.jsonl",
        "validation.jsonl",
    ]
    assert max(file.stat().st_size for file in files) < 1_000_000
    licence = (EMBEDDED / "LICENSE.md").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
    assert "Permission to use, copy, modify and distribute" in licence


def test_own_data_has_no_public_rows_unless_it_names_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    own = DataConfig(name=str(path))
    assert load_public(own, "validation") is None
    assert load_public(own, "test") is None
    declared = DataConfig(name=str(path), public_test=str(path))
    assert load_public(declared, "validation") is None
    assert len(load_public(declared, "test")) == 3  # type: ignore[arg-type]


def test_a_named_public_file_wins_over_the_embedded_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    rows = load_public(DataConfig(public_validation=str(path)), "validation")
    assert rows is not None
    assert rows["response"][:] == [row["response"] for row in ROWS]


def test_a_clients_own_file_stands_in_for_the_named_data_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    assert len(load_rows(DataConfig(), str(path))) == 3


@pytest.mark.parametrize("name", ["/no/such/rows", "./rows", "~/no-such", "rows.csv"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(DataConfig(name=name))


# The hub


def fail_with(error: Exception) -> Callable[..., Any]:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise error

    return load_dataset


def test_a_hub_out_of_reach_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    error = ConnectionError("Couldn't reach 'owner/rows'\non the Hub")
    monkeypatch.setattr(datasets, "load_dataset", fail_with(error))
    with pytest.raises(DataError, match="hub is out of reach: name a local") as caught:
        load_rows(DataConfig(name="owner/rows"))
    assert "\n" not in str(caught.value)


def test_a_data_set_that_the_hub_lacks_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    error = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'owner/rows' doesn't exist"
    )
    monkeypatch.setattr(datasets, "load_dataset", fail_with(error))
    with pytest.raises(DataError, match="the hub has no such data set"):
        load_rows(DataConfig(name="owner/rows"))


def test_a_hub_data_set_is_asked_for_by_name_and_split_and_cached_in_our_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(name: str, config: str | None = None, **options: Any) -> Any:
        asked.update(options, name=name, config=config)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(name="owner/rows", split="validation")
    assert len(load_rows(config)) == 3
    folder = str(tmp_path / "datasets")
    expected: dict[str, Any] = {
        "name": "owner/rows",
        "split": "validation",
        "cache_dir": folder,
    }
    expected |= {"config": None, "revision": None}
    assert asked == expected
    load_rows(DataConfig(name="owner/rows@" + "c" * 40, config="main"))
    more = {"split": "train", "revision": "c" * 40, "config": "main"}
    assert asked == expected | more
    load_rows(DataConfig(name="owner/rows@v1.0"))
    assert asked["revision"] == "v1.0"
    with pytest.raises(DataError, match="after @ stands a commit, a tag or a branch"):
        load_rows(DataConfig(name="owner/rows@"))


def test_each_question_of_the_choice_file_asks_for_a_test_row() -> None:
    questions = load_questions(EMBEDDED / "choice.jsonl")
    rows = {row["instruction"]: row for row in read_rows(EMBEDDED / "test.jsonl")}
    assert len({row["question"] for row in questions}) == len(questions) == 100
    for row in questions:
        assert len(set(row["options"])) == 4
        right = [
            rows[row["question"]]["response"].startswith(o) for o in row["options"]
        ]
        assert right.index(True) == row["answer"] and sum(right) == 1
