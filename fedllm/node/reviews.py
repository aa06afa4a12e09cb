"""Reviewers whom a node's owner trusts, and what they sign.

    FEDLLM_HOME/node/reviewers/NAME.pub   an Ed25519 key in OpenSSH's format

A reviewer reads an app and the settings of a run once, for many nodes, and signs the digest of
both with a number of rounds and an end. A node checks the signature by itself and with every
message, so an approval ends when its owner stops trusting the key, and whoever edits its
rounds or its end voids it. Who brings the signature to a node does not matter.
"""

import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedllm.atomic_files import write_atomic
from fedllm.errors import NodeError
from fedllm.node.log import node_folder
from fedllm.signatures import fingerprint, public_line
from fedllm.strict_modes import require_strict_modes

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_KEY_LINE = 10_000


def _text(digest: str, rounds: int, expires: int) -> bytes:
    """Return what is signed; the first line keeps it from meaning anything else."""
    return f"fedllm approval 1\n{digest}\n{rounds}\n{expires}\n".encode()


def sign(digest: str, rounds: int, expires: int, key: Path) -> str:
    """Sign an approval.

    Args:
        digest: Of a request, by `approvals.Request`.
        rounds: How many messages of each type may be answered.
        expires: Until when, in seconds since 1970.
        key: File of the reviewer's private key.

    Returns:
        The signature, in hex digits.

    Raises:
        ConfigError: Others may write the key.
        NodeError: It cannot be read, or is no Ed25519 key without a passphrase.
    """
    require_strict_modes(key)
    try:
        private = load_ssh_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise NodeError(f"{key}: cannot be read as a private key: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise NodeError(f"{key}: is no Ed25519 key: fedllm keys --add-reviewer NAME")
    return private.sign(_text(digest, rounds, expires)).hex()


def signer(digest: str, rounds: int, expires: int, signature: str) -> str | None:
    """Return the trusted reviewer who signed exactly this; None if none did.

    Raises:
        ConfigError: Others may write the reviewers' keys.
        NodeError: One of them cannot be read.
    """
    try:
        raw = bytes.fromhex(signature)
    except ValueError:
        return None
    for name, key in reviewers().items():
        try:
            key.verify(raw, _text(digest, rounds, expires))
        except InvalidSignature:
            continue
        return name
    return None


def reviewers() -> dict[str, Ed25519PublicKey]:
    """Return the keys that the owner trusts, by their names.

    Raises:
        ConfigError: Others may write them.
        NodeError: One of them cannot be read.
    """
    keys = {}
    for path in sorted(_folder().glob("*.pub")):
        require_strict_modes(path)
        keys[path.stem] = _public_key(path)
    return keys


def trust(path: Path) -> str:
    """Trust the holder of a key with approvals at this node.

    Args:
        path: The public key; its file's name, without the ending, becomes the reviewer's.

    Returns:
        The reviewer's name.

    Raises:
        NodeError: It is no Ed25519 key, its name is none, or the name is taken.
    """
    if not _NAME.fullmatch(path.stem):
        raise NodeError(f"{path}: letters, digits, dots and dashes in its name only")
    key = _public_key(path)
    target = _folder() / f"{path.stem}.pub"
    if target.exists() and fingerprint(_public_key(target)) != fingerprint(key):
        raise NodeError(
            f"{path.stem}: is trusted with another key: fedllm node distrust {path.stem}"
        )
    write_atomic(target, f"{public_line(key)}\n".encode(), 0o600)
    return path.stem


def distrust(name: str) -> None:
    """Trust a reviewer no more, nor what it has signed.

    Raises:
        NodeError: No such reviewer is trusted.
    """
    path = _folder() / f"{name}.pub"
    if not _NAME.fullmatch(name) or not path.exists():
        known = ", ".join(reviewers()) or "nobody"
        raise NodeError(f"{name!r}: no such reviewer (trusted: {known})")
    path.unlink()


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        with path.open("rb") as file:
            key = load_ssh_public_key(file.read(_KEY_LINE))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise NodeError(f"{path}: cannot be read as a public key: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise NodeError(f"{path}: is no Ed25519 key: fedllm keys --add-reviewer NAME")
    return key


def _folder() -> Path:
    folder = node_folder() / "reviewers"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
