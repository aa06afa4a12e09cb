"""The server's signing key, and what it signs."""

import pytest

from fedllm.errors import ConfigError, KeyFolderError
from fedllm.signatures import (
    fingerprint,
    is_signed,
    parse_public,
    public_line,
    server_key,
    sign,
)


def test_a_home_has_one_key_which_its_owner_alone_reads(tmp_path):
    key = server_key(tmp_path / "home")
    folder = tmp_path / "home" / "signing"

    again = server_key(tmp_path / "home").public_key()
    assert public_line(again) == public_line(key.public_key())
    assert (folder / "server").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    stored = parse_public((folder / "server.pub").read_text())
    assert fingerprint(stored) == fingerprint(key.public_key())


def test_a_signature_holds_for_its_text_label_and_key_alone(tmp_path):
    key, other = server_key(tmp_path / "a"), server_key(tmp_path / "b")
    signature = sign("label", "text", key)

    assert is_signed("label", "text", signature, key.public_key())
    assert not is_signed("label", "text ", signature, key.public_key())
    assert not is_signed("other", "text", signature, key.public_key())
    assert not is_signed("label", "text", signature, other.public_key())
    assert not is_signed("label", "text", "no hex", key.public_key())


def test_a_key_that_is_damaged_is_one_line(tmp_path):
    server_key(tmp_path)
    (tmp_path / "signing" / "server").write_text("nothing")

    with pytest.raises(KeyFolderError, match="move this one away") as caught:
        server_key(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_key_that_others_may_write_is_not_used(tmp_path):
    server_key(tmp_path)
    (tmp_path / "signing" / "server").chmod(0o666)

    with pytest.raises(ConfigError, match="others may write"):
        server_key(tmp_path)


@pytest.mark.parametrize("line", ["", "ssh-ed25519 AAAA", "ssh-rsa AAAA", "\x00"])
def test_what_is_no_key_is_none(line):
    assert parse_public(line) is None
