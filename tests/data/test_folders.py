"""Which files of a folder are a split."""

import json
from pathlib import Path

import pytest

from fedllm.config import DataConfig
from fedllm.data.readers import read_rows
from fedllm.errors import DataError


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"instruction": name, "response": "a"}) + "\n")


def read(folder: Path, split: str = "", **settings: str) -> list[str]:
    rows = read_rows(folder, DataConfig(**settings), split)
    return [row["instruction"] for row in rows]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl", "dev/a.jsonl"),
        ("my_train.v2.jsonl", "my_test.jsonl", "val.jsonl"),
        ("rows.jsonl", "eval.jsonl"),
    ],
)
def test_only_the_training_files_of_a_folder_train(tmp_path, names):
    put(tmp_path, *names)
    assert read(tmp_path) == [names[0]]
    others = [n for n in names if "test" in n or "eval" in n]
    assert read(tmp_path, "test") == others


def test_what_is_not_read_is_said(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl", "valid.jsonl")
    said: list[str] = []
    read_rows(tmp_path, DataConfig(), say=said.append)
    assert said == [
        f"{tmp_path}: the split 'train' is read, and of others nothing (test, validation)"
    ]


def test_a_folder_of_one_split_alone_is_not_taken_for_another(tmp_path):
    put(tmp_path, "test.jsonl")
    with pytest.raises(DataError, match="no files of the split 'train'; .* are test"):
        read(tmp_path)
    assert read(tmp_path, split="test") == ["test.jsonl"]
    # A file that is named is taken, whatever its name.
    assert read(tmp_path / "test.jsonl") == ["test.jsonl"]


def test_splits_of_other_names_are_those_of_their_shards(tmp_path):
    names = [f"data/{s}-00000-of-00001.jsonl" for s in ("train_gen", "train_sft")]
    put(tmp_path, *names)
    assert read(tmp_path, split="train_sft") == names[1:]
    with pytest.raises(DataError, match="splits there are train_gen, train_sft"):
        read(tmp_path)


def test_hidden_files_and_those_beside_the_rows_are_no_rows(tmp_path):
    put(tmp_path, "b/deep/rows.jsonl", "a.jsonl")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\x05\x16\xb0")
    for name in ("__MACOSX/a.jsonl", ".cache/x.jsonl", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{")
    assert read(tmp_path) == ["a.jsonl", "b/deep/rows.jsonl"]


def test_a_config_is_a_folder_of_its_name(tmp_path):
    put(tmp_path, "main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl")
    assert read(tmp_path, config="main") == ["main/train.jsonl"]
    with pytest.raises(DataError, match="data.config: has no folder 'x' .*main, soc"):
        read(tmp_path, config="x")


def save(folder: Path, *questions: str) -> None:
    from datasets import Dataset

    rows = [{"instruction": q, "response": "a", "id": 1} for q in questions]
    Dataset.from_list(rows).save_to_disk(folder)


def test_what_save_to_disk_wrote_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    save(tmp_path / "one", "p", "q")
    assert read(tmp_path / "one") == ["p", "q"]
    rows = {
        s: Dataset.from_list([{"question": s, "answer": "a"}]) for s in ("train", "x")
    }
    DatasetDict(rows).save_to_disk(tmp_path / "all")
    found = read_rows(tmp_path / "all", DataConfig(split="x"))
    assert [row["question"] for row in found] == ["x"]
    with pytest.raises(
        DataError, match=r"data.split: has no folder 'y' \(there: train, x"
    ):
        read(tmp_path / "all", split="y")


@pytest.mark.parametrize(
    "state", ["{", "[]", '{"_data_files": [{"filename": "/etc/passwd"}]}']
)
def test_a_list_of_files_that_is_broken_or_leads_out_is_one_line(tmp_path, state):
    save(tmp_path / "one", "p")
    (tmp_path / "one" / "state.json").write_text(state)
    with pytest.raises(DataError, match="save the data set to disk again"):
        read(tmp_path / "one")
