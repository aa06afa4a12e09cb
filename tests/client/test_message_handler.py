import logging
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.client import message_handler
from fedllm.config import parse_run_config
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError
from fedllm.evaluation import held_out_loss
from fedllm.models.loading import load_config
from fedllm.training import sft
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    ERROR,
    METRICS,
    WIRE_FORMAT_KEY,
    array_record,
    own_config,
    read_declared_rows,
    read_reply,
    read_sum,
)
from tests.helpers.client_replies import (
    JOINT,
    NODE,
    NUMBERS,
    RECORD,
    WITHOUT_DP,
    code_of,
    epsilon_of,
    text_of,
    values,
)
from tests.helpers.flower_messages import instruction, train_instruction
from tests.helpers.flower_objects import object_ids

SECRET = "patient-4711"


def test_under_dp_a_reply_holds_the_trained_arrays_and_nothing_else(answer, arrays):
    reply = answer()

    assert set(reply.content) == {ARRAYS, WIRE}
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
    assert set(reply.content) == {ARRAYS, METRICS, WIRE}
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


def test_under_record_a_reply_holds_arrays_and_epsilon_and_nothing_else(answer, arrays):
    one, two = answer(RECORD), answer(RECORD, server_round=2)

    assert 0 < epsilon_of(one) < epsilon_of(two) <= 8.0
    got = values(one, arrays)
    assert max(np.abs(got[name] - arrays[name]).max() for name in got) > 0
    assert any((values(answer(RECORD), arrays)[n] != got[n]).any() for n in got)


@pytest.mark.parametrize("kind", ["ia3", "vera", "lora-core"])
def test_if_the_run_config_has_auto_the_kind_is_the_one_that_the_server_names(
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


@pytest.mark.parametrize("unit", [{}, WITHOUT_DP, RECORD])
@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_two_replies_of_equal_data_share_no_object(answer, unit, encoding):
    changes = {**unit, "wire.encoding": encoding}
    one, two = (answer(changes, encoding=encoding) for _ in range(2))

    assert ARRAYS in one.content and ARRAYS in two.content
    assert not object_ids(one.content) & object_ids(two.content)


def test_two_evaluations_of_equal_data_share_no_object(answer):
    one, two = (answer(EVALUATE, message_type="evaluate") for _ in range(2))

    assert METRICS in one.content and METRICS in two.content
    assert not object_ids(one.content) & object_ids(two.content)


@pytest.mark.parametrize("unit", [{}, WITHOUT_DP, RECORD])
@pytest.mark.parametrize("error", [kind("x") for kind, _ in message_handler._CODES])
def test_two_failures_share_no_object(answer, monkeypatch, unit, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    one, two = answer(unit), answer(unit)

    assert ERROR in one.content and ERROR in two.content
    assert not object_ids(one.content) & object_ids(two.content)


@pytest.mark.parametrize("read", [None, 1, 3, "2"])
def test_a_server_that_reads_another_format_is_told_to_install_one_version(
    answer, arrays, read
):
    message = train_instruction(arrays)
    record = message.content.config_records[CONFIG]
    del record[WIRE_FORMAT_KEY]
    if read is not None:
        record[WIRE_FORMAT_KEY] = read

    reply = answer(WITHOUT_DP, message=message)

    assert code_of(reply) == "bad-config"
    assert "install the same version on both" in text_of(reply)


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
    assert set(reply.content.config_records[ERROR]) == {"code", "nonce"}
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


def test_running_out_of_memory_on_a_cpu_has_the_code_of_an_accelerators(
    answer, monkeypatch
):
    def fail(*args: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(message_handler, "_train", fail)

    assert code_of(answer()) == "out-of-memory"


@pytest.mark.parametrize(
    "changes", [{"train.batch-size": -1}, {"nonsense": 1}, {"privacy.unit": "nobody"}]
)
def test_a_bad_run_config_is_a_code_and_counts_as_private(answer, changes):
    reply = answer(changes)

    assert code_of(reply) == "bad-config" and text_of(reply) == ""


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

    def trained(adapted, examples, *rest):
        seen["trained"] = [tuple(e["input_ids"]) for e in examples]
        return train(adapted, examples, *rest)

    monkeypatch.setattr(held_out_loss, "held_out", scored)
    monkeypatch.setattr(sft, "train_adapter", trained)
    reply = answer(EVALUATE, message_type="evaluate")
    assert values(answer(EVALUATE), arrays)

    assert set(reply.content) == {METRICS, WIRE}
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


def test_a_client_without_held_out_rows_replies_no_data(answer):
    reply = answer(WITHOUT_DP, message_type="evaluate")

    assert code_of(reply) == "no-data"
    assert "no held-out example" in text_of(reply)


def test_under_dp_a_client_refuses_to_evaluate(answer):
    assert code_of(answer(message_type="evaluate")) == "bad-config"


@pytest.mark.parametrize("unit", ["none", "client", "record"])
def test_a_training_that_passes_the_deadline_stops_with_a_code_of_its_own(answer, unit):
    late = {"privacy.unit": unit, "strategy.round-timeout": 1e-6}

    reply = answer({**late, "train.batch-size": 1})

    assert code_of(reply) == "time-limit"
    assert ("strategy.round-timeout" in text_of(reply)) == (unit == "none")


def test_a_joint_reply_is_the_sum_in_integers_and_nothing_else(answer, arrays):
    # Two rows of two: every coin falls for its row.
    reply = answer(JOINT, **{**NUMBERS, "total_rows": 2})

    assert set(reply.content) == {ARRAYS, WIRE}
    read = read_sum(reply, {name: value.shape for name, value in arrays.items()})
    assert read.code is None
    assert any(value.any() for value in (read.arrays or {}).values())


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_a_joint_reply_has_the_same_form_for_every_batch_and_every_file(
    answer, arrays, tmp_path, encoding
):
    """Also for an empty batch, and for a file in which nothing can be learned from."""

    def form(node: dict[str, Any], total_rows: int) -> Any:
        numbers = {**NUMBERS, "total_rows": total_rows}
        packed = {**JOINT, "wire.encoding": encoding}
        reply = answer(packed, node, encoding=encoding, **numbers)
        assert set(reply.content) == {ARRAYS, WIRE}
        sent = reply.content.array_records[ARRAYS]
        return [(name, a.dtype, a.shape, len(a.data)) for name, a in sent.items()]

    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"instruction": ""}\nno JSON\n')
    usual = form(NODE, 2)

    assert [name for name, *_ in usual] == sorted(arrays)
    assert form({**NODE, "partition-id": 1}, 2**30) == usual
    assert form({"data-path": str(useless)}, 2) == usual


def test_the_rows_that_are_declared_are_the_owners_or_a_partitions(
    answer, data_file, limits
):
    def declared(node: dict[str, Any], changes: dict[str, Any] = JOINT) -> Message:
        content = RecordDict({CONFIG: own_config({})})
        return answer(changes, node, instruction(content, message_type="query"))

    own = {"data-path": str(data_file)}
    joint = {**limits, "privacy-noise": "joint"}

    assert read_declared_rows(declared(NODE)) == 5
    for more in ({}, joint):
        reply = declared({**own, **more, "declared-rows": 7})
        assert set(reply.content) == {METRICS, WIRE}
        assert read_declared_rows(reply) == 7
    for node in (own, {**NODE, **joint}, {**own, **limits, "declared-rows": 7}):
        assert code_of(declared(node)) == "bad-config"
    assert code_of(declared(NODE, RECORD)) == "bad-config"
