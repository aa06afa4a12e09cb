"""Where the fork server lives, and how it is started."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from fedllm.deployment import supernode
from tests.helpers.fork_servers import SERVER, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def test_only_the_nodes_user_reaches_the_server(node, home):
    assert node.socket.parent.parent == home
    assert node.socket.parent.stat().st_mode & 0o777 == 0o700
    assert list(node.socket.parent.iterdir()) == [node.socket]


BECOMES = """
import sys
from pathlib import Path
from fedllm.commands.supernode import main
from fedllm.deployment import flower_programs, supernode
flower_programs.environment_bin = lambda: Path(sys.argv[1])
supernode.FORK_SERVER_COMMAND = (sys.executable, "-P", "-c", sys.argv[2])
main(["6"])
"""


def test_the_supernode_that_it_becomes_starts_forked_clients(cold):
    flower = cold.parent / "flower-supernode"
    # Long enough for a server that was told of an end to have ended.
    flower.write_text('#!/bin/sh\nsleep 2\nflwr-clientapp "$@"\n')
    flower.chmod(0o700)
    command = [sys.executable, "-c", BECOMES, str(cold.parent), SERVER]
    done = subprocess.run(
        command, capture_output=True, text=True, input="", timeout=60, check=False
    )

    assert done.returncode == 6, done.stderr
    forked, said = done.stdout.splitlines()
    assert forked.startswith("clients are forked by process")
    assert json.loads(said)["argv"] == ["flwr-clientapp", "6"]


def test_where_fedllms_home_will_not_do_the_temporary_folder_does(
    cold, monkeypatch, tmp_path, home
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FEDLLM_HOME", str(home / ("long" * 30)))
    with started(cold) as node:
        assert node.socket.parent.parent == tmp_path
    assert [path for path in home.rglob("*") if path.name.startswith("fedllm")] == []


def test_a_server_that_cannot_be_started_leaves_nothing(home, tmp_path):
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        supernode.start_fork_server((str(tmp_path / "gone"),))

    assert len(os.listdir("/proc/self/fd")) == open_before
    assert list(home.iterdir()) == []
