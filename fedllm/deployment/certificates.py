"""The certificates of a deployment: a private authority, and the server's, which ends soon.

The authority is valid for years and signs nothing but servers of its own names, so whoever
gets its key is a server of these names and no other's. The server's certificate is valid
for weeks, since nothing can revoke it: so long does a stolen server.key serve a thief.
"""

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.errors import KeyFolderError

AUTHORITY_DAYS = 5 * 365
SERVER_DAYS = 90
WARNING_DAYS = 30
CURVE = ec.SECP384R1()
# Clocks differ: a certificate of this minute would not be valid yet on another machine.
_BACKDATED = timedelta(days=1)
HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def make_authority(
    key: ec.EllipticCurvePrivateKey, names: Sequence[x509.GeneralName]
) -> x509.Certificate:
    """Return a self-signed certificate that signs servers of these names and no more."""
    name = _subject("fedllm private CA")
    builder = _unsigned(name, name, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    permitted = [_subtree(name) for name in names]
    builder = builder.add_extension(x509.NameConstraints(permitted, None), True)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(identifier, False).sign(key, hashes.SHA384())


def make_server_certificate(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    server_name: str,
    names: Sequence[x509.GeneralName],
) -> x509.Certificate:
    """Return a certificate for a TLS server of these names, and for nothing else."""
    subject = _subject(server_name)
    builder = _unsigned(subject, authority.subject, public_key, SERVER_DAYS)
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
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    valid_days: float,
) -> x509.CertificateBuilder:
    """Return the fields that both certificates share."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer, subject, public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=valid_days))
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


def alternative_name(name: str) -> x509.GeneralName:
    """Return a name as certificates have it: an IP address or a DNS name.

    Raises:
        KeyFolderError: It is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not HOST_NAME.fullmatch(name):
            raise KeyFolderError(
                f"server name: must be a DNS name or an IP address (got {name!r})"
            ) from None
        return x509.DNSName(name)


def _subtree(name: x509.GeneralName) -> x509.GeneralName:
    """Return what constrains an authority to one name: for an address a network of it."""
    if not isinstance(name, x509.IPAddress):
        return name
    network: _Network = ipaddress.ip_network(name.value)
    return x509.IPAddress(network)


def alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """Return the names of a server's certificate."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(found.value)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate.

    Raises:
        KeyFolderError: There is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise KeyFolderError(
            f"{path}: is no certificate: name the folder that `fedllm keys` made"
        ) from None


def days_left(certificate: x509.Certificate) -> float:
    """Return the days that a certificate is still valid; negative if it has ended."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def expiry_warning(path: Path) -> str | None:
    """Return a line if a certificate ends within WARNING_DAYS or has ended, else None.

    Raises:
        KeyFolderError: There is no certificate.
    """
    certificate = load_certificate(path)
    days = days_left(certificate)
    if days > WARNING_DAYS:
        return None
    ended = f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}"
    when = f"ends in {days:.0f} days" if days > 0 else ended
    remedy = (
        "renew it with `fedllm keys --renew-server`, where ca.key is"
        if path.name != "ca.crt"
        else "make a new folder of keys, and bring its ca.crt to the nodes"
    )
    return f"{path}: {when}: {remedy}"
