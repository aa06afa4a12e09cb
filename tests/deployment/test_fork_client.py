"""The program in Flower's place, and when it leaves the work to Flower's own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.deployment import fork_client
from tests.helpers.flower_processes import wait_until
from tests.helpers.fork_servers import started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


def test_a_folder_that_is_gone_is_left_to_flowers_own_program(node, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = "import os, subprocess, sys; os.rmdir(os.getcwd());"
    code += "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    command = [sys.executable, "-c", code, *node.command("0")]

    assert subprocess.run(command, cwd=folder, check=False).returncode == 5


def test_without_a_server_flowers_own_program_runs(node):
    node.server.kill()
    node.server.wait(timeout=30)

    assert node.call("--token", "x y")[:2] == (5, {"cold": "--token x y"})


def test_a_server_that_ends_with_a_request_in_hand_leaves_it_to_flowers_program(
    node, tmp_path
):
    node.server.send_signal(signal.SIGSTOP)
    command = node.command("3")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        time.sleep(0.5)
        assert program.poll() is None
        node.server.kill()
        told, _ = program.communicate(timeout=30)
    node.server.wait(timeout=30)

    assert (program.returncode, json.loads(told)) == (5, {"cold": "3"})


def test_a_run_that_brings_its_libraries_along_gets_flowers_own_program(node):
    flag = "--allow-runtime-dependency-installation"

    assert node.call("0", flag)[:2] == (5, {"cold": f"0 {flag}"})


def test_a_message_that_waits_long_gets_one_client_and_it_is_flowers(
    cold, tmp_path, monkeypatch
):
    quick = tmp_path / "fork_client.py"
    text = Path(fork_client.__file__).read_text("utf-8")
    quick.write_text(text.replace("SECONDS_TO_TAKE = 15", "SECONDS_TO_TAKE = 1"))
    monkeypatch.setattr(fork_client, "__file__", str(quick))
    with started(cold) as node:
        # Its own work may take as long as it will.
        assert node.call("3", "rest")[0] == 3
        node.server.send_signal(signal.SIGSTOP)
        # No pipe: its end is in the request, which the server has yet to read.
        with (tmp_path / "told").open("w") as told:
            command = node.command("0", "note")
            done = subprocess.run(command, cwd=tmp_path, stdout=told, check=False)
        node.server.send_signal(signal.SIGCONT)

        assert done.returncode == 5
        assert json.loads((tmp_path / "told").read_text()) == {"cold": "0 note"}
        assert node.call("0", cwd=tmp_path)[0] == 0
    assert not (tmp_path / "note").exists()


def test_a_client_whose_program_ends_before_it_has_begun_never_begins(cold, tmp_path):
    slow = """
let_go = fork_server._Server._let_go
def late(self):
    open("forked", "w").close()
    time.sleep(1)
    let_go(self)
fork_server._Server._let_go = late
"""
    with started(cold, f"os.chdir({str(tmp_path)!r})" + slow) as node:
        command = node.command("0", "note")
        with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as program:
            wait_until((tmp_path / "forked").exists)
            program.kill()
        assert node.call("0")[0] == 0
    assert not (tmp_path / "note").exists()
