"""Keys of a deployment: what TLS and Flower make of them."""

import ssl
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from tests.helpers.key_folders import contents, handshake, make


@pytest.fixture
def folder(tmp_path):
    # A name that shells and TOML both have to be protected from.
    return tmp_path / 'a fed\'s "keys"'


def test_a_client_that_trusts_the_ca_believes_the_servers_names_and_no_other(folder):
    make(folder, "--server-ip", "10.1.2.3")

    for name in ("fl.example.org", "10.1.2.3", "localhost", "127.0.0.1", "::1"):
        assert handshake(folder, name) == "TLSv1.3"
    for name in ("other.example.org", "10.1.2.4"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(folder, name)


def test_flower_takes_a_nodes_private_key_and_registers_the_public_one(folder):
    make(folder, "--nodes", "2")
    make(folder, "--add-node", "clinic-d")

    names = ["clinic-d", "node-1", "node-2"]
    registered = set()
    for name in names:
        private = (folder / "nodes" / name).read_bytes()
        pair = serialization.load_ssh_private_key(private, None)
        public = try_load_public_key(folder / "nodes" / f"{name}.pub")
        assert public == public_key_to_bytes(pair.public_key())
        registered.add(public)
    (line,) = (folder / "nodes" / "node-1.pub").read_text().splitlines()
    assert line.endswith(" node-1@fl.example.org")
    assert len(registered) == 3
    assert sorted(p.name for p in (folder / "nodes").glob("*[!b]")) == names


def test_only_the_owner_reads_what_is_made(folder):
    make(folder)
    make(folder, "--add-node", "clinic-d")

    made = [folder, *folder.rglob("*")]
    assert len(made) == 2 + 6 + 8
    for path in made:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("more", [[], ["--add-node", "node-1"]])
def test_nothing_that_exists_is_written_over(folder, more):
    make(folder)
    before = contents(folder)
    assert folder / "gate.caddy" in before

    with pytest.raises(
        SystemExit, match="KeyFolderError: .*exists, and keys are never"
    ):
        make(folder, *more)

    assert contents(folder) == before
    assert [p for p in folder.parent.iterdir() if p != folder] == []
