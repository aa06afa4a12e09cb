"""What a reviewer signed is believed as it stands, and while its owner trusts the key."""

import shutil

import pytest

from fedllm.deployment.keys import add_node_key, add_reviewer_key
from fedllm.errors import ConfigError, NodeError
from fedllm.node.log import node_folder
from fedllm.node.reviews import distrust, fingerprint, reviewers, sign, signer, trust

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def alice(tmp_path):
    return add_reviewer_key(tmp_path / "keys", "alice")


def test_a_signature_holds_for_what_it_names_and_for_nothing_else(alice):
    signature = sign(DIGEST, 3, 1000, alice)
    assert signer(DIGEST, 3, 1000, signature) is None

    trust(alice.with_suffix(".pub"))
    assert signer(DIGEST, 3, 1000, signature) == "alice"
    assert signer("cd" * 32, 3, 1000, signature) is None
    assert signer(DIGEST, 4, 1000, signature) is None
    assert signer(DIGEST, 3, 1001, signature) is None
    for broken in ("", "zz", signature[:-2], signature[:-1] + "g"):
        assert signer(DIGEST, 3, 1000, broken) is None


def test_a_reviewer_is_trusted_until_the_owner_takes_it_back(alice, tmp_path):
    bob = add_reviewer_key(tmp_path / "keys", "bob")
    by_alice, by_bob = (sign(DIGEST, 3, 1000, key) for key in (alice, bob))
    for key in (alice, bob, bob):
        trust(key.with_suffix(".pub"))
    assert signer(DIGEST, 3, 1000, by_bob) == "bob"
    distrust("bob")
    assert signer(DIGEST, 3, 1000, by_bob) is None
    assert signer(DIGEST, 3, 1000, by_alice) == "alice"
    (node_folder() / "outside.pub").touch()
    for name in ("bob", "../outside", ""):
        with pytest.raises(NodeError, match=r"no such reviewer \(trusted: alice\)"):
            distrust(name)


def test_a_name_that_is_taken_by_another_key_stays_that_keys(alice, tmp_path):
    trust(alice.with_suffix(".pub"))
    other = add_reviewer_key(tmp_path / "others", "alice")
    with pytest.raises(NodeError, match="is trusted with another key"):
        trust(other.with_suffix(".pub"))
    assert signer(DIGEST, 3, 1000, sign(DIGEST, 3, 1000, other)) is None


def test_a_fingerprint_is_the_one_that_ssh_prints(tmp_path):
    # `ssh-keygen -l` of OpenSSH 9.2 printed it for this key.
    path = tmp_path / "zero.pub"
    path.write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
    )
    printed = "SHA256:tAXFyTXI8xtDaujAEcwJslAYc9/6FKcUkd2Lw0xDhPo"
    name = trust(path)
    assert fingerprint(reviewers()[name]) == printed


def test_what_is_no_ed25519_key_is_refused_in_one_line(alice, tmp_path):
    node = add_node_key(tmp_path / "keys", "node-1")
    garbage = tmp_path / "garbage.pub"
    garbage.write_text("ssh-ed25519 !")
    with pytest.raises(NodeError, match="is no Ed25519 key"):
        trust(node.with_suffix(".pub"))
    for path in (garbage, tmp_path / "missing.pub", alice):
        with pytest.raises(NodeError, match="cannot be read as a public key"):
            trust(path)
    with pytest.raises(NodeError, match="is no Ed25519 key"):
        sign(DIGEST, 3, 1000, node)
    for path in (garbage, tmp_path / "missing", alice.with_suffix(".pub")):
        with pytest.raises(NodeError, match="cannot be read as a private key"):
            sign(DIGEST, 3, 1000, path)
    strange = tmp_path / "a b.pub"
    shutil.copy(alice.with_suffix(".pub"), strange)
    with pytest.raises(NodeError, match="letters, digits"):
        trust(strange)
    assert reviewers() == {}


def test_reviewers_whom_others_may_write_are_no_reviewers(alice):
    trust(alice.with_suffix(".pub"))
    folder = node_folder() / "reviewers"
    for path in (folder, folder / "alice.pub"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o022)
        with pytest.raises(ConfigError, match="others may write"):
            reviewers()
        path.chmod(mode)
    alice.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        sign(DIGEST, 3, 1000, alice)
