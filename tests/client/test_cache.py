"""The model and the rows that a client keeps between rounds."""

import json
from typing import Any

import pytest

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.client import cache
from fedllm.config_parsing import parse_run_config
from fedllm.models.location import load_config
from fedllm.wire.messages import ARRAYS, read_reply
from tests.helpers.client_replies import WITHOUT_DP, code_of, text_of, values
from tests.helpers.flower_messages import train_instruction


def test_the_base_is_loaded_and_the_partition_tokenised_once(answer, monkeypatch):
    from fedllm.adapters import adapted_model
    from fedllm.data import tokens

    answer()

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("again")

    monkeypatch.setattr(adapted_model, "load_adapted_model", again)
    monkeypatch.setattr(tokens, "tokenize", again)
    assert ARRAYS in answer().content


def test_another_adapter_takes_the_place_of_the_resident_one(answer, run_config):
    answer()
    config = parse_run_config({**run_config, "adapter.kind": "lora-core"})
    spec = adapter_spec(config.adapter, load_config(config.model.name), config.seed)
    fresh = initial_arrays(spec)

    reply = answer({"adapter.kind": "lora-core"}, message=train_instruction(fresh))

    assert set(values(reply, fresh)) == set(fresh)
    assert len(cache._resident) == 1


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": "q", "response": ""}],
        [{"instruction": "long " * 50, "response": "a"}],
    ],
    ids=["no answer", "answer cut off"],
)
def test_a_client_without_a_usable_example_replies_no_data(answer, tmp_path, rows):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    node = {"data-path": str(path)}
    changes = {**WITHOUT_DP, "train.max-length": 16}

    reply = answer(changes, node=node)

    assert code_of(reply) == "no-data"
    assert "no usable example" in text_of(reply)


def test_a_client_with_an_empty_partition_replies_no_data(answer):
    node = {"partition-id": 11, "num-partitions": 12}

    assert code_of(answer(node=node)) == "no-data"


def test_data_path_is_the_nodes_own_whole_file(answer, arrays, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": "q", "response": r}) + "\n" for r in "abc")
    )

    reply = answer(WITHOUT_DP, node={"data-path": str(path)})

    read = read_reply(reply, {name: a.shape for name, a in arrays.items()})
    assert read.num_examples == 3


@pytest.mark.parametrize("name", ["none.jsonl", "bad.jsonl", "other.jsonl"])
def test_a_data_path_that_cannot_be_used_is_no_data(answer, tmp_path, name):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "other.jsonl").write_text('{"a": "b"}\n')

    reply = answer(WITHOUT_DP, node={"data-path": str(tmp_path / name)})

    assert code_of(reply) == "no-data"
    assert name in text_of(reply)


def test_what_the_length_limit_cuts_is_logged_once(answer, home):
    for _ in range(2):
        answer({"train.max-length": 120})

    (log,) = [path.read_text() for path in (home / "logs").glob("client-*.log")]
    assert log.count("train.max-length 120 cut") == 1


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_node_does_not_train_on_a_public_row_of_the_package(
    answer, home, tmp_path, unit
):
    from fedllm.config import DataConfig
    from fedllm.data.rows import load_public

    public = load_public(DataConfig(), "test")[0]
    rows = [{"instruction": f"Number {i}?", "response": f"{i}."} for i in range(4)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, public]))
    node = {"data-path": str(path)}
    changes = {"data.name": "wordnet-medical", "privacy.unit": unit}

    answer(changes, node=node)

    (resident,) = cache._resident.values()
    records = [own.examples for own in resident.records.values()]
    kept = [*resident.rows.values(), *records][-1]
    assert sum(example is not None for example in kept) == 4
    assert len(kept) == (5 if unit == "record" else 4)
    (log,) = [path.read_text() for path in (home / "logs").glob("client-*.log")]
    assert "1 of its rows are public rows of wordnet-medical" in log
