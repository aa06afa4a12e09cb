"""What travels in a sealed round: certificates, settings, packets, and bytes of residues."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.errors import PrivacyError
from fedllm.privacy.agreement import (
    Certificate,
    certificates_text,
    parse_certificates,
)
from fedllm.privacy.pads import Residues
from fedllm.wire.messages import (
    ARRAYS,
    DECLARED_ROWS,
    METRICS,
    Reply,
    array_record,
    read_bytes,
)

HELLO = "query.hello"
"""Message type of the question before round 1: may the run be, and are you a trustee?"""

TALLY = "query.tally"
"""Message type of what asks a trustee to open a slot."""

RUN_NAME = "run-name"
"""Entry of the first: the run, as the trustees sign for it."""

SLOT = "slot"
"""Entry of a message's config: the settings of the slot, in their one form."""

CERTIFICATES = "certificates"
"""Entry beside it: the trustees' keys of the run, signed."""

PACKETS = "packets"
"""Entry of a client's reply, a packet for each trustee; and of what asks a trustee."""

SEALED = "sealed"
"""Record of a reply beside its arrays, and name of its one array."""

_UNOPENED = "unopened"
_CERTIFICATE = "certificate"
_HAS_DATA = "has-data"


def adapter_digest(arrays: ArrayRecord) -> str:
    """Return the SHA-256 of an adapter as it was sent, in hex."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        head = repr((name, array.dtype, tuple(array.shape), array.stype))
        for part in (head.encode(), array.data):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def sealed_content(masked_update: Residues, packets: Sequence[bytes]) -> RecordDict:
    """Return a client's reply: its padded update, and a packet for each trustee."""
    return RecordDict(
        {
            ARRAYS: _as_bytes(masked_update),
            SEALED: ConfigRecord({PACKETS: list(packets)}),
        }
    )


def tally_content(vector: Residues | None, unopened: Sequence[int]) -> RecordDict:
    """Return a trustee's reply: its vector, or which packets do not open."""
    if vector is None:
        return RecordDict({SEALED: ConfigRecord({_UNOPENED: list(unopened)})})
    return RecordDict({ARRAYS: _as_bytes(vector)})


def hello_content(
    certificate: Certificate | None, has_data: bool = True, rows: int | None = None
) -> RecordDict:
    """Return a node's reply to the question before round 1.

    Args:
        certificate: Of a trustee.
        has_data: Whether the node is a client too.
        rows: How many rows, or persons, it declares; None: it is not asked.
    """
    record = ConfigRecord({_HAS_DATA: has_data})
    if certificate is not None:
        record[_CERTIFICATE] = certificates_text([certificate])
    content = RecordDict({SEALED: record})
    if rows is not None:
        content[METRICS] = MetricRecord({DECLARED_ROWS: rows})
    return content


def read_residues(message: Message, size: int) -> tuple[Reply, Residues | None]:
    """Decode a reply with one vector of residues. Total.

    Args:
        message: The reply, as Flower inflated it.
        size: d.

    Returns:
        The reply, and (d,) the vector; None if there is none.
    """
    reply = read_bytes(message, SEALED, 4 * size)
    if reply.arrays is None:
        return reply, None
    return reply, np.frombuffer(reply.arrays[SEALED].tobytes(), "<u4")


def read_packets(message: Message, count: int, length: int) -> tuple[bytes, ...] | None:
    """Return the packets of a client's reply; None if they are not of that form. Total."""
    packets = _sealed_record(message).get(PACKETS)
    if not isinstance(packets, list) or len(packets) != count:
        return None
    if not all(type(p) is bytes and len(p) == length for p in packets):
        return None
    return tuple(packets)


def read_unopened(message: Message, count: int) -> tuple[int, ...]:
    """Return which packets a trustee could not open; empty if it names none. Total."""
    places = _sealed_record(message).get(_UNOPENED)
    if not isinstance(places, list):
        return ()
    return tuple(p for p in places if type(p) is int and 0 <= p < count)


def read_certificate(message: Message) -> Certificate | None:
    """Return the certificate in a node's reply; None if it is no trustee. Total."""
    try:
        (certificate,) = parse_certificates(_sealed_record(message).get(_CERTIFICATE))
    except (PrivacyError, ValueError):
        return None
    return certificate


def read_has_data(message: Message) -> bool:
    """Return whether a node may be a client; false only if its reply says so. Total."""
    return _sealed_record(message).get(_HAS_DATA) is not False


def _sealed_record(message: Message) -> Mapping[str, Any]:
    try:
        if message.has_error():
            return {}
        record: Mapping[str, Any] = message.content.config_records.get(SEALED, {})
        return dict(record)
    except Exception:  # noqa: BLE001 - a hostile reply may raise anything
        return {}


def _as_bytes(values: Residues) -> ArrayRecord:
    return array_record({SEALED: values.astype("<u4").view(np.uint8)})
