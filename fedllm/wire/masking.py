"""What makes every object of a reply unlike every other reply's.

Flower keeps each object of a message under the hash of its bytes, once for all nodes, and
gives any object to any registered node that names its hash. A reply is a function of a
client's rows and of public numbers. So a fellow node could work out the replies that it
suspects, and ask for their hashes: whether one is there would tell which guess is right,
without noise. Every object of a reply therefore contains, or is masked by, a number that
only its sender and the server know.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

WIRE = "wire"
"""Name of the record that says in which format a reply travels, and holds its nonce."""

WIRE_FORMAT = 2
"""The format that this version writes and reads. Format 1 had neither nonce nor mask."""

MASKED = "fedllm.masked"
"""What stands for the serialisation of an array in NumPy's format under a mask."""

OTHER_VERSION = "other-version"
"""Code of a reply in another format."""

NONCE = "nonce"
"""Entry that only its sender and its receiver know: of each record of a reply, and of the
config of a message, whose id, a hash, nobody else can find then."""

_FORMAT = "format"
_NONCE_BYTES = 16


class Mask:
    """One stream of bytes to be XORed with what travels; it is used once, from its start.

    AES in counter mode, with the nonce as key. No secrecy is claimed from it, since the
    nonce travels beside what it masks: it only gives equal arrays unequal bytes, and so
    unequal hashes.
    """

    def __init__(self, nonce: bytes) -> None:
        self._stream = Cipher(AES(nonce), CTR(bytes(_NONCE_BYTES))).encryptor()

    def apply(self, data: bytes) -> bytes:
        """Return data masked, or unmasked, by the next bytes of the stream."""
        return self._stream.update(data)


def masked(content: RecordDict) -> RecordDict:
    """Return a reply's content as it travels: no object of it can be foreseen.

    Every reply of a client goes through here once, whatever it holds. An array's bytes are
    masked in the order of the names; a record gets the nonce as one more entry.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    out = RecordDict()
    for name, record in content.items():
        out[name] = _with_nonce(record, nonce)
    out[WIRE] = ConfigRecord({_FORMAT: WIRE_FORMAT, NONCE: nonce})
    return out


def mask_of(content: RecordDict) -> Mask | tuple[str, str]:
    """Return the mask of a reply, or a code and a text if it cannot be read.

    Returns:
        The mask; or `other-version` for another format, `malformed` for a bad nonce.
    """
    record: Mapping[str, Any] = content.config_records.get(WIRE, {})
    sent_format = record.get(_FORMAT)
    if type(sent_format) is not int or sent_format != WIRE_FORMAT:
        shown = sent_format if type(sent_format) is int else 1
        return OTHER_VERSION, (
            f"the reply is in wire format {shown}, and this server reads {WIRE_FORMAT}: "
            "install the server's version of fedllm on the node"
        )
    nonce = record.get(NONCE)
    if type(nonce) is not bytes or len(nonce) != _NONCE_BYTES:
        return "malformed", f"the reply has no nonce of {_NONCE_BYTES} bytes"
    return Mask(nonce)


def _with_nonce(
    record: ArrayRecord | MetricRecord | ConfigRecord, nonce: bytes
) -> ArrayRecord | MetricRecord | ConfigRecord:
    """Return a copy of one record that nobody can foresee without the nonce."""
    if isinstance(record, ArrayRecord):
        mask = Mask(nonce)
        return ArrayRecord(
            {name: _masked_array(record[name], mask) for name in sorted(record)}
        )
    if isinstance(record, MetricRecord):
        # A metric is a number of 64 bits with a sign, or a list of such.
        halves = (nonce[:8], nonce[8:])
        numbers = [int.from_bytes(half, "little", signed=True) for half in halves]
        return MetricRecord({**record, NONCE: numbers})
    return ConfigRecord({**record, NONCE: nonce})


def _masked_array(array: Array, mask: Mask) -> Array:
    return Array(array.dtype, array.shape, MASKED, mask.apply(array.data))
