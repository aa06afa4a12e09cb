"""The command becomes Flower's SuperNode."""

import os
import sys
import tempfile

import pytest

from fedllm.commands import supernode as command
from fedllm.deployment import flower_programs, supernode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture
def becomes(monkeypatch, tmp_path) -> list[list[str]]:
    """What the command becomes, in place of becoming it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(flower_programs, "environment_bin", lambda: tmp_path)
    (tmp_path / "flower-supernode").touch()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [name for name in os.environ if name.startswith("FLWR_")]:
        os.environ.pop(name)
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
    command.main(["--insecure", "--port", "9094"])

    assert becomes == [
        [str(tmp_path / "flower-supernode"), "--insecure", "--port", "9094"]
    ]
    assert asked == [tmp_path / "flwr-clientapp"]
    path = f"{tmp_path / 'here'}:{tmp_path}:{before}"
    assert os.environ["PATH"] == path
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.05"
    # A clinic's node would report its machine to Flower's makers for each client.
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


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
    command.main(arguments)

    assert len(becomes) == 1


def test_a_node_whose_clients_cannot_be_forked_says_so_and_starts(
    becomes, monkeypatch, tmp_path, capsys
):
    nowhere = tmp_path / ("long" * 30)
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    monkeypatch.setenv("FEDLLM_HOME", str(nowhere))
    before = os.environ["PATH"]
    command.main([])

    assert len(becomes) == 1
    assert os.environ["PATH"] == f"{tmp_path}:{before}"
    said = capsys.readouterr().err
    assert "each client imports its libraries: AF_UNIX path too long" in said
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--superlink", "a:9192", "--node-config", 'data-path="~/a b" delta=1e-5'],
        ["--isolation=process", "--max-retries", "-1", "--", "rest", "-x"],
        ["--ho", "::1", "--hom", "x"],
    ],
)
def test_every_argument_but_home_is_handed_on_untouched(becomes, monkeypatch, words):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(words)

    assert becomes[0][1:] == words


def test_home_is_ours_and_made(becomes, monkeypatch, tmp_path):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(["--insecure", "--home", str(tmp_path / "node"), "--port", "1"])

    assert becomes[0][1:] == ["--insecure", "--port", "1"]
    assert os.environ["FEDLLM_HOME"] == str(tmp_path / "node")
    assert (tmp_path / "node").is_dir()
