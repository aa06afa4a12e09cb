"""What all parties of a sealed round must agree on, and who a trustee is.

A slot is one attempt at a round; its numbers only go up. Its settings have one form in bytes,
whose hash every packet is sealed for: a packet opens at no trustee that was given others. A trustee
signs its key of a run with an identity key that each node's owner pinned out of band.
"""

import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.pads import public_key_bytes
from fedllm.privacy.sealed_sum import SealedGrid, sealed_grid

_SETTINGS_LABEL = b"fedllm sealed slot 1\0"
_KEY_LABEL = b"fedllm trustee key 1\0"
_MOST_BYTES = 100_000
_MOST_VALUES = 1 << 28
_PIN_CHARACTERS = 43


@dataclass(frozen=True)
class SlotSettings:
    """The settings of one slot.

    Attributes:
        run: Name of the run and of all settings that its promise depends on.
        slot: Its number, from 1.
        planned_slots: Slots that the run planned.
        size: d, the number of values.
        num_clients: The most clients whose messages the sum may hold.
        clipping_norm: C, of an update or of a record's gradient.
        noise_multiplier: z, against a server with `colluding` trustees.
        colluding: c, how many trustees may tell the server their noise.
        trustees: Name and public key of the run in hex of each trustee, in order.
        adapter: SHA-256 of the adapter as it was sent, in hex.
        num_records: The most records whose gradients the sum has room for; 0: it is a sum of
            one update for each client.
        total_rows: M: a record's coin has the probability B / M; 0 likewise.
    """

    run: str
    slot: int
    planned_slots: int
    size: int
    num_clients: int
    clipping_norm: float
    noise_multiplier: float
    colluding: int
    trustees: tuple[tuple[str, str], ...]
    adapter: str
    num_records: int = 0
    total_rows: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The trustees' names, in order."""
        return tuple(name for name, _ in self.trustees)

    @property
    def context(self) -> bytes:
        """The hash of the settings, 32 bytes."""
        return hashlib.sha256(_SETTINGS_LABEL + self.text.encode()).digest()

    def info(self, name: str) -> bytes:
        """Return what a packet to one trustee is sealed for.

        Its name is in it: a trustee that shows another's key as its own gets packets that the
        other does not open.
        """
        return self.context + name.encode()

    @property
    def text(self) -> str:
        """The one form of these settings: JSON with sorted keys, and floats exactly."""
        values = {
            key: value.hex() if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def grid(self) -> SealedGrid:
        """The integers of the slot.

        Raises:
            PrivacyError: No grid will do.
        """
        return sealed_grid(
            self.noise_multiplier,
            len(self.trustees),
            self.colluding,
            self.num_records or self.num_clients,
            self.size,
        )

    @classmethod
    def parse(cls, text: object) -> Self:
        """Read what a server sent.

        Raises:
            PrivacyError: It is not the one form of any settings, or no grid will do.
        """
        try:
            if not isinstance(text, str) or len(text) > _MOST_BYTES:
                raise ValueError("no text of that size")
            values = json.loads(text)
            for field in fields(cls):
                if field.type is float:
                    values[field.name] = float.fromhex(values[field.name])
            trustees = tuple((name, key) for name, key in values.pop("trustees"))
            settings = cls(trustees=trustees, **values)
            if settings.text != text or not settings._is_typed:
                raise ValueError("not its one form")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise PrivacyError("the settings of a sealed slot cannot be read") from None
        if len(set(settings.names)) != len(trustees):
            raise PrivacyError("privacy.trustees: one name stands twice")
        if settings.size > _MOST_VALUES:
            raise PrivacyError(
                f"a sealed slot has at most {_MOST_VALUES:,} values (got {settings.size:,})"
            )
        if not 1 <= settings.slot <= settings.planned_slots:
            raise PrivacyError(
                f"slot {settings.slot}: {settings.planned_slots} were planned"
            )
        if (
            settings.num_clients < 1
            or min(settings.num_records, settings.total_rows) < 0
        ):
            raise PrivacyError("a sealed slot has clients, and no fewer than 0 records")
        _ = settings.grid
        return settings

    @property
    def _is_typed(self) -> bool:
        whole = (
            *(self.slot, self.planned_slots, self.size, self.colluding),
            *(self.num_clients, self.num_records, self.total_rows),
        )
        texts = (self.run, self.adapter, *(t for pair in self.trustees for t in pair))
        return all(type(n) is int for n in whole) and all(type(t) is str for t in texts)


@dataclass(frozen=True)
class Certificate:
    """A trustee's key of one run, signed by its identity.

    Attributes:
        run: Name of the run.
        name: The trustee's.
        key: The public key of the run, in hex.
        expires: When it ends, in seconds since 1970.
        signature: Of the identity key, over all of these, in hex.
    """

    run: str
    name: str
    key: str
    expires: int
    signature: str = ""

    @property
    def signed(self) -> bytes:
        """The bytes that the identity key signs."""
        content = [self.run, self.name, self.key, self.expires]
        return _KEY_LABEL + json.dumps(content).encode()

    def signed_by(self, identity: Ed25519PrivateKey) -> "Certificate":
        """Return the certificate with its signature."""
        signature = identity.sign(self.signed).hex()
        return Certificate(self.run, self.name, self.key, self.expires, signature)

    def verify(self, run: str, pins: Mapping[str, str], now: float) -> None:
        """Check that a trustee whom this node's owner knows made the key for this run.

        Args:
            run: Name of the run.
            pins: Name -> public identity key, as the owner typed it.
            now: Seconds since 1970.

        Raises:
            PrivacyError: It is of another run, expired, of a stranger, or not signed by
                the pinned identity.
        """
        if self.name not in pins:
            raise PrivacyError(
                f"trusted-trustees: this node's owner trusts no trustee {self.name!r} "
                f"(trusts {', '.join(sorted(pins)) or 'none'})"
            )
        if self.run != run:
            raise PrivacyError(
                f"trustee {self.name}: its key is of run {self.run!r}, not {run!r}"
            )
        if now >= self.expires:
            raise PrivacyError(f"trustee {self.name}: its key of the run has expired")
        try:
            identity = Ed25519PublicKey.from_public_bytes(parse_pin(pins[self.name]))
            identity.verify(bytes.fromhex(self.signature), self.signed)
        except (InvalidSignature, ValueError):
            raise PrivacyError(
                f"trustee {self.name}: its key of the run is not signed by the identity "
                "that this node's owner pinned (trusted-trustees)"
            ) from None


def certificates_text(certificates: Sequence[Certificate]) -> str:
    """Return certificates as they travel."""
    return json.dumps([asdict(certificate) for certificate in certificates])


def parse_certificates(text: object) -> tuple[Certificate, ...]:
    """Read certificates that were sent.

    Raises:
        PrivacyError: They are none.
    """
    try:
        if not isinstance(text, str) or len(text) > _MOST_BYTES:
            raise ValueError("no text of that size")
        certificates = tuple(Certificate(**entry) for entry in json.loads(text))
        for certificate in certificates:
            _require_form(certificate)
    except (ValueError, TypeError, RecursionError):
        raise PrivacyError("the trustees' certificates cannot be read") from None
    return certificates


def _require_form(certificate: Certificate) -> None:
    """Raise ValueError or TypeError if a certificate is not of the form of one."""
    texts: tuple[Any, ...] = (certificate.run, certificate.name, certificate.signature)
    if not all(type(t) is str for t in texts) or type(certificate.expires) is not int:
        raise TypeError("a field has another type")
    if len(bytes.fromhex(certificate.key)) not in map(public_key_bytes, (False, True)):
        raise ValueError("no key")


def pin_of(identity: Ed25519PublicKey) -> str:
    """Return the 43 characters that nodes' owners pin."""
    return _pin(identity.public_bytes_raw())


def _pin(key: bytes) -> str:
    return urlsafe_b64encode(key).decode().rstrip("=")


def parse_pin(text: str) -> bytes:
    """Return the public key of a pin, 32 bytes.

    Raises:
        ConfigError: It is none.
    """
    try:
        key = urlsafe_b64decode(text + "=")
        # One form of each key: under two it could count as two trustees.
        if len(key) != 32 or text != _pin(key):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"trusted-trustees: a pin has {_PIN_CHARACTERS} characters, as `fedllm keys "
            f"--add-trustee` printed them (got {text!r})"
        ) from None
    return key
