"""A private certificate authority, a server certificate, and keys of SuperNodes.

    DIR/ca.crt       every machine: what it trusts instead of the public authorities
    DIR/ca.key       no machine: only the server's renewal needs it; keep it offline
    DIR/server.crt   the server, with server.key
    DIR/nodes/NAME   that node alone; NAME.pub is registered with the server
    DIR/reviewers/NAME   that reviewer alone; nodes' owners trust NAME.pub
    DIR/trustees/NAME    that trustee alone; nodes' owners pin its public half
    DIR/gate.caddy   the gate: the public keys that it lets through
    DIR/config.toml  an entry for Flower's config, on the machine where runs are started

Folders are 0700 and files 0600. No existing file is ever overwritten but gate.caddy, which
is made of the public keys, and, by a renewal, the server's certificate and key.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedllm.atomic_files import sync_folder, write_atomic
from fedllm.config import TRUSTEE_NAME
from fedllm.deployment.certificates import (
    CURVE,
    HOST_NAME,
    alternative_name,
    alternative_names,
    load_certificate,
    make_authority,
    make_server_certificate,
)
from fedllm.deployment.gate import GATE_FILE, write_gate
from fedllm.errors import KeyFolderError
from fedllm.privacy.agreement import pin_of

SUPERLINK_NAME = "private"
_PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
# The ServerApp reaches its own SuperLink under these.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_key_folder(
    folder: Path,
    server_names: Sequence[str],
    nodes: Sequence[str],
    control_address: str,
) -> None:
    """Make the whole folder, or nothing.

    Args:
        folder: Where; must not exist yet.
        server_names: DNS names and IP addresses by which nodes reach the server;
            loopback is added.
        nodes: Names of the nodes to make keys for.
        control_address: host:port where runs are started, for config.toml.

    Raises:
        KeyFolderError: The folder exists or cannot be written, or a name is not valid.
    """
    if folder.exists():
        raise KeyFolderError(
            f"{folder}: exists, and keys are never written over: name another folder, "
            "or add a node with --add-node"
        )
    _check_names(nodes)
    names = [alternative_name(name) for name in (*server_names, *_LOOPBACK)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only, as mkdtemp makes it.
        fresh = Path(tempfile.mkdtemp(prefix=".keys-", dir=folder.parent))
        try:
            _write_certificates(fresh, server_names[0], list(dict.fromkeys(names)))
            for node in nodes:
                key = ec.generate_private_key(CURVE)
                _write_key(fresh / "nodes" / node, key, f"{node}@{server_names[0]}")
            # A JSON string is a TOML string, whatever the path holds.
            entry = (
                f"[superlink.{SUPERLINK_NAME}]\naddress = {json.dumps(control_address)}\n"
                f"root-certificates = {json.dumps(str(folder / 'ca.crt'))}\n"
            )
            _write_new(fresh / "config.toml", entry.encode())
            write_gate(fresh)
            fresh.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def add_node_key(folder: Path, node: str) -> Path:
    """Make the key of one more node, and let it through if the folder is the gate's.

    Returns:
        Path of the private key; the public one lies beside it and ends in .pub.

    Raises:
        KeyFolderError: That node has a key, the name is not valid, or the key cannot be
            written.
    """
    path = _add_key(folder, "nodes", node, ec.generate_private_key(CURVE))
    if (folder / GATE_FILE).exists():
        write_gate(folder)
    return path


def add_reviewer_key(folder: Path, reviewer: str) -> Path:
    """Make the key of a reviewer, who signs approvals of runs (`fedllm node sign`).

    Returns:
        Path of the private key; the public one lies beside it and ends in .pub.

    Raises:
        KeyFolderError: That reviewer has a key, the name is not valid, or the key cannot
            be written.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    return _add_key(folder, "reviewers", reviewer, key)


def add_trustee_key(folder: Path, trustee: str) -> tuple[Path, str]:
    """Make the identity key of a trustee, who opens the rounds of sealed runs.

    Returns:
        Path of the private key, and the pin: the public half in 43 characters, which each
        node's owner types.

    Raises:
        KeyFolderError: That trustee has a key, the name is not valid, or the key cannot be
            written.
    """
    if not TRUSTEE_NAME.fullmatch(trustee):
        raise KeyFolderError(
            "name: a trustee's has small letters, digits, dots and dashes, with a letter or "
            f"digit at both ends (got {trustee!r})"
        )
    key = ed25519.Ed25519PrivateKey.generate()
    return _add_key(folder, "trustees", trustee, key), pin_of(key.public_key())


def _add_key(folder: Path, kind: str, name: str, key: _PrivateKey) -> Path:
    """Make the folder if need be, and write one more key."""
    _check_names([name])
    path = folder / kind / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_key(path, key, name)
        return path
    except FileExistsError:
        raise KeyFolderError(
            f"{path}: exists, and keys are never written over: choose another name"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None


def renew_server(folder: Path) -> Path:
    """Make a new key and certificate of the server, of the names of the old one.

    The private key is new too, so that a stolen one serves no longer than its
    certificate. Both files are replaced, the certificate last.

    Args:
        folder: With ca.crt, ca.key and server.crt.

    Returns:
        Path of the certificate.

    Raises:
        KeyFolderError: A file is missing or cannot be used, or cannot be written.
    """
    authority = load_certificate(folder / "ca.crt")
    old = load_certificate(folder / "server.crt")
    key = _load_authority_key(folder / "ca.key", authority)
    fresh = ec.generate_private_key(CURVE)
    names = alternative_names(old)
    (common,) = old.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    certificate = make_server_certificate(
        authority, key, fresh.public_key(), str(common.value), names
    )
    try:
        write_atomic(folder / "server.key", _private_pem(fresh), 0o600)
        path = folder / "server.crt"
        write_atomic(path, certificate.public_bytes(Encoding.PEM), 0o600)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return path


def _load_authority_key(
    path: Path, authority: x509.Certificate
) -> ec.EllipticCurvePrivateKey:
    """Read the authority's key.

    Raises:
        KeyFolderError: There is none, or it is not of that authority.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise KeyFolderError(
            f"{path}: is no private key: bring ca.key there for the renewal, or make a "
            "new folder of keys if it is lost"
        ) from None
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key.public_key() != authority.public_key()
    ):
        raise KeyFolderError(
            f"{path}: is no private key of the ca.crt beside it: bring the one that is"
        )
    return key


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_certificates(
    folder: Path, server_name: str, names: list[x509.GeneralName]
) -> None:
    """Write the authority and the server's certificate, each with its key."""
    authority_key = ec.generate_private_key(CURVE)
    server_key = ec.generate_private_key(CURVE)
    authority = make_authority(authority_key, names)
    server = make_server_certificate(
        authority, authority_key, server_key.public_key(), server_name, names
    )
    for name, key, certificate in (
        ("ca", authority_key, authority),
        ("server", server_key, server),
    ):
        _write_new(folder / f"{name}.key", _private_pem(key))
        _write_new(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM))


def _write_key(path: Path, key: _PrivateKey, comment: str) -> None:
    """Write a key pair in OpenSSH's format, which Flower's SuperNodes read."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _write_new(path, private)
    _write_new(path.with_name(f"{path.name}.pub"), public + f" {comment}\n".encode())


def _write_new(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read; an existing one is an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_names(nodes: Sequence[str]) -> None:
    """Raise if a name is no plain file name."""
    for node in nodes:
        if not HOST_NAME.fullmatch(node) or node.endswith(".pub"):
            raise KeyFolderError(
                "name: letters, digits, dots, dashes and underscores, with a "
                f"letter or digit at both ends, and not .pub (got {node!r})"
            )


def _unwritable(folder: Path, error: OSError) -> KeyFolderError:
    return KeyFolderError(
        f"{error.filename or folder}: cannot be written: {error.strerror}; name a "
        "folder that can with --out"
    )
