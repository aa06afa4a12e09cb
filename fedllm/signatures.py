"""Ed25519 signatures of texts, by keys in OpenSSH's format.

    FEDLLM_HOME/signing/server      the key of the server that runs from this home
    FEDLLM_HOME/signing/server.pub  its public half

The server's key for TLS is not used: it is replaced every 90 days, and the process that runs a
federation does not get it. What is signed begins with a label, so that it means nothing else.
"""

import base64
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedllm.atomic_files import create_once
from fedllm.errors import KeyFolderError
from fedllm.strict_modes import make_strict_folder, require_strict_modes

_KEY_LINE = 10_000
HEAD_LABEL = "fedllm ledger head 1"
"""Of the end of a run's ledger, which goes to the nodes."""
DOSSIER_LABEL = "fedllm dossier 1"
"""Of a run's dossier."""


def server_key(home: Path) -> Ed25519PrivateKey:
    """Return the key of the server that runs from a home, made with the first call.

    Raises:
        ConfigError: Others may write its place.
        KeyFolderError: It cannot be made or read.
    """
    folder = home / "signing"
    try:
        make_strict_folder(home)
        create_once(folder, _make_key, private=True)
        require_strict_modes(folder / "server")
        key = load_ssh_private_key((folder / "server").read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = getattr(error, "strerror", None) or error
        raise KeyFolderError(
            f"{folder}: the server's signing key cannot be made or read: {reason}: set "
            "FEDLLM_HOME to a folder that can be written, or move this one away for a new "
            "key"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFolderError(f"{folder / 'server'}: is no Ed25519 key: move it away")
    return key


def _make_key(folder: Path) -> None:
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    descriptor = os.open(folder / "server", os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    (folder / "server.pub").write_text(f"{public_line(key.public_key())} fedllm\n")


def public_line(key: Ed25519PublicKey) -> str:
    """Return a public key as OpenSSH writes it, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def parse_public(line: str) -> Ed25519PublicKey | None:
    """Read a public key; None if the line is no Ed25519 key."""
    try:
        key = load_ssh_public_key(line.encode()[:_KEY_LINE])
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) else None


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return a key's fingerprint as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(public_line(key).split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def sign(label: str, text: str, key: Ed25519PrivateKey) -> str:
    """Return the signature of a text, in hex digits."""
    return key.sign(f"{label}\n{text}".encode()).hex()


def is_signed(label: str, text: str, signature: str, key: Ed25519PublicKey) -> bool:
    """Return whether a key has signed exactly this."""
    try:
        key.verify(bytes.fromhex(signature), f"{label}\n{text}".encode())
    except (InvalidSignature, ValueError):
        return False
    return True
