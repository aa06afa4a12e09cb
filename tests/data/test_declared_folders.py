"""Folders whose card declares configs and splits."""

import json
from pathlib import Path

import pytest

from fedllm.config import DataConfig
from fedllm.data.readers import read_rows
from fedllm.errors import DataError

TWO = """
- config_name: questions
  data_files:
  - {split: train, path: q/part-*.jsonl}
  - {split: test, path: [q/last.jsonl]}
- config_name: plain
  default: true
  data_files: q/last.jsonl
"""


def folder_with(folder: Path, configs: str, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"instruction": name, "response": "a"}) + "\n")
    (folder / "README.md").write_text(f"---\nconfigs:{configs}---\n# Rows\n")
    return folder


def read(folder: Path, split: str = "", **settings: str) -> list[str]:
    rows = read_rows(folder, DataConfig(**settings), split)
    return [row["instruction"] for row in rows]


@pytest.fixture
def two(tmp_path):
    names = ("q/part-1.jsonl", "q/part-2.jsonl", "q/last.jsonl", "other/x.jsonl")
    return folder_with(tmp_path, TWO, *names)


def test_a_config_and_a_split_are_the_files_that_the_card_names(two):
    assert read(two, config="questions") == ["q/part-1.jsonl", "q/part-2.jsonl"]
    assert read(two, "test", config="questions") == ["q/last.jsonl"]
    # The default one, whose files are for training.
    assert read(two) == ["q/last.jsonl"]


def test_a_folder_or_a_data_dir_takes_all_in_it(tmp_path):
    configs = (
        "\n- {config_name: a, data_files: q}\n- {config_name: b, data_dir: other}\n"
    )
    folder = folder_with(tmp_path, configs, "q/r/1.jsonl", "q/2.jsonl", "other/3.jsonl")

    assert read(folder, config="a") == ["q/2.jsonl", "q/r/1.jsonl"]
    assert read(folder, config="b") == ["other/3.jsonl"]


def test_a_card_without_configs_declares_nothing(tmp_path):
    folder = folder_with(tmp_path, " []\n", "train.jsonl", "test.jsonl")

    assert read(folder) == ["train.jsonl"]
    (folder / "README.md").write_text("# Rows\n")
    assert read(folder) == ["train.jsonl"]


@pytest.mark.parametrize(
    ("configs", "asked", "problem"),
    [
        (TWO, {"config": "missing"}, "one of its configs: questions, plain"),
        (
            TWO.replace("  default: true\n", ""),
            {},
            "one of its configs: questions, plain",
        ),
        (TWO, {"config": "questions", "split": "dev"}, "no file of the split 'dev'"),
        ("\n- data_files: ../secret.jsonl\n", {}, "leads out of the folder"),
        ("\n- data_files: /etc/passwd\n", {}, "leads out of the folder"),
        ("\n- config_name: a\n", {}, "names no files"),
        ("\n- data_files: [{split: train, path: 3}]\n", {}, "names no files"),
        ("\n- data_files: '**q'\n", {}, "a path of its configs"),
        ("\n- data_files: gone.jsonl\n", {}, "no file of the split 'train'"),
        (" [a: b: c\n", {}, "front matter cannot be read"),
    ],
)
def test_what_a_card_does_not_declare_is_one_line(tmp_path, configs, asked, problem):
    folder = folder_with(tmp_path, configs, "q/part-1.jsonl", "q/last.jsonl")

    with pytest.raises(DataError, match=problem) as caught:
        read(folder, **asked)

    assert "\n" not in str(caught.value)
