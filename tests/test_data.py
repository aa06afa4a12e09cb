"""Loading, sharing and tokenising rows."""

import csv
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.partitions import partition
from fedllm.data.prompts import chat_prompt, to_prompt_completion
from fedllm.data.readers import read_rows
from fedllm.data.rows import load_public, load_rows, own_rows
from fedllm.data.tokens import tokenize
from fedllm.errors import ConfigError, DataError
from fedllm.evaluation.multiple_choice import load_questions

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "fedllm" / "datasets" / "wordnet_medical"
ROWS = [
    {"instruction": "What is asthma?", "response": "A disorder of the lungs.", "n": 1},
    {"instruction": "Define anæmia.", "response": "Too few red\nblood cells.", "n": 2},
    {"instruction": "What is a tic?", "response": 'A "sudden" twitch, or two.', "n": 3},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


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


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


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


def test_no_question_lies_in_two_of_the_embedded_splits() -> None:
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
    assert rows["n"][:] == [1, 2, 3]


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
    number = str if ending == ".csv" else int
    assert list(rows) == [{**row, "n": number(str(row["n"]))} for row in ROWS]


def test_a_folder_gives_the_rows_of_its_files_in_order_of_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    write_json(tmp_path / "a.json", ROWS[:2])
    (tmp_path / "README.txt").write_text("not data")
    assert load_rows(DataConfig(name=str(tmp_path)))["n"][:] == [1, 2, 3]


def test_a_clients_own_file_stands_in_for_the_named_data_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    assert len(load_rows(DataConfig(), str(path))) == 3


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
        '{"question": "q", "response": "a"}\n',
        r"no column 'instruction' \(data.prompt-column\); .* question, response",
    ),
    "wrong answer column": (
        "w.jsonl",
        '{"instruction": "q", "answer": "a"}\n',
        r"no column 'response' \(data.response-column\); .* instruction, answer",
    ),
    "a number for text": (
        "t.jsonl",
        Q + '{"instruction": "q", "response": 5}\n',
        r"t.jsonl: row 2: column 'response': must be text \(got 5\)",
    ),
    "messages of another form": (
        "t.jsonl",
        '{"messages": [{"from": "human", "value": "q"}]}\n',
        "row 1: column 'messages': each turn must be an object with role and content",
    ),
    "mixed kinds": (
        "x.jsonl",
        '{"instruction": "q", "response": "a", "n": 1}\n'
        '{"instruction": "q", "response": "a", "n": {"k": []}}\n',
        "x.jsonl: a column mixes kinds of values",
    ),
    "another ending": ("r.txt", Q, "r.txt: must end in .jsonl, .json, .csv, .parquet"),
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


def test_a_file_that_is_not_text_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,response\nq,\xff\xfe\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_rows(DataConfig(name=str(path)))


@pytest.mark.parametrize("name", ["/no/such/rows", "./rows", "~/no-such", "rows.csv"])
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(DataConfig(name=name))


def test_a_folder_without_data_says_which_endings_count(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file that ends in \.jsonl, \.json"):
        load_rows(DataConfig(name=str(tmp_path)))


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


def test_a_data_set_that_the_hub_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
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

    asked = {}

    def load_dataset(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(name="owner/rows", split="validation")
    assert len(load_rows(config)) == 3
    folder = str(tmp_path / "datasets")
    assert asked == {"name": "owner/rows", "split": "validation", "cache_dir": folder}


# Sharing


def ids_of(config: DataConfig, num_partitions: int, seed: int = 42) -> list[list[str]]:
    rows = load_rows(config)
    parts = [
        partition(config, rows, i, num_partitions, seed) for i in range(num_partitions)
    ]
    return [part["id"][:] for part in parts]


KINDS = {"iid": 20, "dirichlet": 20, "size-skew": 20, "natural": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_partitions_are_disjoint_and_hold_every_row(kind: Any) -> None:
    config = DataConfig(partition=kind)
    parts = ids_of(config, KINDS[kind])
    held = [row for part in parts for row in part]
    assert len(held) == len(set(held)) == 4863
    assert set(held) == set(load_rows(config)["id"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size-skew"])
def test_the_seed_decides_who_holds_which_row(kind: Any) -> None:
    config = DataConfig(partition=kind)
    assert ids_of(config, 5) == ids_of(config, 5)
    assert ids_of(config, 5) != ids_of(config, 5, seed=43)


def test_iid_partitions_are_of_one_size_and_not_in_the_files_order() -> None:
    config = DataConfig(partition="iid")
    parts = ids_of(config, 20)
    assert {len(part) for part in parts} == {243, 244}
    assert parts[0] != load_rows(config)["id"][: len(parts[0])]
    site = dict(zip(load_rows(config)["id"], load_rows(config)["site"], strict=True))
    assert min(len({site[row] for row in part}) for part in parts) > 5


def test_size_skew_grows_in_proportion() -> None:
    sizes = [len(part) for part in ids_of(DataConfig(partition="size-skew"), 20)]
    unit = 4863 / 210
    assert all(abs(size - unit * k) <= 1 for k, size in enumerate(sizes, start=1))


def test_natural_gives_each_client_one_site() -> None:
    config = DataConfig(partition="natural")
    rows = load_rows(config)
    sites = [set(partition(config, rows, i, 11, 42)["site"]) for i in range(11)]
    assert all(len(site) == 1 for site in sites)
    assert len(set.union(*sites)) == 11


def test_a_smaller_alpha_makes_clients_more_one_sided() -> None:
    def one_sidedness(alpha: float) -> float:
        config = DataConfig(partition="dirichlet", partition_alpha=alpha)
        rows = load_rows(config)
        shares = []
        for i in range(10):
            sites = partition(config, rows, i, 10, 42)["site"][:]
            if sites:
                shares.append(max(sites.count(s) for s in set(sites)) / len(sites))
        return sum(shares) / len(shares)

    assert one_sidedness(0.05) > one_sidedness(100.0) + 0.2


def test_a_small_alpha_may_leave_a_client_without_a_row() -> None:
    config = DataConfig(partition="dirichlet", partition_alpha=0.01)
    sizes = [len(part) for part in ids_of(config, 40)]
    assert min(sizes) == 0
    assert sum(sizes) == 4863


def test_natural_needs_at_least_as_many_clients_as_there_are_groups() -> None:
    config = DataConfig(partition="natural")
    with pytest.raises(ConfigError, match=r"each of the 11 values.*\(got 10 clients\)"):
        partition(config, load_rows(config), 0, 10, 42)


def test_natural_cuts_the_largest_sites_for_more_clients() -> None:
    config = DataConfig(partition="natural")
    rows = load_rows(config)
    parts = [partition(config, rows, i, 40, 42) for i in range(40)]
    sizes = [len(part) for part in parts]
    assert all(len(set(part["site"])) == 1 for part in parts)
    assert sorted(row for part in parts for row in part["id"]) == sorted(rows["id"])
    smallest_site = min(Counter(rows["site"]).values())
    assert max(sizes) <= 2 * max(smallest_site, min(sizes))


@pytest.mark.parametrize("kind", ["natural", "dirichlet"])
def test_a_column_to_go_by_that_is_not_there_is_named(kind: Any) -> None:
    config = DataConfig(partition=kind, partition_column="hospital")
    with pytest.raises(DataError, match=r"no column 'hospital'; .* id, site, term"):
        partition(config, load_rows(config), 0, 11, 42)


def test_a_row_without_a_group_is_named(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "site": "a"}, ROWS[1]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(name=str(path), partition="natural")
    with pytest.raises(DataError, match=r"\(got None in row 2\)"):
        partition(config, load_rows(config), 0, 1, 42)


def test_no_such_partition_is_said() -> None:
    config = DataConfig()
    with pytest.raises(ConfigError, match=r"must be in \[0, 5\) \(got 5\)"):
        partition(config, load_rows(config), 5, 5, 42)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size-skew"])
def test_more_clients_than_rows_leaves_some_without_a_row(
    tmp_path: Path, kind: Any
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "site": "a"} for row in ROWS])
    config = DataConfig(name=str(path), partition=kind)
    rows = load_rows(config)
    parts = [partition(config, rows, i, 5, 42)["n"][:] for i in range(5)]
    assert sorted(n for part in parts for n in part) == [1, 2, 3]
    assert parts.count([]) >= 2


PROBE = """
import sys
from fedllm.config import DataConfig
from fedllm import data
slow = {"datasets", "flwr_datasets", "torch", "transformers", "trl"}
assert not slow & set(sys.modules), slow & set(sys.modules)
import hashlib
for kind, count in (("iid", 7), ("dirichlet", 7), ("size-skew", 7), ("natural", 11)):
    config = DataConfig(name=sys.argv[1], partition=kind)
    part = data.partition(config, data.load_rows(config), 3, count, 42)
    print(kind, hashlib.sha256("".join(part["id"]).encode()).hexdigest())
"""


def test_another_process_gets_the_same_rows_says_nothing_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = tmp_path / "rows.jsonl"
    shards = sorted(EMBEDDED.glob("train-*.jsonl"))
    path.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    paths = {"HOME": home, "HF_HOME": home / "hf", "FEDLLM_HOME": home / "fedllm"}
    env = {**os.environ, **{k: str(v) for k, v in paths.items()}, "PYTHONHASHSEED": "7"}
    # Matplotlib, which flwr_datasets imports, writes its font list on first use.
    env["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")
    command = [sys.executable, "-c", PROBE, str(path)]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mine = []
    for kind, count in (*((k, 7) for k in list(KINDS)[:3]), ("natural", 11)):
        config = DataConfig(partition=kind)  # type: ignore[arg-type]
        ids = partition(config, load_rows(config), 3, count, 42)["id"]
        mine.append(f"{kind} {hashlib.sha256(''.join(ids).encode()).hexdigest()}")
    assert done.stdout.split("\n")[:-1] == mine
    assert done.stderr in (
        "",
        "Matplotlib is building the font cache; this may take a moment.\n",
    )
    assert [file for file in home.rglob("*") if file.is_file()] == []


# Conversations


def turn(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_the_last_answer_of_a_conversation_is_the_completion() -> None:
    turns = [
        turn("system", "s"),
        turn("user", "q1"),
        turn("assistant", "a1"),
        turn("user", "q2"),
        turn("assistant", "a2"),
        turn("user", "thanks"),
    ]
    assert to_prompt_completion(DataConfig(), {"messages": turns}) == (
        turns[:4],
        turns[4:5],
    )


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": None, "response": "a"},
        {"instruction": "q", "response": None},
        {"instruction": "q", "response": " \n"},
        {"instruction": " ", "response": "a"},
        {"messages": []},
        {"messages": [turn("user", "q")]},
        {"messages": [turn("assistant", "a")]},
        {"messages": [turn("user", "q"), turn("assistant", None)]},
    ],
)
def test_a_row_without_question_or_answer_is_not_used(row: dict[str, Any]) -> None:
    assert to_prompt_completion(DataConfig(), row) is None


def test_rows_without_an_answer_are_counted_and_left_out(tiny_llama: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([*ROWS, {"instruction": "q", "response": "", "n": 4}])
    tokenized = tokenize(rows, load_tokenizer(tiny_llama), DataConfig(), 512)
    assert (tokenized.num_examples, tokenized.num_without_answer) == (3, 1)
    assert tokenized.num_truncated == 0


def test_a_client_without_a_usable_row_has_no_examples(tiny_llama: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"instruction": "q", "response": ""}])
    tokenizer = load_tokenizer(tiny_llama)
    tokenized = tokenize(rows, tokenizer, DataConfig(), 512)
    assert (tokenized.num_examples, list(tokenized.dataset)) == (0, [])
    empty = tokenize(rows.select([]), tokenizer, DataConfig(), 512)
    assert empty.num_examples == 0


def test_many_rows_become_the_tokens_of_each_alone_and_nothing_is_said(
    tiny_chat_llama: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import Dataset

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    # More than are read at once; the last is longer than the model takes.
    questions = [f"what is {number}?" for number in range(2002)] + ["why? " * 400]
    rows = [{"instruction": q, "response": "because"} for q in questions]
    tokenizer = load_tokenizer(tiny_chat_llama)
    tokenizer.model_max_length = 256

    together = tokenize(Dataset.from_list(rows), tokenizer, DataConfig(), 4096).dataset

    assert len(together) == len(rows)
    for number in (0, 999, 1000, 2001, 2002):
        alone = Dataset.from_list(rows[number : number + 1])
        (expected,) = tokenize(alone, tokenizer, DataConfig(), 4096).dataset
        assert together[number] == expected
    assert len(together[2002]["input_ids"]) > 256
    assert caplog.messages == []


def test_a_row_after_the_first_thousand_is_named_by_its_number(
    tiny_chat_llama: Path,
) -> None:
    from datasets import Dataset

    rows = [{"messages": [turn("user", "q"), turn("assistant", "a")]}] * 1200
    rows.append({"messages": [{"role": "user", "content": None}, {"role": None}]})

    with pytest.raises(DataError, match="row 1201: column 'messages'"):
        tokenize(
            Dataset.from_list(rows), load_tokenizer(tiny_chat_llama), DataConfig(), 512
        )


def test_a_template_that_refuses_a_conversation_names_the_row(
    tiny_chat_llama: Path,
) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(tiny_chat_llama)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    rows = Dataset.from_list(ROWS)
    with pytest.raises(DataError, match=r"row 1: .*template refuses.*no system role"):
        tokenize(rows, tokenizer, DataConfig(), 512)


# Tokens

ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def trl_examples(folder: Path, rows: Any, max_length: int, output: Path) -> list[Any]:
    """What SFTTrainer makes of prompt and completion columns: ids and labels."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=SFTConfig(
            output_dir=str(output),
            max_length=max_length,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows,
        processing_class=load_tokenizer(folder),
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def our_examples(tokenized: Any) -> list[Any]:
    return [
        (
            row["input_ids"],
            [
                token if answer else -100
                for token, answer in zip(
                    row["input_ids"], row["completion_mask"], strict=True
                )
            ],
        )
        for row in tokenized.dataset
    ]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "max_length"),
    [
        ("tiny_llama", 512),
        ("tiny_llama", 180),
        ("tiny_chat_llama", 512),
        ("tiny_chat_llama", 60),
    ],
)
def test_the_tokens_are_those_of_sft_trainer(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, max_length: int
) -> None:
    from datasets import Dataset

    folder = request.getfixturevalue(kind)
    rows = load_rows(DataConfig()).select(range(0, 4800, 240)).to_list()
    rows += [ROWS[1], {"instruction": "why? " * 200, "response": "because"}]
    columns = []
    for row in rows:
        prompt: Any = ALPACA.format(row["instruction"])
        completion: Any = row["response"]
        if kind == "tiny_chat_llama":
            prompt = [turn("user", row["instruction"])]
            completion = [turn("assistant", row["response"])]
        columns.append({"prompt": prompt, "completion": completion})
    theirs = trl_examples(folder, Dataset.from_list(columns), max_length, tmp_path)
    plain = [{k: row[k] for k in ("instruction", "response")} for row in rows]
    tokenized = tokenize(
        Dataset.from_list(plain), load_tokenizer(folder), DataConfig(), max_length
    )
    assert our_examples(tokenized) == theirs
    assert tokenized.num_examples + tokenized.num_without_answer == len(rows)
    assert tokenized.num_without_answer >= 1
    assert tokenized.num_examples >= 10
    assert (tokenized.num_truncated > 0) == (max_length < 512)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_chat_llama"])
def test_only_the_answer_and_its_end_are_scored(
    request: pytest.FixtureRequest, kind: str
) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenized = tokenize(Dataset.from_list(ROWS[:1]), tokenizer, DataConfig(), 512)
    row = tokenized.dataset[0]
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    scored = [token for token, answer in pairs if answer]
    assert tokenizer.eos_token_id in scored
    text = tokenizer.decode(scored, skip_special_tokens=True)
    assert text.strip() == ROWS[0]["response"]


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_chat_llama"])
def test_a_question_is_asked_in_the_tokens_that_training_showed(
    request: pytest.FixtureRequest, kind: str
) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenized = tokenize(Dataset.from_list(ROWS[:1]), tokenizer, DataConfig(), 512)
    row = tokenized.dataset[0]
    shown = row["input_ids"][: row["completion_mask"].index(1)]
    text = chat_prompt(tokenizer, ROWS[0]["instruction"])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == shown


def test_earlier_turns_are_in_the_prompt_also_without_a_template(
    tiny_llama: Path,
) -> None:
    from datasets import Dataset

    turns = [
        turn("system", "Be brief."),
        turn("user", "What is asthma?"),
        turn("assistant", "A disorder."),
        turn("user", "Of what?"),
        turn("assistant", "Of the lungs."),
    ]
    tokenizer = load_tokenizer(tiny_llama)
    rows = Dataset.from_list([{"messages": turns}])
    ids = tokenize(rows, tokenizer, DataConfig(), 512).dataset[0]["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == (
        "Be brief.\n\n### Instruction:\nWhat is asthma?\n\n### Response:\nA disorder."
        "\n\n### Instruction:\nOf what?\n\n### Response:\nOf the lungs."
    )


# The script that rebuilds the embedded rows


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    path = ROOT / "benchmarks" / "build_wordnet_medical.py"
    spec = importlib.util.spec_from_file_location("build_wordnet_medical", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SYNSETS = """\
  1 This software and database is being provided to you, the LICENSEE
01348530 05 n 02 bacteria 0 bacterium 0 000 | considered to be plants
01350994 05 n 01 coccobacillus 0 001 @ 01348530 n 0000 | a very short bacillus
01370698 05 n 01 erwinia 0 001 @ 01348530 n 0000 | bacteria that attack plants
03247620 06 n 01 drug 0 000 | a substance that is used as a medicine
14777104 27 n 01 Brioschi 0 001 @ 03247620 n 0000 | an antacid
14034177 26 n 01 physical_condition 0 000 | the state of the body
14285662 26 n 05 injury 0 hurt 0 harm 0 trauma 0 blow 0 001 @ 14034177 n 0000 | damage \
caused by accident etc.; "he has an injury"
"""


def test_the_script_words_sorts_and_filters_synsets(
    build_script: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "data.noun").write_text(SYNSETS)
    lines = "".join(build_script.build(tmp_path).values()).splitlines()
    rows = {row["term"]: row for row in map(json.loads, lines)}
    assert {term: row["site"] for term, row in rows.items()} == {
        "coccobacillus": "microbe",
        "drug": "drug",
        "physical condition": "disease",
        "injury": "injury",
    }
    assert rows["injury"] == {
        "id": "wn30-n14285662",
        "site": "injury",
        "term": "injury",
        "instruction": "What is injury?",
        "response": "Damage caused by accident etc. "
        "It is also called hurt, harm, trauma.",
    }


def test_the_script_splits_as_the_embedded_rows_are_split(
    build_script: ModuleType,
) -> None:
    config = DataConfig()
    splits = {
        "train": load_rows(config),
        "validation": load_public(config, "validation"),
        "test": load_public(config, "test"),
    }
    for split, rows in splits.items():
        assert rows is not None
        assert {build_script.split_of(term) for term in rows["term"]} == {split}


@pytest.mark.skipif(
    not Path("/usr/share/wordnet/data.noun").exists(),
    reason="needs Debian's wordnet-base",
)
def test_the_script_reproduces_every_embedded_byte(build_script: ModuleType) -> None:
    for name, text in build_script.build(Path("/usr/share/wordnet")).items():
        assert (EMBEDDED / name).read_text(encoding="utf-8") == text


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


def test_held_out_rows_are_a_fixed_share_and_copies_of_a_row_lie_on_one_side():
    from datasets import Dataset

    config = DataConfig(held_out_fraction=0.25)
    rows = [{"instruction": f"q{i}", "response": "a"} for i in range(1000)]
    twice = Dataset.from_list([*rows, *rows[::-1]])

    def texts(data: Any, seed: int, held_out: bool) -> list[str]:
        return list(own_rows(config, data, seed, held_out)["instruction"])

    train, held = texts(twice, 1, False), texts(twice, 1, True)
    assert not set(train) & set(held)
    assert len(train) + len(held) == 2000
    # 250 of 1,000 coins: 5 standard deviations are 69.
    assert 181 < len(set(held)) < 319
    assert set(texts(Dataset.from_list(rows[:500]), 1, True)) == set(held) & {
        f"q{i}" for i in range(500)
    }
    assert set(texts(twice, 2, True)) != set(held)


def test_without_a_share_every_row_is_trained_on():
    from datasets import Dataset

    rows = Dataset.from_list(ROWS)

    assert own_rows(DataConfig(), rows, 1, held_out=False)["n"][:] == [1, 2, 3]
    assert len(own_rows(DataConfig(), rows, 1, held_out=True)) == 0
