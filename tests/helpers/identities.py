"""Trustees' identity keys, and their silence."""

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedllm.privacy.agreement import pin_of
from fedllm.privacy.sealed_sum import SealedGrid


def write_identity(folder: Path, name: str) -> tuple[Path, str]:
    """A trustee's identity key on disk, and its pin."""
    key = Ed25519PrivateKey.generate()
    path = folder / name
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    path.touch(mode=0o600)
    path.write_bytes(text)
    return path, pin_of(key.public_key())


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the trustees' noise away, so that sums can be compared exactly."""
    monkeypatch.setattr(
        SealedGrid, "noise", lambda self, size, _: np.zeros(size, np.int64)
    )
