"""What the gate of a deployment knows of its nodes: their public keys.

Flower's SuperLink reads a request to its end before it looks at the key. So the gate, which
is Caddy with deploy/Caddyfile, looks at the key first, and gives a stranger's request 403.
It knows the keys by `gate.caddy`, which is made of the folder's public keys and imported.

A public key is no secret, and the signature is the SuperLink's to check: the list keeps
those away who know no key.
"""

from base64 import b64encode
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from fedllm.atomic_files import write_atomic
from fedllm.errors import KeyFolderError

GATE_FILE = "gate.caddy"


def write_gate(folder: Path) -> Path:
    """Write the list of nodes that the gate lets through, from the public keys here.

    It is the one file of the folder that is written over: all of it is derived.

    Args:
        folder: The folder that `fedllm keys` made; `nodes/NAME.pub` are the keys.

    Returns:
        Path of the list.

    Raises:
        KeyFolderError: A public key cannot be read, or the list cannot be written.
    """
    paths = sorted((folder / "nodes").glob("*.pub"))
    lines = [
        "# The nodes' public keys; made by `fedllm keys`, imported by the Caddyfile."
    ]
    for path in paths:
        lines += [f"# {path.stem!a}", f'header Flwr-Public-Key "{_as_sent(path)}"']
    target = folder / GATE_FILE
    try:
        write_atomic(target, ("\n".join(lines) + "\n").encode(), 0o600)
    except OSError as error:
        raise KeyFolderError(
            f"{target}: cannot be written: {error.strerror}; make it writable"
        ) from None
    return target


def _as_sent(path: Path) -> str:
    """Return a public key as Flower's SuperNode sends it in each request's header.

    Raises:
        KeyFolderError: It is no public key in OpenSSH's format.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise KeyFolderError(
            f"{path}: is no public key in OpenSSH's format: bring the node's NAME.pub, or "
            "remove the file"
        ) from None
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(pem).decode()
