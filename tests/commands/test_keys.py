"""Keys of a deployment: what TLS and Flower make of them, and that none is lost."""

import shlex
import tomllib

import pytest

from tests.helpers.key_folders import contents, make


@pytest.fixture
def folder(tmp_path):
    # A name that shells and TOML both have to be protected from.
    return tmp_path / 'a fed\'s "keys"'


def test_a_nodes_owner_can_make_the_key_alone(folder, capsys):
    make(folder, "--add-node", "clinic-d")

    assert {p.name for p in contents(folder)} == {"clinic-d", "clinic-d.pub"}
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "register" in x]
    assert str(folder / "nodes" / "clinic-d.pub") in shlex.split(line)


def test_the_entry_for_flowers_config_is_toml_with_absolute_paths(folder):
    make(folder, "--control-address", "127.0.0.1:7")

    entry = tomllib.loads((folder / "config.toml").read_text())["superlink"]["private"]
    assert entry == {
        "address": "127.0.0.1:7",
        "root-certificates": str(folder / "ca.crt"),
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--add-node", "../escape"], "node name: .*got '../escape'"),
        (["--add-node", "x.pub"], "node name"),
        (["--server-name", "two words"], "must be a DNS name or an IP address"),
        (["--server-ip", "10.0.0.0/8"], "must be a DNS name or an IP address"),
    ],
)
def test_a_bad_name_is_refused_and_leaves_nothing(folder, more, said):
    with pytest.raises(SystemExit, match=said):
        make(folder, *more)
    assert list(folder.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="KeyFolderError: .*cannot be written: "):
        make(tmp_path / "file" / "keys")
