"""Keys of a deployment: what TLS and Flower make of them, and that none is lost."""

import hashlib
import json
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from fedllm.client.trustee import load_identity
from fedllm.commands import keys, superlink
from fedllm.deployment.flower_programs import program_path
from fedllm.node.reviews import trust
from fedllm.privacy.agreement import pin_of
from tests.helpers.key_folders import contents, make

APP = """
[project]
name = "small"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "us"

[tool.flwr.app.components]
serverapp = "small.server:app"
clientapp = "small.client:app"
"""


@pytest.fixture
def folder(tmp_path):
    # A name that shells and TOML both have to be protected from.
    return tmp_path / 'a fed\'s "keys"'


def test_a_nodes_owner_can_make_the_key_alone(folder, capsys):
    make(folder, "--add-node", "clinic-d")

    assert {p.name for p in contents(folder)} == {"clinic-d", "clinic-d.pub"}
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "register" in x]
    assert str(folder / "nodes" / "clinic-d.pub") in shlex.split(line)


def test_a_trustees_key_comes_with_the_pin_of_its_public_half(folder, capsys):
    make(folder, "--add-trustee", "berlin")
    out = capsys.readouterr().out
    path = folder / "trustees" / "berlin"
    pin = pin_of(load_identity(path).public_key())

    assert f"berlin:{pin}" in out
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SystemExit, match="never written over"):
        make(folder, "--add-trustee", "berlin")
    with pytest.raises(SystemExit, match="small letters"):
        make(folder, "--add-trustee", "Berlin")


def test_a_reviewers_key_is_one_that_nodes_can_trust(folder, capsys, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(folder.parent / "home"))
    make(folder, "--add-reviewer", "alice")

    assert {p.name for p in contents(folder)} == {"alice", "alice.pub"}
    assert "fedllm node trust alice.pub" in capsys.readouterr().out
    public = folder / "reviewers" / "alice.pub"
    assert trust(public) == "alice" and public.stat().st_mode & 0o077 == 0
    with pytest.raises(SystemExit, match="keys are never written over"):
        make(folder, "--add-reviewer", "alice")


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
        (["--add-node", "../escape"], "name: .*got '../escape'"),
        (["--add-reviewer", "../escape"], "name: .*got '../escape'"),
        (["--add-node", "x.pub"], "name: letters"),
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


def test_the_superlink_that_is_printed_finds_the_keys(folder, capsys):
    make(folder, "--control-address", "127.0.0.1:7")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "superlink --" in x]
    command, name, *words = shlex.split(line)
    args = superlink.parser().parse_args(words)

    assert (command, name) == ("fedllm", "superlink")
    assert (args.keys, args.port) == (str(folder), 7)


def test_json_names_the_files_that_were_written(folder, capsys):
    make(folder, "--nodes", "2", "--json")
    files = json.loads(capsys.readouterr().out)
    nodes = files.pop("nodes")

    assert set(nodes) == {"node-1", "node-2"}
    paths = {*files.values(), *(p for pair in nodes.values() for p in pair.values())}
    assert {Path(path) for path in paths} == set(contents(folder))
    make(folder, "--add-node", "clinic-d", "--json")
    pair = json.loads(capsys.readouterr().out)["nodes"]["clinic-d"]
    assert Path(pair["private"]).exists() and pair["public"] == pair["private"] + ".pub"


# A library of Flower's uses a name that another library will drop.
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_apps_hash_is_that_of_the_bundle_that_flower_builds(
    tmp_path, monkeypatch, capsys
):
    here = tmp_path / "small"
    (here / "small").mkdir(parents=True)
    (here / "pyproject.toml").write_text(APP)
    for name in ("server", "client"):
        (here / "small" / f"{name}.py").write_text("app = 1\n")
    (here / "LICENSE").write_text("free\n")
    monkeypatch.chdir(here)

    keys.main(["--app-hash"])
    digest = capsys.readouterr().out.strip()
    keys.main(["--app-hash", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "app": str(here),
        "sha256": digest,
    }
    subprocess.run([program_path("flwr"), "build"], check=True, capture_output=True)
    (bundle,) = here.glob("*.fab")
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == digest
    (here / "small" / "client.py").write_text("app = 2\n")
    keys.main(["--app-hash"])
    assert capsys.readouterr().out.strip() != digest
