"""The fork server and its program, with a stand-in for Flower's client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.helpers.flower_processes import wait_until
from tests.helpers.fork_servers import Node, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@contextlib.contextmanager
def sleeping(node: Node) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A program whose client sleeps, and the client."""
    command = node.command("0", "sleep")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        said = json.loads(program.stdout.readline())
        yield program, psutil.Process(said["pid"])
        program.kill()


def test_a_client_has_the_programs_arguments_streams_folder_and_environment(
    node, tmp_path
):
    environment = {**os.environ, "MARK": "\udcff here"}
    status, said, errors = node.call(
        "7", "a b", "'", cwd=tmp_path, env=environment, input="told"
    )

    assert status == 7
    assert said["argv"] == ["flwr-clientapp", "7", "a b", "'"]
    assert said["folder"] == str(tmp_path)
    assert said["mark"] == "\udcff here"
    assert said["input"] == "told"
    assert errors == "wrong\n"
    assert said["interrupted"] == "default_int_handler"
    assert said["ends"] == [True] * 3


def test_clients_are_processes_of_their_own_with_chances_of_their_own(node):
    with sleeping(node):
        (_, first, _), (_, second, _) = node.call("0"), node.call("0")

    assert first["pid"] != second["pid"]
    assert first["random"] != second["random"]
    assert first["torch"] and second["torch"]
    assert first["descriptors"] == second["descriptors"] == [0, 1, 2]


def test_a_client_that_is_killed_ends_its_program_as_a_shell_would(node):
    assert node.call("0", "killed")[0] == 128 + signal.SIGKILL


def test_a_program_that_is_ended_takes_its_client_along(node):
    with sleeping(node) as (program, client):
        program.terminate()
        wait_until(lambda: not client.is_running())

    assert node.call("0")[0] == 0


def test_the_supernodes_end_ends_clients_and_server_and_leaves_no_file(node):
    with sleeping(node) as (program, client):
        node.end()

        assert program.wait(timeout=30) == 128 + signal.SIGTERM
        wait_until(lambda: not client.is_running())
    node.server.wait(timeout=30)
    assert not node.socket.parent.exists()


def test_a_client_that_cannot_begin_is_none(node, tmp_path):
    request = {"argv": ["0"], "folder": str(tmp_path / "gone"), "environment": {}}
    with socket.socket(socket.AF_UNIX) as program, open(os.devnull, "r+") as null:
        program.connect(str(node.socket))
        socket.send_fds(program, [b"\0"], [null.fileno()] * 3)
        program.sendall(json.dumps(request).encode() + b"\n")
        said = b"".join(iter(lambda: program.recv(16), b""))

    # Not that it was taken, so that its program becomes Flower's.
    assert said == b"1"
    assert node.call("0")[0] == 0


@pytest.mark.parametrize(
    "sign", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
)
def test_what_ends_a_group_is_left_to_the_supernode_and_its_clients(node, sign):
    assert node.call("0")[0] == 0
    node.server.send_signal(sign)

    assert node.call("3")[0] == 3


@pytest.mark.parametrize(
    ("sent", "with_streams"),
    [
        (b"", False),
        (b"\0{}\n", False),
        (b'\0{"argv": [', True),
        (b"\0{nonsense\n", True),
    ],
)
def test_a_request_that_breaks_off_harms_nobody(node, sent, with_streams):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(node.socket))
        if with_streams:
            socket.send_fds(client, [sent], [0, 1, 2])
        else:
            client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""

    assert node.call("4")[0] == 4


def test_a_request_that_never_ends_does_not_stop_the_node(node):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(node.socket))

        assert node.call("4")[0] == 4


@pytest.mark.parametrize("is_node_ended", [False, True])
def test_a_client_that_does_not_heed_its_end_is_killed(cold, is_node_ended):
    deaf = "fork_server._SECONDS_TO_END = 0.2\nreal = client\n"
    deaf += (
        "def client():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    real()\n"
    )
    deaf += "fork_server._imported = lambda: client"
    with started(cold, deaf) as node, sleeping(node) as (program, client):
        if is_node_ended:
            node.end()
        else:
            program.terminate()
        wait_until(lambda: not client.is_running(), 20)


def test_a_request_has_a_largest_size_and_one_deadline_for_all_of_it(node):
    with socket.socket(socket.AF_UNIX) as client, open(os.devnull) as null:
        client.connect(str(node.socket))
        socket.send_fds(client, [b"\0"], [null.fileno()] * 3)
        with pytest.raises(ConnectionError):
            client.sendall(b"x" * 8_000_000)
    with socket.socket(socket.AF_UNIX) as client, open(os.devnull) as null:
        client.connect(str(node.socket))
        socket.send_fds(client, [b"\0"], [null.fileno()] * 3)
        started_at = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < started_at + 10:
                client.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() < started_at + 5

    assert node.call("4")[0] == 4


@pytest.mark.parametrize("imported", ["None", "1 / 0"])
def test_a_server_that_cannot_serve_leaves_its_folder_to_nobody(cold, imported):
    with started(cold, f"fork_server._imported = lambda: {imported}") as node:
        assert node.call("0")[:2] == (5, {"cold": "0"})
        # It stays on the SuperNode's PATH.
        assert node.program.exists()
        # A process without libraries keeps it.
        wait_until(lambda: "-S" in psutil.Process(node.server.pid).cmdline())
        for sign in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            node.server.send_signal(sign)
        assert node.call("0")[0] == 5
        node.end()
        node.server.wait(timeout=30)
        assert not node.socket.parent.exists()


IMPORTS = """
import sys
import torch
from fedllm import errors, logs
from fedllm.client import preload
from fedllm.deployment import fork_server

logs.show_log()
def broken(**asked):
    print(asked)
    raise errors.ModelError("broken here")

real, preload.import_libraries = preload.import_libraries, broken
print(fork_server._imported())
torch.cuda.is_available = lambda: True
print(fork_server._imported())
preload.import_libraries = lambda **asked: None
def unusable():
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
torch.cuda.init = unusable
print(fork_server._imported())
torch.cuda.init = lambda: None
print(fork_server._imported().__name__, "fedllm" in sys.modules)
torch.cuda.is_available = lambda: False
print(fork_server._imported().__name__)
print({"bitsandbytes", "trl", "peft"} <= set(sys.modules), "fedllm" in sys.modules)
print([name for name in sys.modules if name.startswith("fedllm.")])
"""


def test_the_server_imports_what_a_client_takes_or_leaves_it_to_the_clients():
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "forked from" not in line]
    assert said == [
        "{'quantized': True, 'per_example': False}",
        "warning: broken here",
        "None",
        "{'quantized': False, 'per_example': False}",
        "warning: broken here",
        "None",
        "None",
        "main False",
        "main",
        "True False",
        "[]",
    ]
    assert done.stdout.count("CUDA cannot be used in a process") == 1
