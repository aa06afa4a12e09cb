"""A private certificate authority, a server certificate, and keys of SuperNodes.

    DIR/ca.crt       every machine: what it trusts instead of the public authorities
    DIR/ca.key       no machine: only a further certificate needs it; keep it offline
    DIR/server.crt   the server, with server.key
    DIR/nodes/NAME   that node alone; NAME.pub is registered with the server
    DIR/reviewers/NAME   that reviewer alone; nodes' owners trust NAME.pub
    DIR/config.toml  an entry for Flower's config, on the machine where runs are started

Folders are 0700 and files 0600. No existing file is ever overwritten.
"""

import ipaddress
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.atomic_files import sync_folder
from fedllm.errors import KeyFolderError

VALID_DAYS = 5 * 365
SUPERLINK_NAME = "private"
_PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_CURVE = ec.SECP384R1()
# Clocks differ: a certificate of this minute would not be valid yet on another machine.
_BACKDATED = timedelta(days=1)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
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
    names = [_alternative_name(name) for name in (*server_names, *_LOOPBACK)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only, as mkdtemp makes it.
        fresh = Path(tempfile.mkdtemp(prefix=".keys-", dir=folder.parent))
        try:
            _write_certificates(fresh, server_names[0], list(dict.fromkeys(names)))
            for node in nodes:
                _write_key(fresh / "nodes" / node, ec.generate_private_key(_CURVE))
            # A JSON string is a TOML string, whatever the path holds.
            entry = (
                f"[superlink.{SUPERLINK_NAME}]\naddress = {json.dumps(control_address)}\n"
                f"root-certificates = {json.dumps(str(folder / 'ca.crt'))}\n"
            )
            _write_new(fresh / "config.toml", entry.encode())
            fresh.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        raise _unwritable(folder, error) from None


def add_node_key(folder: Path, node: str) -> Path:
    """Make the key of one more node, without any other file of the folder.

    Returns:
        Path of the private key; the public one lies beside it and ends in .pub.

    Raises:
        KeyFolderError: That node has a key, the name is not valid, or the key cannot be
            written.
    """
    return _add_key(folder, "nodes", node, ec.generate_private_key(_CURVE))


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


def _add_key(folder: Path, kind: str, name: str, key: _PrivateKey) -> Path:
    """Make the folder if need be, and write one more key."""
    _check_names([name])
    path = folder / kind / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _write_key(path, key)
    except FileExistsError:
        raise KeyFolderError(
            f"{path}: exists, and keys are never written over: choose another name"
        ) from None
    except OSError as error:
        raise _unwritable(folder, error) from None


def _write_certificates(
    folder: Path, server_name: str, names: list[x509.GeneralName]
) -> None:
    """Write the authority and the server's certificate, each with its key."""
    authority_key = ec.generate_private_key(_CURVE)
    server_key = ec.generate_private_key(_CURVE)
    authority = _authority(authority_key)
    server = _server_certificate(
        authority, authority_key, server_key.public_key(), server_name, names
    )
    for name, key, certificate in (
        ("ca", authority_key, authority),
        ("server", server_key, server),
    ):
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_new(folder / f"{name}.key", pem)
        _write_new(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM))


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return a self-signed certificate that signs servers' and no other authorities'."""
    name = _subject("fedllm private CA")
    builder = _unsigned(name, name, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(identifier, False).sign(key, hashes.SHA384())


def _server_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    server_name: str,
    names: list[x509.GeneralName],
) -> x509.Certificate:
    """Return a certificate for a TLS server of these names, and for nothing else."""
    builder = _unsigned(_subject(server_name), authority.subject, public_key)
    builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(
        authority_key.public_key()
    )
    builder = builder.add_extension(identifier, critical=False)
    return builder.sign(authority_key, hashes.SHA384())


def _unsigned(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """Return the fields that both certificates share."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    """Return the usage of a key: to sign certificates, or to take part in a handshake."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    # A common name has at most 64 characters; clients check the alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _write_key(path: Path, key: _PrivateKey) -> Path:
    """Write a key pair in OpenSSH's format, which Flower's SuperNodes read."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    _write_new(path, private)
    public += f" {path.name}\n".encode()
    _write_new(path.with_name(f"{path.name}.pub"), public)
    return path


def _write_new(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read; an existing one is an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _alternative_name(name: str) -> x509.GeneralName:
    """Return a name as certificates have it: an IP address or a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not _NAME.fullmatch(name):
            raise KeyFolderError(
                f"server name: must be a DNS name or an IP address (got {name!r})"
            ) from None
        return x509.DNSName(name)


def _check_names(nodes: Sequence[str]) -> None:
    """Raise if a name is no plain file name."""
    for node in nodes:
        if not _NAME.fullmatch(node) or node.endswith(".pub"):
            raise KeyFolderError(
                "name: letters, digits, dots, dashes and underscores, with a "
                f"letter or digit at both ends, and not .pub (got {node!r})"
            )


def _unwritable(folder: Path, error: OSError) -> KeyFolderError:
    return KeyFolderError(
        f"{error.filename or folder}: cannot be written: {error.strerror}; name a "
        "folder that can with --out"
    )
