"""The records that travel between the apps, read without trust in the sender."""

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.config import Encoding
from fedllm.foreign_text import printable
from fedllm.wire.encoding import PACKED, pack, packed_size, unpack
from fedllm.wire.masking import MASKED, NONCE, WIRE_FORMAT, Mask, mask_of, masked

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
ERROR = "error"

DELIVER = "query.deliver"
"""Message type of what brings every node the released adapter after the last round."""

ADAPTER_KIND = "adapter-kind"
"""Entry of a message's config: the adapter kind that the server chose for `auto`."""

BASE_MODEL = "base-model"
"""Entry of a message's config: the digest of the server's base model."""

WIRE_FORMAT_KEY = "wire-format"
"""Entry of a message's config: the format in which the server reads replies."""

LEDGER_HEAD = "ledger-head"
"""Entry of a message's config: the end of the run's ledger, as `privacy.chain.Head` writes it."""

LEDGER_KEY = "ledger-key"
"""Entry beside it: the public key of the server that signed it."""

LEDGER_SIGNATURE = "ledger-signature"
"""Entry beside it: that signature, in hex digits."""

NOISE_MULTIPLIER = "noise-multiplier"
"""Entry of a message's config under `privacy.noise="joint"`: z, which the server will add."""

TOTAL_ROWS = "total-rows"
"""Entry beside it: how many rows all clients declared together."""

DECLARED_ROWS = "declared-rows"
"""Metric of the reply to the question before round 1: how many rows a client declares."""

CLIENT_PHASES = ("load", "tokenise", "build", "train", "encode")
"""The phases of a client's seconds, in order; sent without DP only."""

ERROR_CODES = (
    "no-data",
    "out-of-memory",
    "time-limit",
    "bad-config",
    "budget-spent",
    "not-approved",
    "failed",
)
"""All that a client may report of its failure under differential privacy."""

UNREADABLE = 0
"""Code of the error that stands for a reply that could not be inflated (in Flower: an
unknown error)."""

_MAX_HEADER_BYTES = 1024
_KINDS = {
    "f": "a float of at most 64 bits",
    "u": "bytes",
    "i": "an integer of at most 64 bits",
}
_USUAL = {"f": "<f4", "u": "|u1", "i": "<i8"}
_LARGEST_ITEM = {"f": 8, "u": 1, "i": 8}
_MAX_EXAMPLES = 2**31


@dataclass(frozen=True)
class Reply:
    """One client's reply, decoded as far as it can be trusted.

    Attributes:
        node_id: Who sent it.
        arrays: Name -> array for every declared name that decodes, of values, or of the
            update if the encoding packs; None on an error.
        num_examples: Examples behind the update; None if not sent or absurd.
        train_loss: Mean training loss; None if not sent or not finite.
        eval_loss: Loss on the client's own rows; None if not sent or not finite.
        epsilon: What the client reports to have spent; None if not sent or not finite.
        seconds: Phase -> seconds of CLIENT_PHASES; empty if not sent or absurd.
        code: None, or why there is no update: one of ERROR_CODES, `malformed` or
            `other-version`.
        text: The client's own words on its failure, for runs without DP only; printable,
            on one line and short, whoever makes a Reply of whatever was sent.
        num_bytes: Size of the arrays on the wire.
    """

    node_id: int
    arrays: Mapping[str, npt.NDArray[Any]] | None = None
    num_examples: int | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    epsilon: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    code: str | None = None
    text: str = ""
    num_bytes: int = 0

    def __post_init__(self) -> None:
        # Here, and not where it is shown, so that no later reader can forget it.
        object.__setattr__(self, "text", printable(self.text))


def short_name(node_id: int) -> str:
    """Return what a log may call a node: a hash of its id, which is kept.

    `printf %s NODE_ID | sha256sum` begins with it.
    """
    return hashlib.sha256(str(node_id).encode()).hexdigest()[:8]


def own_config(config: Mapping[str, Any]) -> ConfigRecord:
    """Return a message's config as one node alone gets it.

    A message's id is the hash of what is in it, and whoever knows the id of another node's
    message can answer or delete it. So each holds something that nobody can guess.

    Args:
        config: What every node is told.
    """
    return ConfigRecord({**config, WIRE_FORMAT_KEY: WIRE_FORMAT, NONCE: token_hex(16)})


def error_content(code: str, text: str | None) -> RecordDict:
    """Make a client's reply without an update, with the reason, as it travels.

    Args:
        code: One of ERROR_CODES.
        text: The error's own words; None under differential privacy.
    """
    record: dict[str, Any] = {"code": code}
    if text is not None:
        record["text"] = text[:2000]
    return masked(RecordDict({ERROR: ConfigRecord(record)}))


def read_reply(
    message: Message,
    shapes: Mapping[str, tuple[int, ...]],
    encoding: Encoding = "float32",
) -> Reply:
    """Decode a reply. Total: whatever the client sent, it never raises.

    Memory is bounded by the declared shapes: an array whose bytes cannot be one of
    those is not decoded. Pickled bytes are never unpickled.

    Args:
        message: The reply, as Flower inflated it.
        shapes: Name -> shape of the arrays that the adapter declares; empty for a
            reply without arrays.
        encoding: How they travel; but for `float32` what is read is the update.
    """
    return _read_with(
        message,
        shapes,
        lambda sent, mask: _read_arrays(sent, shapes, encoding, mask),
    )


def read_sum(message: Message, shapes: Mapping[str, tuple[int, ...]]) -> Reply:
    """Decode a reply whose arrays are integers, whatever the encoding. Total.

    Args:
        message: The reply, as Flower inflated it.
        shapes: Name -> shape of the arrays that the adapter declares.

    Returns:
        A reply whose arrays are int64.
    """
    reply = _read_with(
        message, shapes, lambda sent, mask: _read_named(sent, shapes, "i", mask)
    )
    if reply.arrays is None:
        return reply
    whole = {name: array.astype(np.int64) for name, array in reply.arrays.items()}
    return replace(reply, arrays=whole)


def read_bytes(message: Message, name: str, size: int) -> Reply:
    """Decode a reply whose one array is bytes. Total.

    Args:
        message: The reply, as Flower inflated it.
        name: The array's.
        size: How many bytes it has.
    """
    shapes = {name: (size,)}
    return _read_with(
        message, shapes, lambda sent, mask: _read_named(sent, shapes, "u", mask)
    )


def read_declared_rows(message: Message) -> int | None:
    """Return how many rows a client declares; None if its reply has no such number."""
    try:
        if message.has_error():
            return None
        record: Mapping[str, Any] = message.content.metric_records.get(METRICS, {})
        count = record.get(DECLARED_ROWS)
    except Exception:  # noqa: BLE001 - a hostile reply may raise anything
        return None
    return count if type(count) is int and 0 < count <= _MAX_EXAMPLES else None


def _read_with(
    message: Message,
    shapes: Mapping[str, tuple[int, ...]],
    read_arrays: Callable[
        [ArrayRecord | None, Mask], tuple[dict[str, npt.NDArray[Any]] | str, int]
    ],
) -> Reply:
    """Decode a reply, and its arrays by a reader of masked records."""
    node_id = 0
    try:
        node_id = int(message.metadata.src_node_id)
        if message.has_error():
            reason = str(message.error.reason or "")[:2000]
            unreadable = message.error.code == UNREADABLE
            code = "malformed" if unreadable else "failed"
            return Reply(node_id, code=code, text=reason)
        content = message.content
        mask = mask_of(content)
        if isinstance(mask, tuple):
            return Reply(node_id, code=mask[0], text=mask[1])
        if ERROR in content.config_records:
            record = content.config_records[ERROR]
            sent_code = record.get("code")
            known = isinstance(sent_code, str) and sent_code in ERROR_CODES
            code = str(sent_code) if known else "failed"
            return Reply(node_id, code=code, text=str(record.get("text", ""))[:2000])
        metrics = _metrics(content)
        if not shapes:
            return Reply(node_id, **metrics)
        sent = content.array_records.get(ARRAYS)
        arrays, num_bytes = read_arrays(sent, mask)
    except Exception as error:  # noqa: BLE001 - a hostile reply may raise anything
        return Reply(node_id, code="malformed", text=type(error).__name__)
    if isinstance(arrays, str):
        return Reply(node_id, code="malformed", text=arrays, num_bytes=num_bytes)
    return Reply(node_id, arrays=arrays, num_bytes=num_bytes, **metrics)


def array_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Make Flower's record of named arrays."""
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def encoded_record(
    arrays: Mapping[str, npt.NDArray[np.float32]],
    encoding: Encoding,
    generator: np.random.Generator,
) -> ArrayRecord:
    """Make the record that travels.

    Args:
        arrays: Trained values; from a client, for all but `float32`, its update.
        encoding: How they travel.
        generator: Of random rounding.
    """
    if encoding == "float32":
        return array_record(arrays)
    return array_record({PACKED: pack(arrays, encoding, generator)})


def read_global(
    record: ArrayRecord,
    shapes: Mapping[str, tuple[int, ...]],
    encoding: Encoding = "float32",
) -> dict[str, npt.NDArray[Any]]:
    """Decode the server's arrays.

    Raises:
        ValueError: They are not exactly the declared ones.
    """
    arrays, _ = _read_arrays(record, shapes, encoding, None)
    if isinstance(arrays, str):
        raise ValueError(f"the server's adapter cannot be used: {arrays}")
    return arrays


def _read_arrays(
    record: ArrayRecord | None,
    shapes: Mapping[str, tuple[int, ...]],
    encoding: Encoding,
    mask: Mask | None,
) -> tuple[dict[str, npt.NDArray[Any]] | str, int]:
    """Return the arrays by name or what is wrong with them, and their bytes.

    Args:
        record: What was sent.
        shapes: Name -> declared shape.
        encoding: How they travel.
        mask: The reply's; None for the server's arrays, which have none.
    """
    if encoding == "float32":
        return _read_named(record, shapes, "f", mask)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    declared = {PACKED: (packed_size(size, encoding),)}
    packed, num_bytes = _read_named(record, declared, "u", mask)
    if isinstance(packed, str):
        return packed, num_bytes
    return dict(unpack(packed[PACKED], shapes, encoding)), num_bytes


def _read_named(
    record: ArrayRecord | None,
    shapes: Mapping[str, tuple[int, ...]],
    kind: str,
    mask: Mask | None,
) -> tuple[dict[str, npt.NDArray[Any]] | str, int]:
    """Return the arrays as they travel, or what is wrong with them, and their bytes."""
    if record is None:
        return "no arrays", 0
    if len(record) != len(shapes):
        return f"{len(record)} arrays where {len(shapes)} are declared", 0
    num_bytes = 0
    arrays: dict[str, npt.NDArray[Any]] = {}
    stype = "numpy.ndarray" if mask is None else MASKED
    # A mask is one stream, and its order is that of the names.
    for name, shape in sorted(shapes.items()):
        item = record.get(name)
        if item is None:
            return f"array {name} is missing", num_bytes
        num_bytes += len(item.data)
        if item.stype != stype:
            return f"array {name} is not serialised as {stype}", num_bytes
        largest = _LARGEST_ITEM[kind]
        if len(item.data) > int(np.prod(shape)) * largest + _MAX_HEADER_BYTES:
            return f"array {name} is too large", num_bytes
        data = item.data if mask is None else mask.apply(item.data)
        array = _read_npy(data, shape, kind)
        if isinstance(array, str):
            return f"array {name} {array}", num_bytes
        arrays[name] = array
    return {name: arrays[name] for name in shapes}, num_bytes


def _read_npy(data: bytes, shape: tuple[int, ...], kind: str) -> npt.NDArray[Any] | str:
    """Decode NumPy's file format for one expected shape, or say what is wrong.

    `numpy.load` allocates what the header claims before it looks at the bytes.
    """
    usual, dtype = _usual_header(shape, kind)
    offset, fortran = len(usual), False
    if not data.startswith(usual):
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            return "has an unexpected format version"
        got, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if tuple(got) != tuple(shape):
            return f"has shape {tuple(got)}, not {tuple(shape)}"
        if dtype.kind != kind or dtype.itemsize > _LARGEST_ITEM[kind]:
            return f"has type {dtype}, not {_KINDS[kind]}"
        offset = stream.tell()
    values = np.frombuffer(data, dtype=dtype, offset=offset)
    if values.size != int(np.prod(shape)):
        return "is cut short"
    return values.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=4096)
def _usual_header(
    shape: tuple[int, ...], kind: str
) -> tuple[bytes, "np.dtype[np.generic]"]:
    """Return the head of a file of float32 values or bytes, and its type.

    Taking heads apart was half the time of reading a reply; honest ones are all alike.
    """
    dtype: np.dtype[np.generic] = np.dtype(_USUAL[kind])
    stream = io.BytesIO()
    header = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue(), dtype


def _metrics(content: RecordDict) -> dict[str, Any]:
    """Return the metrics that are present and credible."""
    record: MetricRecord | Mapping[str, Any] = content.metric_records.get(METRICS, {})
    count = record.get("num-examples")
    sane = type(count) is int and 0 < count <= _MAX_EXAMPLES
    return {
        "num_examples": count if sane else None,
        "train_loss": _loss(record.get("train-loss")),
        "eval_loss": _loss(record.get("eval-loss")),
        "epsilon": _finite(record.get("epsilon")),
        "seconds": _seconds(record),
    }


def _seconds(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of every phase, or none if one is missing or absurd."""
    sent = {phase: _finite(record.get(f"seconds-{phase}")) for phase in CLIENT_PHASES}
    known = {phase: value for phase, value in sent.items() if value is not None}
    # More than thirty years is no measurement.
    sane = len(known) == len(sent) and max(known.values()) < 1e9
    return known if sane else {}


def _finite(value: object) -> float | None:
    """Return a number if it is finite and not negative."""
    if type(value) is float and 0 <= value < math.inf:
        return value
    return None


def _loss(value: object) -> float | None:
    """Return a loss if it is a finite, non-negative number below 1000."""
    if isinstance(value, float | int) and 0 <= value < 1000:
        return float(value)
    return None
