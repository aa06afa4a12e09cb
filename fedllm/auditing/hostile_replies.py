"""The hostile replies of the audit: none may move a round's sum by more than the clipping norm.

A client controls each byte that it sends.
"""

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from fedllm.adapters.spec import Arrays
from fedllm.config import Encoding
from fedllm.wire.encoding import PACKED, pack
from fedllm.wire.masking import WIRE, WIRE_FORMAT
from fedllm.wire.messages import ARRAYS, ERROR, METRICS, array_record, error_content

Content = RecordDict | Error


def hostile_replies(reference: Arrays, clipping_norm: float) -> dict[str, Content]:
    """Return kind -> content of a reply.

    Args:
        reference: The global adapter; at least two arrays, the first of two dimensions.
        clipping_norm: C, which the server does not send but an attacker may know.
    """
    replies: dict[str, Content] = {
        kind: RecordDict({ARRAYS: array_record(arrays)})
        for kind, arrays in hostile_arrays(reference, clipping_norm).items()
    }
    first = next(iter(reference))
    for kind, item in _items(reference[first]).items():
        arrays = {name: Array(value + 9) for name, value in reference.items()}
        replies[kind] = RecordDict({ARRAYS: ArrayRecord({**arrays, first: item})})
    far = array_record({name: value + 9 for name, value in reference.items()})
    for claim in (2**31, -1, 0.5, float("nan")):
        metrics = MetricRecord({"num-examples": claim, "train-loss": claim})
        replies[f"claims {claim} examples"] = RecordDict(
            {ARRAYS: far, METRICS: metrics}
        )
    for kind, record in _wire_records().items():
        replies[kind] = RecordDict({ARRAYS: far, WIRE: record})
    replies["nothing"] = RecordDict()
    replies["no arrays"] = RecordDict({ARRAYS: ArrayRecord()})
    replies["an error of Flower's"] = Error(code=1, reason="a secret")
    replies["an error code"] = error_content("no-data", None)
    replies["an error code of its own"] = RecordDict({ERROR: ConfigRecord({"code": 7})})
    return replies


def _wire_records() -> dict[str, ConfigRecord]:
    """Return what a reply may claim of its format and its mask, none of it honest."""
    return {
        "no format": ConfigRecord(),
        "another format": ConfigRecord({"format": 1, "nonce": bytes(16)}),
        "a format in words": ConfigRecord({"format": "2", "nonce": bytes(16)}),
        "no nonce": ConfigRecord({"format": WIRE_FORMAT}),
        "a short nonce": ConfigRecord({"format": WIRE_FORMAT, "nonce": bytes(15)}),
        "a long nonce": ConfigRecord({"format": WIRE_FORMAT, "nonce": bytes(10**6)}),
        "a nonce in words": ConfigRecord({"format": WIRE_FORMAT, "nonce": "0" * 16}),
        "a nonce and no mask": ConfigRecord(
            {"format": WIRE_FORMAT, "nonce": bytes(16)}
        ),
    }


def packed_replies(reference: Arrays, encoding: Encoding) -> dict[str, Content]:
    """Return kind -> content of a reply with a packed update.

    Args:
        reference: The global adapter.
        encoding: `float16` or `int8`.
    """
    far = {name: np.full_like(value, 9) for name, value in reference.items()}
    good = pack(far, encoding, np.random.default_rng(0))
    scales = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -1.0)
    head = {f"begins with {value}": np.float32(value).tobytes() for value in scales}
    damaged = {
        kind: np.frombuffer(start + good.tobytes()[len(start) :], np.uint8)
        for kind, start in head.items()
    }
    packed: dict[str, npt.NDArray[Any]] = {
        "far": good,
        **damaged,
        "no bit set": np.zeros_like(good),
        "every bit set": np.full_like(good, 255),
        "a byte missing": good[:-1],
        "a byte too many": np.append(good, good[:1]),
        "floats for bytes": good.astype(np.float32),
        "signed bytes": good.view(np.int8),
        "in two dimensions": good[None],
    }
    contents: dict[str, Content] = {
        f"{encoding}: {kind}": RecordDict({ARRAYS: array_record({PACKED: value})})
        for kind, value in packed.items()
    }
    named = RecordDict({ARRAYS: array_record(far)})
    twice = RecordDict({ARRAYS: array_record({PACKED: good, "another": good})})
    return {
        **contents,
        f"{encoding}: not packed": named,
        f"{encoding}: packed twice": twice,
    }


def hostile_arrays(
    reference: Arrays, clipping_norm: float
) -> dict[str, Mapping[str, npt.NDArray[Any]]]:
    """Return replies that decode as arrays: of wrong form, and of right form but too large."""
    first, second = list(reference)[:2]
    far = {name: value + np.float32(9) for name, value in reference.items()}
    size = sum(value.size for value in reference.values())

    def moved(amount: float) -> dict[str, npt.NDArray[Any]]:
        return {k: v.astype(np.float64) + amount for k, v in reference.items()}

    def of_type(kind: str) -> dict[str, npt.NDArray[Any]]:
        return {k: v.astype(kind) for k, v in far.items()}

    def with_value(value: float) -> dict[str, npt.NDArray[Any]]:
        damaged = far[first].copy()
        damaged.flat[0] = value
        return {**far, first: damaged}

    return {
        "the same adapter": reference,
        "all zeros": {k: np.zeros_like(v) for k, v in reference.items()},
        "far along the others": moved(1e6 * clipping_norm),
        "far against the others": moved(-1e6 * clipping_norm),
        "just within the clip": moved(0.999999 * clipping_norm / size**0.5),
        "every value just within the clip": moved(0.999999 * clipping_norm),
        "every array just within the clip": {
            k: v + 0.999999 * clipping_norm / np.float64(v.size) ** 0.5
            for k, v in reference.items()
        },
        "rescaled": {k: v * np.float32(1e6) for k, v in reference.items()},
        "huge": {k: np.full_like(v, 3e38) for k, v in reference.items()},
        "huge doubles": {k: np.full(v.shape, 1.7e308) for k, v in reference.items()},
        "tiny": {k: np.full_like(v, 1e-45) for k, v in reference.items()},
        "one value is NaN": with_value(np.nan),
        "one value is infinite": with_value(-np.inf),
        "all NaN": {k: np.full_like(v, np.nan) for k, v in reference.items()},
        "reordered": dict(reversed(far.items())),
        "one array missing": {second: far[second]},
        "one array too many": {**far, "another": np.ones(3, np.float32)},
        "one array renamed": {second: far[second], "another": far[first]},
        "transposed": {**far, first: np.ascontiguousarray(far[first].T)},
        "broadcastable": {k: np.ones((1,) * v.ndim, "f4") for k, v in far.items()},
        "without dimensions": {**far, first: np.array(9.0, np.float32)},
        "empty arrays": {k: np.zeros(0, np.float32) for k in reference},
        "half precision": of_type("<f2"),
        "doubles": of_type("<f8"),
        "the other byte order": of_type(">f4"),
        "column by column": {k: np.asfortranarray(v) for k, v in far.items()},
        "integers": of_type("<i8"),
        "truth values": of_type("?"),
        "complex": of_type("<c8"),
        "long doubles": {k: v.astype(np.longdouble) for k, v in far.items()},
        "text": of_type("<U8"),
    }


def _items(value: npt.NDArray[np.float32]) -> dict[str, Array]:
    """Return items in place of one array whose bytes may not decode at all."""
    good = Array(value + np.float32(9)).data
    header = good[: len(good) - value.nbytes]

    def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
        return Array(dtype="float32", shape=value.shape, stype=stype, data=data)

    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 9), }\n"
    code = b"__import__('os').abort()\n"

    def framed(text: bytes) -> bytes:
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    return {
        "bytes cut": raw(good[:-1]),
        "bytes too many": raw(good + bytes(4)),
        "a header without values": raw(header),
        "no bytes": raw(b""),
        "a pickle": raw(pickle.dumps(value)),
        "pickled objects": raw(good.replace(b"<f4", b"|O ", 1)),
        "a header that claims terabytes": raw(framed(huge)),
        "a header that is code": raw(framed(code)),
        "a zip archive": raw(b"PK\x03\x04" + bytes(100)),
        "another serialisation": raw(good, "pickle"),
    }
