import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.wire.masking import MASKED, WIRE, Mask, mask_of, masked
from fedllm.wire.messages import (
    ARRAYS,
    ERROR,
    ERROR_CODES,
    METRICS,
    array_record,
    error_content,
    read_reply,
)
from tests.helpers.flower_messages import reply
from tests.helpers.flower_objects import object_ids

PIECE = 5 * 2**20

SMALL = st.integers(1, 8).map(lambda size: np.zeros(size, np.float32))
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from("abc"), SMALL, min_size=1).map(array_record),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)).map(MetricRecord),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 3)).map(ConfigRecord),
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([ARRAYS, METRICS, ERROR, "x"]), RECORDS))
def test_two_replies_of_equal_records_share_no_object(records):
    one, two = masked(RecordDict(records)), masked(RecordDict(records))

    assert set(one) == set(two) == {*records, WIRE}
    assert not object_ids(one) & object_ids(two)
    assert not object_ids(one) & object_ids(RecordDict(records))


@pytest.mark.parametrize("code", ERROR_CODES)
@pytest.mark.parametrize("text", [None, "why"])
def test_two_failures_of_one_code_share_no_object(code, text):
    one, two = error_content(code, text), error_content(code, text)

    assert not object_ids(one) & object_ids(two)


def test_no_piece_of_a_large_array_is_shared_with_another_reply_or_another_piece():
    # Two whole pieces of zeros and a part of a third.
    content = RecordDict({ARRAYS: array_record({"a": np.zeros(PIECE // 2, "f4")})})

    one, two = masked(content), masked(content)

    pieces = [set(c.array_records[ARRAYS]["a"].children) for c in (one, two)]
    assert [len(p) for p in pieces] == [3, 3]
    assert not pieces[0] & pieces[1]


def test_what_is_masked_comes_back_by_the_servers_order_of_names():
    values = {"b": np.arange(3, dtype="f4"), "a": np.full((2, 2), 7, np.float32)}
    content = masked(RecordDict({ARRAYS: array_record(values)}))
    assert {array.stype for array in content.array_records[ARRAYS].values()} == {MASKED}

    for names in ("ab", "ba"):
        read = read_reply(reply(content), {name: values[name].shape for name in names})
        assert list(read.arrays) == list(names)
        for name in names:
            np.testing.assert_array_equal(read.arrays[name], values[name])


def test_a_mask_is_its_own_inverse_over_any_cut_of_the_stream():
    data = np.random.default_rng(0).bytes(1000)
    mask, back = Mask(bytes(16)), Mask(bytes(16))

    sent = mask.apply(data[:7]) + mask.apply(data[7:])

    assert sent != data
    assert back.apply(sent[:500]) + back.apply(sent[500:]) == data


def test_the_entries_of_a_record_are_kept_beside_its_nonce():
    content = masked(
        RecordDict(
            {METRICS: MetricRecord({"n": 3}), ERROR: ConfigRecord({"code": "x"})}
        )
    )

    assert content.metric_records[METRICS]["n"] == 3
    assert content.config_records[ERROR]["code"] == "x"
    assert isinstance(mask_of(content), Mask)


def test_unmasking_goes_at_the_memorys_pace():
    data = bytes(64 * 2**20)
    content = RecordDict({ARRAYS: ArrayRecord({"a": Array("f", (1,), "", data)})})
    began = time.process_time()
    masked(content)

    # A tenth of what one core of 2015 does.
    assert time.process_time() - began < 64 / 200
