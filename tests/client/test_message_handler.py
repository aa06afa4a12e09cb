import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.config_parsing import parse_run_config
from fedllm.evaluation import held_out_loss
from fedllm.models.location import load_config
from fedllm.training import sft
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    WIRE_FORMAT_KEY,
    array_record,
    read_reply,
)
from tests.helpers.client_replies import (
    NODE,
    RECORD,
    WITHOUT_DP,
    code_of,
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

    def scored(model, examples, pad, config):
        seen["scored"] = [tuple(e["input_ids"]) for e in examples]
        return score(model, examples, pad, config)

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


@pytest.mark.parametrize("changes", [{}, WITHOUT_DP, RECORD])
def test_a_node_of_a_smaller_rank_sends_zero_for_the_columns_that_it_does_not_train(
    answer, arrays, home, changes
):
    """Its reply has the same form, so that nothing of the node is in its size."""
    whole = values(answer(changes), arrays)
    got = values(answer(changes, {**NODE, "adapter-rank": 1}), arrays)

    for name, value in got.items():
        assert value.shape == whole[name].shape
        update = value - arrays[name]
        assert np.abs(update[:, 0]).max() > 0
        assert not update[:, 1:].any()
        assert np.abs((whole[name] - arrays[name])[:, 1:]).max() > 0
    log = (home / "logs" / "client-0.log").read_text()
    assert "adapter-rank: it trains the first 1 of the run's 2 columns" in log


def test_weight_decay_and_a_start_leave_the_other_columns_as_they_were(answer, arrays):
    start = {name: value + np.float32(0.5) for name, value in arrays.items()}
    adam = {"train.optimizer": "adamw", "train.weight-decay": 0.1}
    instructed = train_instruction(start, learning_rate=0.01)

    got = values(answer(adam, {**NODE, "adapter-rank": 1}, instructed), arrays)

    for name, value in got.items():
        assert (value[:, 1:] == start[name][:, 1:]).all()
        assert (value[:, :1] != start[name][:, :1]).any()


def test_a_run_of_another_kind_and_a_larger_rank_is_refused_before_it_is_charged(
    answer, arrays, home
):
    node = {**NODE, "adapter-rank": 1, "max-epsilon": 8.0}

    assert code_of(answer({"adapter.kind": "lora"}, node)) == "bad-config"
    assert not (home / "ledgers").exists()
