"""The gate's list of nodes: whose requests it hands on."""

import json
import re
import stat
from base64 import b64decode

import pytest
from flwr.cli.supernode.register import try_load_public_key

from fedllm.deployment.gate import write_gate
from fedllm.errors import KeyFolderError
from tests.helpers.flower_processes import ROOT
from tests.helpers.key_folders import make


def listed(folder) -> list[bytes]:
    """Return the keys of the list, as the SuperLink decodes the header."""
    text = (folder / "gate.caddy").read_text()
    return [
        b64decode(value, validate=True)
        for value in re.findall(r'^header Flwr-Public-Key "(\S+)"$', text, re.MULTILINE)
    ]


def public(folder, name: str) -> bytes:
    return try_load_public_key(folder / "nodes" / f"{name}.pub")


def test_the_list_has_each_nodes_key_as_its_supernode_sends_it(tmp_path):
    make(tmp_path / "keys", "--nodes", "2")

    folder = tmp_path / "keys"
    assert listed(folder) == [public(folder, name) for name in ("node-1", "node-2")]


def test_a_further_node_joins_the_list_and_a_removed_one_leaves_it(tmp_path, capsys):
    folder = tmp_path / "keys"
    make(folder, "--nodes", "1")
    make(folder, "--add-node", "clinic-d")
    assert listed(folder) == [public(folder, name) for name in ("clinic-d", "node-1")]

    (folder / "nodes" / "node-1.pub").unlink()
    capsys.readouterr()
    make(folder, "--write-gate")

    assert listed(folder) == [public(folder, "clinic-d")]
    assert "start the gate anew" in capsys.readouterr().out
    assert stat.S_IMODE((folder / "gate.caddy").stat().st_mode) == 0o600


def test_on_a_nodes_own_machine_there_is_no_list(tmp_path):
    make(tmp_path / "keys", "--add-node", "clinic-d")

    assert not (tmp_path / "keys" / "gate.caddy").exists()


@pytest.mark.parametrize("text", ["", "ssh-rsa x", "header Flwr-Public-Key *"])
def test_a_key_that_cannot_be_read_leaves_the_list_as_it_was(tmp_path, text):
    folder = tmp_path / "keys"
    make(folder)
    before = (folder / "gate.caddy").read_text()
    (folder / "nodes" / "odd.pub").write_text(text)

    with pytest.raises(KeyFolderError, match=r"odd\.pub: is no public key"):
        write_gate(folder)

    assert (folder / "gate.caddy").read_text() == before


def test_a_files_name_adds_no_line(tmp_path):
    folder = tmp_path / "keys"
    make(folder, "--nodes", "1")
    path = folder / "nodes" / "node-1.pub"
    path.rename(path.with_name('x\nheader Flwr-Public-Key "a".pub'))

    write_gate(folder)

    assert len((folder / "gate.caddy").read_text().splitlines()) == 3


def test_json_names_who_is_let_through(tmp_path, capsys):
    make(tmp_path / "keys", "--nodes", "2")
    capsys.readouterr()
    make(tmp_path / "keys", "--write-gate", "--json")

    assert json.loads(capsys.readouterr().out)["nodes"] == ["node-1", "node-2"]


def test_the_gate_names_each_call_of_flowers_client_but_two():
    import inspect

    from flwr.supernode.fleet_http_client import FleetHttpClient

    source = inspect.getsource(FleetHttpClient)
    calls = set(re.findall(r'path="(/v1/fleet/[a-z-]+)"', source))
    ours = (ROOT / "deploy" / "Caddyfile").read_text()

    assert len(calls) == 12
    assert calls - {*re.findall(r"/v1/fleet/[a-z-]+", ours)} == {
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
    }
