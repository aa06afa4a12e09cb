import json
import logging
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.client import cache, message_handler
from fedllm.client.message_handler import reply_to
from fedllm.client.node_config import check_node_limits, partition_of
from fedllm.config import RunConfig, parse_run_config
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError
from fedllm.evaluation import held_out_loss
from fedllm.models.loading import load_config
from fedllm.training import sft
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    ERROR,
    METRICS,
    array_record,
    error_content,
    read_reply,
)
from tests.conftest import SENTENCES
from tests.flower_messages import context, instruction, train_instruction

Answer = Callable[..., Message]
NODE = {"partition-id": 0, "num-partitions": 2}
SECRET = "patient-4711"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": text[:20], "response": text[20:]} for text in SENTENCES]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def run_config(tiny_llama: Path, data_file: Path) -> dict[str, Any]:
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 0,
        "adapter.rank": 2,
        "data.name": str(data_file),
        "train.batch-size": 2,
    }


@pytest.fixture(scope="module")
def arrays(tiny_llama: Path, run_config: dict[str, Any]) -> dict[str, Any]:
    config = parse_run_config(run_config)
    spec = adapter_spec(config.adapter, load_config(str(tiny_llama)), config.seed)
    return initial_arrays(spec)


@pytest.fixture
def answer(run_config: dict[str, Any], arrays: dict[str, Any]) -> Answer:
    """Ask the client once."""

    def ask(
        changes: dict[str, Any] | None = None,
        node: dict[str, Any] = NODE,
        message: Message | None = None,
        **more: Any,
    ) -> Message:
        message = message or train_instruction(arrays, **more)
        return reply_to(message, context({**run_config, **(changes or {})}, node))

    return ask


WITHOUT_DP = {"privacy.unit": "none"}


def code_of(reply: Message) -> str:
    assert set(reply.content) == {ERROR}
    return str(reply.content.config_records[ERROR]["code"])


def text_of(reply: Message) -> str:
    return str(reply.content.config_records[ERROR].get("text", ""))


def values(reply: Message, arrays: dict[str, Any]) -> dict[str, Any]:
    read = read_reply(reply, {name: a.shape for name, a in arrays.items()})
    assert read.code is None
    return dict(read.arrays or {})


def test_under_dp_a_reply_holds_the_trained_arrays_and_nothing_else(answer, arrays):
    reply = answer()

    assert set(reply.content) == {ARRAYS}
    got = values(reply, arrays)
    assert set(got) == set(arrays)
    assert max(np.abs(got[name] - arrays[name]).max() for name in got) > 0
    assert all(a.dtype == np.float32 for a in got.values())


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_client_that_packs_sends_its_update(answer, arrays, encoding):
    exact = values(answer(), arrays)
    shapes = {name: a.shape for name, a in arrays.items()}

    packed = answer({"wire.encoding": encoding}, encoding=encoding)

    read = read_reply(packed, shapes, encoding)
    updates = {name: value - arrays[name] for name, value in exact.items()}
    # A scale of its block, which has values of several arrays here.
    allowed = 1.01 / 127 * max(np.abs(update).max() for update in updates.values())
    for name, update in updates.items():
        np.testing.assert_allclose(read.arrays[name], update, atol=allowed)
    assert read_reply(packed, shapes).code == "malformed"


def test_without_dp_the_examples_and_the_loss_come_along(answer, arrays):
    reply = answer(WITHOUT_DP)

    read = read_reply(reply, {name: a.shape for name, a in arrays.items()})
    assert set(reply.content) == {ARRAYS, METRICS}
    assert read.num_examples == 5
    assert read.train_loss == pytest.approx(np.log(384), abs=0.5)


def test_training_depends_on_seed_round_and_partition_and_nothing_else(answer, arrays):
    def first(reply: Message) -> bytes:
        got = values(reply, arrays)
        return b"".join(got[name].tobytes() for name in sorted(got))

    one = first(answer())
    assert first(answer()) == one
    assert first(answer(server_round=2)) != one
    assert first(answer(node={**NODE, "partition-id": 1})) != one
    assert first(answer(learning_rate=0.1)) != one


RECORD = {"privacy.unit": "record", "privacy.delta": 1e-5}
FLOORS = {"privacy-unit": "record", "max-epsilon": 4.0, "delta": 1e-5}


def epsilon_of(reply: Message) -> float:
    assert set(reply.content) == {ARRAYS, METRICS}
    metrics = dict(reply.content.metric_records[METRICS])
    assert set(metrics) == {"epsilon"}
    return float(metrics["epsilon"])  # type: ignore[arg-type]


def test_under_record_a_reply_holds_arrays_and_epsilon_and_nothing_else(answer, arrays):
    one, two = answer(RECORD), answer(RECORD, server_round=2)

    assert 0 < epsilon_of(one) < epsilon_of(two) <= 8.0
    got = values(one, arrays)
    assert max(np.abs(got[name] - arrays[name]).max() for name in got) > 0
    assert any((values(answer(RECORD), arrays)[n] != got[n]).any() for n in got)


def test_rounds_that_the_target_is_calibrated_for_are_all_allowed_and_no_more(answer):
    spent = [epsilon_of(answer(RECORD, server_round=r)) for r in range(1, 6)]

    assert 7.9 < spent[-1] <= 8.0
    assert code_of(answer(RECORD, server_round=6)) == "budget-spent"


def test_a_simulation_begins_anew_in_another_run_and_a_real_node_does_not(
    answer, run_config, arrays, home, data_file
):
    def ask(node: dict[str, Any], run_id: int) -> float:
        where = context({**run_config, **RECORD}, node)
        where.run_id = run_id
        return epsilon_of(reply_to(train_instruction(arrays), where))

    real = {"data-path": str(data_file)}

    assert ask(NODE, 1) == ask(NODE, 2)
    assert (home / "ledgers/simulated/1/0/ledger.json").exists()
    once = ask(real, 1)
    assert ask(real, 2) > 1.2 * once
    assert [p.name for p in (home / "ledgers").glob("*/key")] == ["key"]


def test_a_nodes_floor_makes_more_noise_and_no_run_config_passes_it(answer):
    first = [epsilon_of(answer(RECORD, {**NODE, **FLOORS})) for _ in range(5)]

    assert 3.9 < first[-1] <= 4.0
    for promise in (
        {"privacy.target-epsilon": 100.0},
        {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.5},
        {"privacy.max-epsilon": 1000.0},
        {"num-server-rounds": 1},
    ):
        reply = answer({**RECORD, **promise}, {**NODE, **FLOORS})
        assert code_of(reply) == "budget-spent"
        assert text_of(reply) == ""


def test_nothing_is_trained_once_the_budget_is_spent(answer, monkeypatch):
    from fedllm.training import dp_sgd

    spend = {**RECORD, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.5}
    node = {**NODE, **FLOORS, "max-epsilon": 0.1}

    def train(*args: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(dp_sgd, "train_privately", train)

    assert code_of(answer(spend, node)) == "budget-spent"


def test_the_adapter_leaves_only_after_the_ledger_is_on_disk(answer, monkeypatch):
    from fedllm.privacy import record_ledger

    answer(RECORD)
    monkeypatch.setattr(
        record_ledger.RecordLedger,
        "_write",
        lambda self, content: (_ for _ in ()).throw(OSError(28, "disk full")),
    )

    assert code_of(answer(RECORD, server_round=2)) == "failed"


def test_a_ledger_that_was_edited_stops_the_client(answer, home):
    answer(RECORD)
    path = home / "ledgers/simulated/1/0/ledger.json"
    text = path.read_text()
    path.write_text(text.replace('"steps": 1', '"steps": 2'))
    assert path.read_text() != text

    reply = answer(RECORD)

    assert code_of(reply) == "failed"
    assert "cannot be trusted" in (home / "logs/client-0.log").read_text()


def test_fewer_records_than_a_batch_are_refused(answer, home):
    reply = answer({**RECORD, "train.gradient-accumulation": 3})

    assert code_of(reply) == "bad-config"
    log = (home / "logs/client-0.log").read_text()
    assert "draws batches of 6 records" in log and "client has 5" in log


@pytest.mark.parametrize(
    ("floor", "unit"), [("client", "record"), ("record", "client"), ("record", "none")]
)
def test_a_node_that_demands_another_unit_refuses(floor, unit):
    promise = {} if unit != "none" else {"privacy.target-epsilon": 0.0}
    config = parse_run_config({"privacy.unit": unit, **promise})

    with pytest.raises(ConfigError, match=f"demands '{floor}'"):
        check_node_limits({"privacy-unit": floor}, config)


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_limit_cannot_be_passed_by_way_of_a_large_delta(unit):
    config = parse_run_config({"privacy.unit": unit, "privacy.delta": 0.9})

    with pytest.raises(ConfigError, match="max-epsilon is meant at 1e-05 or less"):
        check_node_limits({"privacy-unit": unit, "max-epsilon": 8.0}, config)
    check_node_limits({"privacy-unit": unit}, config)
    check_node_limits({"privacy-unit": unit, "max-epsilon": 8.0, "delta": 0.95}, config)


@pytest.mark.parametrize("key", ["max_epsilon", "privacy.unit", "epsilon", "Delta"])
def test_a_floor_by_another_name_is_refused_and_not_passed_over(key):
    with pytest.raises(ConfigError, match=f"node config: {key}: is no floor"):
        check_node_limits({key: "client"}, RunConfig())
    check_node_limits({"site-name": "north", "num-partitions": 2}, RunConfig())


def test_a_limit_without_a_unit_is_one_of_client_level():
    config = parse_run_config({"privacy.unit": "record"})

    with pytest.raises(ConfigError, match="its privacy-unit is not set"):
        check_node_limits({"max-epsilon": 8.0}, config)
    with pytest.raises(ConfigError, match="privacy.delta"):
        check_node_limits({"privacy-unit": "record", "delta": 1e-6}, config)


def test_the_base_is_loaded_and_the_partition_tokenised_once(answer, monkeypatch):
    from fedllm.data import tokens
    from fedllm.models import loading

    answer()

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("again")

    monkeypatch.setattr(loading, "load_base", again)
    monkeypatch.setattr(tokens, "tokenize", again)
    assert ARRAYS in answer().content


IMPORTS = """
import gc, sys
from fedllm.client.message_handler import import_libraries
collections = []
gc.callbacks.append(lambda *_: collections.append(_))
import_libraries(quantized=True, per_example=sys.argv[1] == "record")
gc.callbacks.clear()
import torch
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000)
print("torch._inductor.compile_fx" in sys.modules, torch.compile.__module__)
print(*("fedllm.training.sft" in sys.modules, "peft" in sys.modules))
"""


@pytest.mark.parametrize("unit", ["none", "record"])
def test_a_client_imports_only_what_it_takes_and_collects_no_garbage_meanwhile(unit):
    command = [sys.executable, "-c", IMPORTS, unit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "0 True True",
        "False torch",
        "True True" if unit == "none" else "False True",
    ]


def test_another_adapter_takes_the_place_of_the_resident_one(answer, run_config):
    answer()
    config = parse_run_config({**run_config, "adapter.kind": "lora-core"})
    spec = adapter_spec(config.adapter, load_config(config.model.name), config.seed)
    fresh = initial_arrays(spec)

    reply = answer({"adapter.kind": "lora-core"}, message=train_instruction(fresh))

    assert set(values(reply, fresh)) == set(fresh)
    assert len(cache._resident) == 1


@pytest.mark.parametrize("kind", ["ia3", "vera", "lora-core"])
def test_where_the_run_says_auto_the_kind_is_the_one_that_the_server_names(
    answer, run_config, kind
):
    config = parse_run_config({**run_config, "adapter.kind": kind})
    spec = adapter_spec(config.adapter, load_config(config.model.name), config.seed)
    fresh = initial_arrays(spec)
    message = train_instruction(fresh, adapter_kind=kind)

    reply = answer({"adapter.kind": "auto"}, message=message)

    assert set(values(reply, fresh)) == set(fresh)


@pytest.mark.parametrize("named", [None, "auto", "qlora"])
@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_an_auto_that_the_server_leaves_open_is_refused(
    answer, arrays, named, message_type
):
    message = train_instruction(arrays, adapter_kind=named, message_type=message_type)

    reply = answer({"adapter.kind": "auto", **WITHOUT_DP}, message=message)

    assert code_of(reply) == "bad-config"
    assert "adapter.kind: is 'auto'" in text_of(reply)


def test_a_run_that_names_its_kind_is_not_overruled_by_the_server(answer, arrays):
    reply = answer(message=train_instruction(arrays, adapter_kind="lora"))

    assert set(values(reply, arrays)) == set(arrays)


ERRORS = [
    (ConfigError(SECRET), "bad-config"),
    (DataError(SECRET), "no-data"),
    (ModelError(SECRET), "failed"),
    (MemoryError(SECRET), "out-of-memory"),
    (torch.OutOfMemoryError(SECRET), "out-of-memory"),
    (RuntimeError(SECRET), "failed"),
    (KeyError(SECRET), "failed"),
    (RecursionError(SECRET), "failed"),
    (FedllmError(SECRET + "\udcff"), "failed"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_under_dp_every_error_becomes_a_code_and_its_text_stays_here(
    answer, home, monkeypatch, capfd, caplog, error, code
):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    with caplog.at_level(logging.DEBUG):
        reply = answer()

    assert code_of(reply) == code
    assert dict(reply.content.config_records[ERROR]) == {"code": code}
    out, err = capfd.readouterr()
    assert SECRET not in out + err + caplog.text
    log = (home / "logs" / "client-0.log").read_text(errors="replace")
    assert f"code {code}" in log
    assert SECRET in log
    assert "Traceback" in log


@pytest.mark.parametrize(("error", "code"), ERRORS[:-1])
def test_without_dp_the_text_is_shown(answer, home, monkeypatch, error, code):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    reply = answer(WITHOUT_DP)

    assert code_of(reply) == code
    assert SECRET in text_of(reply)
    assert str(home / "logs" / "client-0.log") in text_of(reply)


def test_running_out_of_memory_on_a_cpu_is_told_by_its_code(answer, monkeypatch):
    def fail(*args: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(message_handler, "_train", fail)

    assert code_of(answer()) == "out-of-memory"


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"partition-id": 0},
        {"num-partitions": 2},
        {"partition-id": "x", "num-partitions": 2},
        {"partition-id": 2, "num-partitions": 2},
        {"partition-id": -1, "num-partitions": 2},
        {**NODE, "max-epsilon": "much"},
        {**NODE, "delta": "small"},
    ],
)
def test_a_node_config_that_cannot_be_used_is_a_bad_config(answer, node):
    assert code_of(answer(node=node)) == "bad-config"


@pytest.mark.parametrize(
    "changes", [{"train.batch-size": -1}, {"nonsense": 1}, {"privacy.unit": "nobody"}]
)
def test_a_bad_run_config_is_a_code_and_counts_as_private(answer, changes):
    reply = answer(changes)

    assert dict(reply.content.config_records[ERROR]) == {"code": "bad-config"}


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({CONFIG: ConfigRecord({"server-round": 1, "learning-rate": 1.0})}),
        RecordDict({CONFIG: ConfigRecord({}), ARRAYS: array_record({})}),
        RecordDict(
            {CONFIG: ConfigRecord({"server-round": "x"}), ARRAYS: array_record({})}
        ),
    ],
)
@pytest.mark.parametrize("message_type", ["train", "evaluate", "query.x"])
def test_a_servers_message_that_makes_no_sense_is_answered_with_a_code(
    answer, content, message_type
):
    reply = answer(message=instruction(content, message_type))

    assert code_of(reply) in ("failed", "bad-config")


def test_a_full_disk_under_the_log_does_not_keep_the_reply_back(answer, home):
    home.write_text("in the way of the folder")

    assert code_of(answer(node={})) == "bad-config"


def test_a_training_that_goes_well_needs_no_log(answer, home):
    home.write_text("in the way of the folder")

    assert ARRAYS in answer().content


@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": "q", "response": ""}],
        [{"instruction": "long " * 50, "response": "a"}],
    ],
    ids=["no answer", "answer cut off"],
)
def test_a_client_without_a_usable_example_says_no_data(answer, tmp_path, rows):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    node = {"data-path": str(path)}
    changes = {**WITHOUT_DP, "train.max-length": 16}

    reply = answer(changes, node=node)

    assert code_of(reply) == "no-data"
    assert "no usable example" in text_of(reply)


def test_a_client_with_an_empty_partition_says_no_data(answer):
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


def test_the_partition_of_a_nodes_own_file_comes_from_its_path():
    one = partition_of(context({}, {"data-path": "/data/a.jsonl"}))

    assert one == partition_of(context({}, {"data-path": "/data/a.jsonl"}))
    assert one != partition_of(context({}, {"data-path": "/data/b.jsonl"}))
    assert one[1] == 1
    own = {"data-path": "/data/a.jsonl", "partition-id": 3, "num-partitions": 9}
    assert partition_of(context({}, own)) == (3, 1)


def test_in_a_simulation_under_dp_nothing_about_the_client_is_shown(
    answer, capfd, caplog
):
    with caplog.at_level(logging.DEBUG, "fedllm"):
        answer(server_round=5)
    out, err = capfd.readouterr()
    assert "client 0" not in caplog.text
    assert "examples" not in caplog.text + out + err

    with caplog.at_level(logging.INFO, "fedllm"):
        answer(WITHOUT_DP, server_round=6)
    assert "client 0: round 6: 1 steps on 5 examples" in caplog.text


def test_a_clients_own_log_has_what_it_did_for_its_owner_only(answer, home):
    answer(server_round=5)

    log = (home / "logs" / "client-0.log").read_text()
    assert "run 1 client 0: round 5: 1 steps on 5 examples" in log
    assert stat.S_IMODE((home / "logs").stat().st_mode) == 0o700


def test_what_the_length_limit_cuts_is_said_once(answer, home):
    for _ in range(2):
        answer({"train.max-length": 120})

    log = (home / "logs" / "client-0.log").read_text()
    assert log.count("train.max-length 120 cut") == 1


EVALUATE = {
    **WITHOUT_DP,
    "data.held-out-fraction": 0.6,
    "strategy.fraction-evaluate": 1.0,
}


def test_without_dp_a_client_evaluates_on_rows_that_it_does_not_train_on(
    answer, arrays, monkeypatch
):
    seen = {}
    score, train = held_out_loss.held_out, sft.train_adapter

    def scored(model, examples, pad):
        seen["scored"] = [tuple(e["input_ids"]) for e in examples]
        return score(model, examples, pad)

    def trained(model, spec, tokenizer, examples, *rest):
        seen["trained"] = [tuple(e["input_ids"]) for e in examples]
        return train(model, spec, tokenizer, examples, *rest)

    monkeypatch.setattr(held_out_loss, "held_out", scored)
    monkeypatch.setattr(sft, "train_adapter", trained)
    reply = answer(EVALUATE, message_type="evaluate")
    assert values(answer(EVALUATE), arrays)

    assert set(reply.content) == {METRICS}
    read = read_reply(reply, {})
    assert read.eval_loss == pytest.approx(np.log(384), abs=0.5)
    assert read.num_examples == len(seen["scored"])
    assert seen["scored"] and seen["trained"]
    assert not set(seen["scored"]) & set(seen["trained"])
    assert len(seen["scored"] + seen["trained"]) == 5


def test_evaluation_looks_at_no_more_examples_than_asked_for(answer):
    changes = {**EVALUATE, "strategy.evaluate-examples": 1}

    reply = answer(changes, message_type="evaluate")

    assert read_reply(reply, {}).num_examples == 1


def test_a_client_without_held_out_rows_says_so(answer):
    reply = answer(WITHOUT_DP, message_type="evaluate")

    assert code_of(reply) == "no-data"
    assert "no held-out example" in text_of(reply)


def test_under_dp_a_client_refuses_to_evaluate(answer):
    assert code_of(answer(message_type="evaluate")) == "bad-config"


def test_a_refused_floor_reaches_the_server_as_a_code(answer):
    assert code_of(answer(node={**NODE, "max-epsilon": 1.0})) == "bad-config"
    assert (
        code_of(answer(WITHOUT_DP, {**NODE, "privacy-unit": "client"})) == "bad-config"
    )
    assert ARRAYS in answer(node={**NODE, "max-epsilon": 8.0}).content


FIXED_NOISE = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}


@pytest.mark.parametrize(
    ("node", "run", "refused"),
    [
        ({"privacy-unit": "client"}, {}, None),
        ({"privacy-unit": "client"}, WITHOUT_DP, "privacy.unit"),
        ({"privacy-unit": "record"}, {}, "privacy.unit"),
        ({"max-epsilon": 8.0}, {}, None),
        ({"max-epsilon": 8}, {}, None),
        ({"max-epsilon": 7.9}, {}, "privacy.target-epsilon"),
        ({"max-epsilon": 8.0}, WITHOUT_DP, "privacy.unit"),
        ({"max-epsilon": 8.0}, FIXED_NOISE, "privacy.target-epsilon"),
        ({"max-epsilon": 8.0}, {**FIXED_NOISE, "privacy.max-epsilon": 5.0}, None),
        (
            {"max-epsilon": 8.0},
            {**FIXED_NOISE, "privacy.max-epsilon": 9.0},
            "privacy.target-epsilon",
        ),
        ({"delta": 1e-5}, {"privacy.delta": 1e-6}, None),
        ({"delta": 1e-5}, {"privacy.delta": 1e-4}, "privacy.delta"),
        ({"delta": 1e-5}, {}, "privacy.delta"),
        ({"delta": 1e-5}, {**WITHOUT_DP, "privacy.delta": 1e-6}, "privacy"),
        ({}, WITHOUT_DP, None),
    ],
)
def test_no_run_can_loosen_a_nodes_floors(node, run, refused):
    config = parse_run_config(run)

    if refused is None:
        check_node_limits(node, config)
    else:
        with pytest.raises(ConfigError, match=f"{refused}.*this node demands"):
            check_node_limits(node, config)


def test_a_node_without_floors_takes_any_run():
    check_node_limits({}, RunConfig())


def test_an_error_reply_without_text_holds_the_code_alone():
    assert dict(error_content("failed", None).config_records[ERROR]) == {
        "code": "failed"
    }


@pytest.mark.parametrize("unit", ["none", "client", "record"])
def test_a_training_that_comes_too_late_is_given_up_and_says_so(answer, unit):
    late = {"privacy.unit": unit, "strategy.round-timeout": 1e-6}

    reply = answer({**late, "train.batch-size": 1})

    assert code_of(reply) == "time-limit"
    assert ("strategy.round-timeout" in text_of(reply)) == (unit == "none")
