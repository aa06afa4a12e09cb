"""Certificates that end, are renewed, and are of a few names only."""

import contextlib
import json
import ssl
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedllm.commands import superlink
from fedllm.deployment import certificates
from fedllm.deployment.certificates import (
    SERVER_DAYS,
    alternative_name,
    days_left,
    expiry_warning,
    load_certificate,
    make_server_certificate,
)
from tests.helpers.key_folders import contents, handshake, make


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "keys"


def make_ending(folder, monkeypatch, days: float) -> None:
    """Make a folder whose server's certificate ends in so many days."""
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "SERVER_DAYS", days)
        make(folder, "--server-ip", "10.1.2.3")


def test_a_servers_certificate_that_has_ended_is_refused_until_it_is_renewed(
    folder, monkeypatch
):
    make_ending(folder, monkeypatch, -0.5)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(folder, "localhost")
    before = contents(folder)

    make(folder, "--renew-server")

    for name in ("fl.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"):
        assert handshake(folder, name) == "TLSv1.3"
    after = contents(folder)
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"server.crt", "server.key"} and set(after) == set(before)
    for name in changed:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    left = days_left(load_certificate(folder / "server.crt"))
    assert SERVER_DAYS - 0.1 < left <= SERVER_DAYS


@pytest.mark.parametrize(
    ("days", "said"),
    [(31, None), (29, "ends in 29 days"), (-0.5, "ended on 20")],
)
def test_the_last_thirty_days_are_announced(folder, monkeypatch, capsys, days, said):
    make_ending(folder, monkeypatch, days)
    capsys.readouterr()

    warning = expiry_warning(folder / "server.crt")
    status = contextlib.nullcontext() if said is None else pytest.raises(SystemExit)
    with status as left:
        make(folder, "--check")

    printed = capsys.readouterr().out
    if said is None:
        assert warning is None
        assert f"server.crt: valid for {days - 1} days" in printed
    else:
        assert said in warning and warning in printed and left.value.code == 1
        assert "fedllm keys --renew-server" in printed


def test_check_speaks_json(folder, monkeypatch, capsys):
    make_ending(folder, monkeypatch, 10)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        make(folder, "--check", "--json")

    told = json.loads(capsys.readouterr().out)
    assert told["days_left"]["server.crt"] == 9 and len(told["warnings"]) == 1


def test_the_superlink_warns_when_it_starts(folder, monkeypatch, tmp_path, caplog):
    make_ending(folder, monkeypatch, 3)
    words = ["--keys", str(folder), "--home", str(tmp_path / "home")]
    args = superlink.parser().parse_args(words)
    args.others = []

    superlink._arguments(args)

    assert "ends in 3 days" in caplog.text


@pytest.mark.parametrize("damage", ["missing", "another", "no key"])
def test_a_renewal_without_the_authoritys_key_changes_nothing(folder, tmp_path, damage):
    make(folder)
    if damage == "missing":
        (folder / "ca.key").unlink()
    elif damage == "another":
        make(tmp_path / "other")
        (folder / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    else:
        (folder / "ca.key").write_text("x")
    before = contents(folder)

    with pytest.raises(SystemExit, match=r"KeyFolderError: .*ca\.key: is no"):
        make(folder, "--renew-server")

    assert contents(folder) == before


@pytest.mark.parametrize("name", ["hub.example.com", "10.9.9.9", "example.org"])
def test_the_authority_vouches_for_its_own_names_alone(folder, name):
    make(folder, "--server-ip", "10.1.2.3")
    authority = load_certificate(folder / "ca.crt")
    key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    server = load_pem_private_key((folder / "server.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forged = make_server_certificate(
        authority, key, server.public_key(), name, [alternative_name(name)]
    )
    (folder / "server.crt").write_bytes(forged.public_bytes(Encoding.PEM))

    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(folder, name)
    constraints = authority.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
