import io
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.wire.masking import MASKED, OTHER_VERSION, WIRE, WIRE_FORMAT, masked
from fedllm.wire.messages import (
    ARRAYS,
    CLIENT_PHASES,
    ERROR,
    ERROR_CODES,
    METRICS,
    array_record,
    error_content,
    read_declared_rows,
    read_global,
    read_reply,
    read_sum,
)
from tests.helpers.flower_messages import reply

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,)}

GOOD = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, np.float32),
}


def npy(header: bytes | None = None, body: bytes = b"", **fields: Any) -> bytes:
    """Return bytes in NumPy's format with a header of our own making."""
    stream = io.BytesIO()
    if header is None:
        about = {"descr": "<f4", "fortran_order": False, "shape": (2, 3), **fields}
        np.lib.format.write_array_header_1_0(stream, about)
    else:
        stream.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return stream.getvalue() + body


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(2, 3), stype=stype, data=data)


def with_a(item: Array) -> RecordDict:
    """Return a good reply but for its array `a`."""
    return RecordDict({ARRAYS: ArrayRecord({"a": item, "b": Array(GOOD["b"])})})


def test_a_good_reply_is_read_by_name_whatever_its_order():
    content = RecordDict({ARRAYS: array_record(dict(reversed(GOOD.items())))})
    content[METRICS] = MetricRecord({"num-examples": 12, "train-loss": 1.5})

    got = read_reply(reply(content, node_id=9), SHAPES)

    assert got.code is None
    assert got.node_id == 9
    assert list(got.arrays) == ["a", "b"]
    for name, value in GOOD.items():
        np.testing.assert_array_equal(got.arrays[name], value)
    assert (got.num_examples, got.train_loss, got.eval_loss) == (12, 1.5, None)
    assert got.num_bytes > 40


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_float_type_and_memory_order_gives_the_same_values(dtype, order):
    value = np.asarray(GOOD["a"], dtype=dtype, order=order)

    got = read_reply(reply(with_a(Array(value))), SHAPES)

    np.testing.assert_array_equal(got.arrays["a"], GOOD["a"])


def test_non_finite_values_are_handed_on_for_the_mechanism_to_judge():
    value = np.array([[np.nan, np.inf, -np.inf], [0, 0, 0]], np.float32)

    got = read_reply(reply(with_a(Array(value))), SHAPES)

    np.testing.assert_array_equal(got.arrays["a"], value)


HOSTILE = {
    "an integer type": Array(np.ones((2, 3), np.int64)),
    "a boolean type": Array(np.ones((2, 3), bool)),
    "a complex type": Array(np.ones((2, 3), np.complex64)),
    "a long double": Array(np.ones((2, 3), np.longdouble)),
    "text": Array(np.full((2, 3), "x")),
    "a record type": raw(npy(descr=[("x", "<f4")], body=bytes(24))),
    "another shape": Array(np.ones((3, 2), np.float32)),
    "one more dimension": Array(np.ones((1, 2, 3), np.float32)),
    "no dimension": Array(np.array(1.0, np.float32)),
    "no value": Array(np.ones((0, 3), np.float32)),
    "pickle bytes": raw(pickle.dumps(GOOD["a"])),
    "pickled objects in NumPy's format": raw(npy(descr="|O", body=pickle.dumps([1]))),
    "a header that claims a huge shape": raw(npy(shape=(2**40, 2**20))),
    "a header that claims a negative shape": raw(npy(shape=(-2, -3), body=bytes(24))),
    "a header that is no mapping": raw(npy(b"[1, 2]\n")),
    "a header that is code": raw(npy(b"__import__('os').abort()\n")),
    "a deeply nested header": raw(npy(b"(" * 900 + b"\n")),
    "cut bytes": raw(npy(body=bytes(23))),
    "bytes too many": raw(npy(body=bytes(28))),
    "a cut header": raw(npy()[:20]),
    "no bytes": raw(b""),
    "format version 2": raw(npy(body=bytes(24)).replace(b"Y\x01", b"Y\x02", 1)),
    "a zip archive": raw(b"PK\x03\x04" + bytes(100)),
    "a megabyte of padding": raw(npy(body=bytes(1_000_000))),
}


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize("item", HOSTILE.values(), ids=HOSTILE.keys())
def test_an_array_that_is_not_the_declared_one_makes_the_reply_malformed(item):
    got = read_reply(reply(with_a(item)), SHAPES)

    assert got.code == "malformed"
    assert got.arrays is None
    assert got.text


@pytest.mark.parametrize("stype", ["pickle", "numpy.ndarray", "", MASKED + "x"])
def test_an_array_in_another_serialisation_is_not_decoded(stype):
    content = masked(with_a(Array(GOOD["a"])))
    array = content.array_records[ARRAYS]["a"]
    forged = Array(array.dtype, array.shape, stype, array.data)
    content.array_records[ARRAYS]["a"] = forged

    got = read_reply(reply(content), SHAPES)

    assert (got.code, got.text) == (
        "malformed",
        f"array a is not serialised as {MASKED}",
    )


@pytest.mark.parametrize("nonce", [None, b"", bytes(15), bytes(17), "0" * 16, 1, [1]])
def test_a_reply_with_an_odd_nonce_is_malformed(nonce):
    content = masked(RecordDict({ARRAYS: array_record(GOOD)}))
    about = {"format": WIRE_FORMAT, "nonce": nonce}
    content[WIRE] = ConfigRecord({k: v for k, v in about.items() if v is not None})

    got = read_reply(reply(content), SHAPES)

    assert (got.code, got.arrays) == ("malformed", None)
    assert "nonce" in got.text


@pytest.mark.parametrize("number", [None, 1, 3, True, 2.0, "2", b"2", 2**62, []])
@pytest.mark.parametrize("failed", [False, True])
def test_a_reply_in_another_format_says_which_version_to_install(number, failed):
    content = masked(RecordDict({ARRAYS: array_record(GOOD)}))
    if failed:
        content = error_content("no-data", None)
    about = {"nonce": bytes(16), "format": number}
    content[WIRE] = ConfigRecord({k: v for k, v in about.items() if v is not None})

    got = read_reply(reply(content), SHAPES)

    assert got.code == OTHER_VERSION
    assert "install the server's version" in got.text


def test_another_nonce_than_the_senders_gives_no_arrays():
    content = masked(RecordDict({ARRAYS: array_record(GOOD)}))
    content[WIRE] = masked(RecordDict())[WIRE]

    assert read_reply(reply(content), SHAPES).code == "malformed"


def test_bytes_that_cannot_be_the_declared_array_are_not_decoded():
    got = read_reply(reply(with_a(HOSTILE["a megabyte of padding"])), SHAPES)

    assert got.text == "array a is too large"


def test_pickled_bytes_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "hit"), "w"))

    for data in (pickle.dumps(Bomb()), npy(descr="|O", body=pickle.dumps(Bomb()))):
        assert read_reply(reply(with_a(raw(data))), SHAPES).code == "malformed"

    assert not (tmp_path / "hit").exists()


def test_a_claimed_shape_costs_no_memory():
    message = reply(with_a(raw(npy(shape=(2**28,)))))
    tracemalloc.start()
    try:
        read_reply(message, SHAPES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1_000_000


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": GOOD["a"]},
        {**GOOD, "c": np.ones(1, np.float32)},
        {"a": GOOD["a"], "B": GOOD["b"]},
        {},
    ],
    ids=["missing", "extra", "renamed", "none"],
)
def test_other_names_than_the_declared_ones_make_the_reply_malformed(arrays):
    got = read_reply(reply(RecordDict({ARRAYS: array_record(arrays)})), SHAPES)

    assert (got.code, got.arrays) == ("malformed", None)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"weights": array_record(GOOD)}),
        RecordDict({ARRAYS: MetricRecord({"a": 1.0})}),
        RecordDict({ARRAYS: ConfigRecord({"a": "b"})}),
        RecordDict({METRICS: MetricRecord({"num-examples": 3})}),
    ],
)
def test_a_reply_without_the_record_of_arrays_is_malformed(content):
    assert read_reply(reply(content), SHAPES).code == "malformed"


def test_a_sum_is_read_to_the_last_bit():
    largest = 2**63 - 1
    whole = {"a": np.array([[0, -1, largest], [1, 2, -largest]]), "b": np.arange(4)}

    got = read_sum(reply(RecordDict({ARRAYS: array_record(whole)})), SHAPES)

    assert got.code is None
    assert got.num_bytes > 8 * 10
    for name, value in whole.items():
        assert got.arrays[name].dtype == np.int64
        np.testing.assert_array_equal(got.arrays[name], value)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<u8", "|b1", "<c8", "<M8[s]"])
def test_a_sum_that_is_not_of_integers_is_malformed(dtype):
    wrong = {"a": np.zeros((2, 3), dtype), "b": np.zeros(4, np.int64)}

    got = read_sum(reply(RecordDict({ARRAYS: array_record(wrong)})), SHAPES)

    assert (got.code, got.arrays) == ("malformed", None)


@pytest.mark.parametrize(
    "record",
    [
        array_record(GOOD),
        array_record({"a": np.zeros((2, 3), np.int64)}),
        array_record({"a": np.zeros((2, 2), np.int64), "b": np.zeros(4, np.int64)}),
        ArrayRecord(),
    ],
)
def test_what_is_not_the_declared_sum_is_malformed(record):
    got = read_sum(reply(RecordDict({ARRAYS: record})), SHAPES)

    assert (got.code, got.arrays) == ("malformed", None)


def test_a_million_arrays_are_refused_before_one_is_looked_at():
    class Million(ArrayRecord):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, name: str) -> Array:
            raise AssertionError("looked at")

        def __iter__(self):
            raise AssertionError("looked at")

        def get(self, name: str, default: Any = None) -> Any:
            raise AssertionError("looked at")

    content = masked(RecordDict())
    content[ARRAYS] = Million()

    got = read_reply(reply(content), SHAPES)

    assert got.code == "malformed"
    assert "1000000 arrays" in got.text


@pytest.mark.parametrize(
    ("count", "loss"),
    [
        (0, -1.0),
        (-5, float("nan")),
        (2**62, float("inf")),
        (1.5, 1e300),
        ([3, 4], [1.0]),
        (float("nan"), 10**18),
    ],
)
def test_absurd_metrics_are_as_good_as_none_and_the_arrays_are_kept(count, loss):
    content = RecordDict({ARRAYS: array_record(GOOD)})
    content[METRICS] = MetricRecord(
        {"num-examples": count, "train-loss": loss, "eval-loss": loss}
    )

    got = read_reply(reply(content), SHAPES)

    assert got.code is None
    assert (got.num_examples, got.train_loss, got.eval_loss) == (None, None, None)


@pytest.mark.parametrize("absurd", [None, -1.0, float("nan"), 1e300, [1.0]])
def test_seconds_count_only_where_every_phase_is_credible(absurd):
    told = {f"seconds-{phase}": 1.5 for phase in CLIENT_PHASES}
    content = RecordDict({ARRAYS: array_record(GOOD), METRICS: MetricRecord(told)})
    assert read_reply(reply(content), SHAPES).seconds == dict.fromkeys(
        CLIENT_PHASES, 1.5
    )

    told["seconds-train"] = absurd
    told = {name: value for name, value in told.items() if value is not None}
    content = RecordDict({ARRAYS: array_record(GOOD), METRICS: MetricRecord(told)})

    got = read_reply(reply(content), SHAPES)
    assert got.code is None
    assert got.seconds == {}


def test_an_evaluation_reply_needs_no_arrays():
    metrics = MetricRecord({"num-examples": 3, "eval-loss": 2.5})

    got = read_reply(reply(RecordDict({METRICS: metrics})), {})

    assert (got.code, got.num_examples, got.eval_loss) == (None, 3, 2.5)


@pytest.mark.parametrize("code", ERROR_CODES)
def test_a_clients_code_and_words_come_back(code):
    got = read_reply(reply(error_content(code, "why")), SHAPES)

    assert (got.code, got.text, got.arrays) == (code, "why", None)


@pytest.mark.parametrize("code", ["malformed", "", "x" * 10**6, 3, 1.5, b"failed", []])
def test_a_code_out_of_the_closed_list_counts_as_failed(code):
    content = RecordDict({ERROR: ConfigRecord({"code": code})})

    assert read_reply(reply(content), SHAPES).code == "failed"


def test_an_error_wins_over_arrays_sent_along():
    content = error_content("no-data", None)
    content[ARRAYS] = array_record(GOOD)

    got = read_reply(reply(content), SHAPES)

    assert (got.code, got.arrays) == ("no-data", None)


def test_a_megabyte_of_words_is_cut_by_sender_and_reader():
    sent = error_content("failed", "x" * 1_000_000)
    assert len(sent.config_records[ERROR]["text"]) == 2000
    content = RecordDict({ERROR: ConfigRecord({"code": "failed", "text": "x" * 10**6})})

    assert len(read_reply(reply(content), SHAPES).text) == 300
    assert len(read_reply(reply(Error(0, "x" * 10**6)), SHAPES).text) == 300


def test_flowers_own_error_counts_as_failed():
    got = read_reply(reply(Error(1, "the process died")), SHAPES)

    assert (got.code, got.text) == ("failed", "the process died")
    assert read_reply(reply(Error(1, None)), SHAPES).text == ""


def test_what_is_no_message_at_all_is_malformed():
    assert read_reply(None, SHAPES).code == "malformed"  # type: ignore[arg-type]


HEADERS = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda *parts: repr(
            dict(zip(("descr", "fortran_order", "shape"), parts, strict=True))
        ),
        st.sampled_from(["<f4", "<f8", "|O", "<i8", "<U9", "|V8", "", 3, None, ["x"]]),
        st.sampled_from([True, False, None, 2]),
        st.one_of(
            st.just((2, 3)),
            st.tuples(st.integers(-(2**70), 2**70), st.integers(-4, 4)),
            st.sampled_from([(), 6, None, (2.0, 3.0), "23"]),
        ),
    ).map(str.encode),
)

ITEMS = st.one_of(
    st.sampled_from(list(HOSTILE.values())),
    st.builds(raw, st.binary(max_size=300), st.sampled_from(["numpy.ndarray", ""])),
    st.builds(lambda h, b: raw(npy(h, b)), HEADERS, st.binary(max_size=60)),
)

SCALARS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
NAMES = st.sampled_from(["a", "b", "num-examples", "train-loss", "code", "text", "é"])

RECORDS = st.one_of(
    st.dictionaries(NAMES, ITEMS, max_size=3).map(ArrayRecord),
    st.dictionaries(NAMES, SCALARS, max_size=3).map(MetricRecord),
    st.dictionaries(
        NAMES, st.one_of(SCALARS, st.text(), st.binary(), st.booleans()), max_size=3
    ).map(ConfigRecord),
)


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([ARRAYS, METRICS, ERROR, "x", WIRE]), RECORDS))
def test_reading_never_raises_and_gives_declared_arrays_or_a_code(content):
    message = reply(RecordDict(content))
    assert read_declared_rows(message) is None

    for got, kind in (
        (read_reply(message, SHAPES), "f"),
        (read_sum(message, SHAPES), "i"),
    ):
        if got.code is None:
            assert {name: a.shape for name, a in got.arrays.items()} == SHAPES
            assert all(a.dtype.kind == kind for a in got.arrays.values())
        else:
            assert got.arrays is None
            assert got.code in (*ERROR_CODES, "malformed", OTHER_VERSION)


def test_the_servers_arrays_are_refused_with_what_is_wrong():
    assert set(read_global(array_record(GOOD), SHAPES)) == set(SHAPES)
    with pytest.raises(ValueError, match=r"adapter cannot be used: array a has shape"):
        read_global(array_record({**GOOD, "a": np.ones(6, np.float32)}), SHAPES)


def test_an_error_reply_without_text_holds_the_code_alone():
    record = error_content("failed", None).config_records[ERROR]
    assert set(record) == {"code", "nonce"} and record["code"] == "failed"
