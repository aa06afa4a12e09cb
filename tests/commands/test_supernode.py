"""The command becomes Flower's SuperNode."""

import os
import sys
import tempfile

import pytest

from fedllm.deployment import supernode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture
def becomes(monkeypatch, tmp_path) -> list[list[str]]:
    """What the command becomes, in place of becoming it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(supernode, "_BIN", tmp_path)
    for name in ("PATH", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL")
    return calls


def test_the_command_becomes_a_supernode_that_finds_the_program_first(
    becomes, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(
        supernode,
        "start_fork_server",
        lambda clientapp, _: asked.append(clientapp) or (tmp_path / "here", None, -1),
    )
    before = os.environ["PATH"]
    supernode.main(["--insecure", "--port", "9094"])

    assert becomes == [
        [str(tmp_path / "flower-supernode"), "--insecure", "--port", "9094"]
    ]
    assert asked == [tmp_path / "flwr-clientapp"]
    assert os.environ["PATH"] == f"{tmp_path / 'here'}:{before}"
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.05"


@pytest.mark.parametrize(
    ("platform", "arguments"),
    [
        ("linux", ["--help"]),
        ("linux", ["--isolation", "process"]),
        ("linux", ["--isolation=process"]),
        ("linux", ["--allow-runtime-dependency-installation"]),
        ("darwin", []),
    ],
)
def test_the_command_starts_no_server_that_nobody_could_use(
    becomes, monkeypatch, platform, arguments
):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(supernode, "start_fork_server", None)
    supernode.main(arguments)

    assert len(becomes) == 1


def test_a_node_whose_clients_cannot_be_forked_says_so_and_starts(
    becomes, monkeypatch, tmp_path, capsys
):
    nowhere = tmp_path / ("long" * 30)
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    monkeypatch.setenv("FEDLLM_HOME", str(nowhere))
    before = os.environ["PATH"]
    supernode.main([])

    assert len(becomes) == 1
    assert os.environ["PATH"] == before
    said = capsys.readouterr().err
    assert "each client imports its libraries: AF_UNIX path too long" in said
    assert list(nowhere.iterdir()) == []
