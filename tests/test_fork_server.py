"""The fork server and its program, with a stand-in for Flower's client."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedllm.commands import supernode as supernode_command
from fedllm.deployment import fork_client, supernode
from tests.slow.flower_processes import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")

SERVER = """
import json, os, signal, sys, time
import numpy.random
from fedllm import fork_server

class Torch:
    seeded = False

    class default_generator:
        seed = staticmethod(lambda: setattr(Torch, "seeded", True))

sys.modules["torch"] = Torch

def client():
    said = {"argv": sys.argv, "folder": os.getcwd(), "mark": os.environ.get("MARK")}
    said |= {"pid": os.getpid(), "random": int(numpy.random.randint(2**31))}
    said |= {"torch": Torch.seeded}
    said |= {"interrupted": signal.getsignal(signal.SIGINT).__name__}
    ends = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
    said |= {"ends": [signal.getsignal(end) == signal.SIG_DFL for end in ends]}
    said |= {"descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1]}
    said |= {"input": "" if "sleep" in sys.argv else sys.stdin.read()}
    print(json.dumps(said), flush=True)
    print("wrong", file=sys.stderr, flush=True)
    if "note" in sys.argv:
        open("note", "w").close()
    if "sleep" in sys.argv:
        time.sleep(60)
    if "rest" in sys.argv:
        time.sleep(2)
    if "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))

fork_server._imported = lambda: client
fork_server._SECONDS_TO_ASK = 0.5
# MORE
fork_server.main()
"""


@dataclass
class Node:
    """What a SuperNode has: the program, and what ends the server if it ends."""

    program: Path
    server: "subprocess.Popen[bytes]"
    alive: int

    def command(self, *arguments: str) -> list[str]:
        return [str(self.program), *arguments]

    def call(self, *arguments: str, **options: Any) -> tuple[int, dict[str, Any], str]:
        """Run the program; return its status, what its client said and its errors."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **{"input": "", **options},
        )
        return done.returncode, json.loads(done.stdout), done.stderr

    def end(self) -> None:
        """As the SuperNode's end does."""
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1


@pytest.fixture
def cold(tmp_path) -> Path:
    """A stand-in for Flower's own program."""
    program = tmp_path / "flwr-clientapp"
    program.write_text('#!/bin/sh\necho "{\\"cold\\": \\"$@\\"}"\nexit 5\n')
    program.chmod(0o700)
    return program


@contextlib.contextmanager
def started(cold: Path, more: str = "") -> Iterator[Node]:
    """A node whose server runs this too before it serves."""
    server = (sys.executable, "-P", "-c", SERVER.replace("# MORE", more))
    folder, process, alive = supernode.start_fork_server(cold, server)
    here = Node(folder / "flwr-clientapp", process, alive)
    try:
        yield here
    finally:
        here.end()
        process.wait(timeout=30)
        # A server that was killed leaves it.
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Path:
    """A home of few letters, since the path of a socket may have 107."""
    folder = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("FEDLLM_HOME", str(folder))
    return folder


@pytest.fixture
def node(cold) -> Iterator[Node]:
    with started(cold) as here:
        yield here


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

        assert program.wait(timeout=30) == 1
        wait_until(lambda: not client.is_running())
    node.server.wait(timeout=30)
    assert not node.program.parent.exists()


def test_a_client_that_cannot_begin_is_none(node, tmp_path):
    request = {"argv": ["0"], "folder": str(tmp_path / "gone"), "environment": {}}
    with socket.socket(socket.AF_UNIX) as program, open(os.devnull, "r+") as null:
        program.connect(str(node.program.parent / "socket"))
        socket.send_fds(program, [b"\0"], [null.fileno()] * 3)
        program.sendall(json.dumps(request).encode() + b"\n")
        said = b"".join(iter(lambda: program.recv(16), b""))

    # Not that it was taken, so that its program becomes Flower's.
    assert said == b"1"
    assert node.call("0")[0] == 0


def test_a_folder_that_is_gone_is_left_to_flowers_own_program(node, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    code = "import os, subprocess, sys; os.rmdir(os.getcwd());"
    code += "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    command = [sys.executable, "-c", code, *node.command("0")]

    assert subprocess.run(command, cwd=folder, check=False).returncode == 5


@pytest.mark.parametrize(
    "sign", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
)
def test_what_ends_a_group_is_left_to_the_supernode_and_its_clients(node, sign):
    assert node.call("0")[0] == 0
    node.server.send_signal(sign)

    assert node.call("3")[0] == 3


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
        client.connect(str(node.program.parent / "socket"))
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
        client.connect(str(node.program.parent / "socket"))

        assert node.call("4")[0] == 4


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
        assert not node.program.parent.exists()


def test_only_the_nodes_user_reaches_the_server(node, home):
    assert node.program.parent.parent == home
    assert node.program.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def becomes(monkeypatch, tmp_path) -> list[list[str]]:
    """What the command becomes, in place of becoming it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(supernode_command, "_BIN", tmp_path)
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
    supernode_command.main(["--insecure", "--port", "9094"])

    assert becomes == [
        [str(tmp_path / "flower-supernode"), "--insecure", "--port", "9094"]
    ]
    assert asked == [tmp_path / "flwr-clientapp"]
    assert os.environ["PATH"] == f"{tmp_path / 'here'}:{before}"
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.05"


BECOMES = """
import sys
from pathlib import Path
from fedllm.commands.supernode import main
from fedllm.commands import supernode as command
from fedllm.deployment import supernode
command._BIN = Path(sys.argv[1])
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
    supernode_command.main(arguments)

    assert len(becomes) == 1


@pytest.mark.parametrize("trouble", ["a long path", "no programs"])
def test_where_fedllms_home_will_not_do_the_temporary_folder_does(
    cold, monkeypatch, tmp_path, home, trouble
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if trouble == "a long path":
        monkeypatch.setenv("FEDLLM_HOME", str(home / ("long" * 30)))
    else:
        monkeypatch.setattr(os, "access", lambda path, _: path.is_relative_to(tmp_path))
    with started(cold) as node:
        assert node.program.parent.parent == tmp_path
    assert [path for path in home.rglob("*") if path.name.startswith("fedllm")] == []


def test_a_node_whose_clients_cannot_be_forked_says_so_and_starts(
    becomes, monkeypatch, tmp_path, capsys
):
    nowhere = tmp_path / ("long" * 30)
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    monkeypatch.setenv("FEDLLM_HOME", str(nowhere))
    before = os.environ["PATH"]
    supernode_command.main([])

    assert len(becomes) == 1
    assert os.environ["PATH"] == before
    said = capsys.readouterr().err
    assert "each client imports its libraries: AF_UNIX path too long" in said
    assert list(nowhere.iterdir()) == []


def test_a_server_that_cannot_be_started_leaves_nothing(cold, home, tmp_path):
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        supernode.start_fork_server(cold, (str(tmp_path / "gone"),))

    assert len(os.listdir("/proc/self/fd")) == open_before
    assert list(home.iterdir()) == []


IMPORTS = """
import sys
import torch
from fedllm import client, errors, fork_server, logs

logs.show_log()
def broken(**asked):
    print(asked)
    raise errors.ModelError("broken here")

real, client.import_libraries = client.import_libraries, broken
print(fork_server._imported())
torch.cuda.is_available = lambda: True
print(fork_server._imported())
client.import_libraries = lambda **asked: None
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
        "flwr_clientapp False",
        "flwr_clientapp",
        "True False",
        "[]",
    ]
    assert done.stdout.count("CUDA cannot be used in a process") == 1
