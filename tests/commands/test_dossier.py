"""The command: written, checked, and each error one line."""

import json

import pytest

from fedllm.commands import dossier
from fedllm.signatures import server_key
from tests.helpers.dossiers import chain_of, finished, node_file


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_dossier_is_written_and_checked_with_a_nodes_end(home, tmp_path, capsys):
    folder = finished(home / "runs" / "one")
    dossier.main(["one"])
    assert "signed by: SHA256:" in capsys.readouterr().out
    dossier.main(["one", "--verify"])
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("OPEN") == 1 and "not excluded" in out

    node = node_file(tmp_path / "n.json", chain_of(folder), 2, 3, server_key(home))
    dossier.main(["one", "--verify", "--head", str(node), "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["passed"] and {c["passed"] for c in content["checks"]} == {True}


def test_a_dossier_that_does_not_hold_is_exit_status_1(home, capsys):
    folder = finished(home / "runs" / "one")
    dossier.main(["one"])
    (folder / "dossier.html").write_text("another")

    with pytest.raises(SystemExit) as caught:
        dossier.main(["one", "--verify"])
    assert caught.value.code == 1
    assert "FAIL  page: dossier.html was changed" in capsys.readouterr().out


def test_who_checks_elsewhere_names_the_servers_key(
    home, tmp_path, monkeypatch, capsys
):
    folder = finished(home / "runs" / "one")
    dossier.main(["one"])
    public = home / "signing" / "server.pub"
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "elsewhere"))
    capsys.readouterr()

    dossier.main([str(folder), "--verify"])
    assert "OPEN  key: whose it is, is not known" in capsys.readouterr().out
    dossier.main([str(folder), "--verify", "--key", str(public)])
    assert "PASS  key: the server's" in capsys.readouterr().out


def test_errors_are_one_line(home):
    finished(home / "runs" / "half", finished=False)
    with pytest.raises(SystemExit, match="the run is interrupted"):
        dossier.main(["half"])
    with pytest.raises(SystemExit, match="there is no such run"):
        dossier.main(["none"])
    with pytest.raises(SystemExit, match="cannot be read"):
        dossier.main(["half", "--verify"])
