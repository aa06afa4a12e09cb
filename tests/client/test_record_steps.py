"""What leaves of a client under record level, with its own noise and with joint noise."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedllm.wire.masking import WIRE
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    own_config,
    read_declared_rows,
    read_sum,
)
from tests.helpers.client_replies import (
    JOINT,
    NODE,
    NUMBERS,
    RECORD,
    code_of,
    epsilon_of,
    values,
)
from tests.helpers.flower_messages import instruction


def test_under_record_a_reply_holds_arrays_and_epsilon_and_nothing_else(answer, arrays):
    one, two = answer(RECORD), answer(RECORD, server_round=2)

    assert 0 < epsilon_of(one) < epsilon_of(two) <= 8.0
    got = values(one, arrays)
    assert max(np.abs(got[name] - arrays[name]).max() for name in got) > 0
    assert any((values(answer(RECORD), arrays)[n] != got[n]).any() for n in got)


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
