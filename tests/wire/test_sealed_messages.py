"""What travels in a sealed round is read without trust in who sent it."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict

from fedllm.node.approvals import COUNTED_APART
from fedllm.privacy.agreement import Certificate
from fedllm.privacy.pads import SealingKey
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, array_record, read_declared_rows
from fedllm.wire.sealed_messages import (
    HELLO,
    PACKETS,
    SEALED,
    TALLY,
    adapter_digest,
    hello_content,
    read_certificate,
    read_has_data,
    read_packets,
    read_residues,
    read_unopened,
    sealed_content,
    tally_content,
)
from tests.helpers.flower_messages import reply

VALUES = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
PACKET = [b"a" * 80, b"b" * 80]
CERTIFICATE = Certificate(
    "r", "a", SealingKey.generate(post_quantum=False).public.hex(), 1000, "ab"
)


def test_nodes_count_these_questions_apart():
    assert {HELLO, TALLY} < set(COUNTED_APART)


def test_a_sealed_update_travels():
    message = reply(sealed_content(VALUES, PACKET))

    read, values = read_residues(message, 4)

    assert values.tolist() == VALUES.tolist()
    assert read.code is None
    assert read.num_bytes < 16 + 200
    assert read_packets(message, 2, 80) == tuple(PACKET)


def test_what_a_node_says_of_its_data_travels_and_is_read_without_trust():
    whole = reply(masked(hello_content(CERTIFICATE, True, 40)))
    alone = reply(masked(hello_content(CERTIFICATE, has_data=False)))

    assert read_has_data(whole) and not read_has_data(alone)
    assert (read_declared_rows(whole), read_declared_rows(alone)) == (40, None)
    assert read_certificate(whole) == read_certificate(alone) == CERTIFICATE
    # Whoever says something else is a client like any other, whose silence counts as zero.
    for content in (RecordDict(), RecordDict({SEALED: ConfigRecord({"has-data": 0})})):
        assert read_has_data(reply(content))


def test_a_trustees_answers_travel():
    opened = reply(tally_content(VALUES, ()))
    unopened = reply(tally_content(None, (0, 3)))

    assert read_residues(opened, 4)[1].tolist() == VALUES.tolist()
    assert read_unopened(opened, 4) == ()
    assert read_residues(unopened, 4)[1] is None
    assert read_unopened(unopened, 4) == (0, 3)
    assert read_unopened(unopened, 3) == (0,)


def test_a_certificate_travels():
    assert read_certificate(reply(hello_content(CERTIFICATE))) == CERTIFICATE
    assert read_certificate(reply(hello_content(None))) is None


@pytest.mark.parametrize(
    "content",
    [
        Error(1, "failed"),
        RecordDict(),
        RecordDict({SEALED: ConfigRecord({PACKETS: "x", "unopened": "x"})}),
        RecordDict({SEALED: ConfigRecord({PACKETS: [1, 2], "unopened": [-1, 4]})}),
        RecordDict({SEALED: ConfigRecord({PACKETS: [b"a" * 80]})}),
        RecordDict({SEALED: ConfigRecord({PACKETS: [b"a" * 80, b"b" * 81]})}),
        RecordDict({SEALED: ConfigRecord({"certificate": "[{}]"})}),
        RecordDict({SEALED: ConfigRecord({"certificate": "[]"})}),
        RecordDict({ARRAYS: array_record({SEALED: np.zeros(15, np.uint8)})}),
        RecordDict({ARRAYS: array_record({SEALED: np.zeros(16, np.int8)})}),
        RecordDict({ARRAYS: array_record({SEALED: np.zeros((4, 4), np.uint8)})}),
        RecordDict({ARRAYS: array_record({"other": np.zeros(16, np.uint8)})}),
        RecordDict({ARRAYS: ArrayRecord({SEALED: Array("u1", (16,), "x", b"")})}),
    ],
)
def test_what_is_of_another_form_is_read_as_nothing(content):
    message = reply(content)

    assert read_residues(message, 4)[1] is None
    assert read_packets(message, 2, 80) is None
    assert read_unopened(message, 4) == ()
    assert read_certificate(message) is None


def test_equal_updates_share_no_object():
    first, second = (masked(sealed_content(VALUES, PACKET)) for _ in range(2))

    data = [c.array_records[ARRAYS][SEALED].data for c in (first, second)]
    assert data[0] != data[1]


def test_every_part_of_an_adapter_is_in_its_digest():
    base = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    changed = [
        {"a": base["a"] * 2, "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
        {"a": base["a"].astype(np.float64), "b": base["b"]},
    ]

    digests = {adapter_digest(array_record(arrays)) for arrays in (base, *changed)}

    assert len(digests) == 6
    again = {"b": base["b"], "a": base["a"]}
    assert adapter_digest(array_record(again)) == adapter_digest(array_record(base))
