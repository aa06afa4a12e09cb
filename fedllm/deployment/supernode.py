"""The fork server of a SuperNode: whether it is of use, and how it is started."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedllm.config import fedllm_home
from fedllm.deployment import fork_client

CLIENTAPP = "flwr-clientapp"
FORK_SERVER_COMMAND = (sys.executable, "-P", "-m", "fedllm.deployment.fork_server")

_NO_CLIENT_TO_FORK = {"--isolation=process", "process", fork_client.INSTALLS}

APPROVE = "FEDLLM_NODE_APPROVE"
"""Variable that holds which runs are answered, one of `fedllm.node.approvals.POLICIES`."""
CHOICE = "FEDLLM_NODE_APP"
"""Variable that holds the owner's choice: installed, any, or a SHA-256."""
SUPERLINK = "FEDLLM_NODE_SUPERLINK"
"""Variable that holds who asks, for the log."""
PYTHON = "FEDLLM_PYTHON"
"""Variable that holds the interpreter of the programs in PROGRAMS."""

PROGRAMS = Path(__file__).parent / "programs"
"""Stand first on a SuperNode's PATH: a guarded client, and refusals of all else."""


def can_fork(arguments: Sequence[str]) -> bool:
    """Return whether a SuperNode starts clients that can be forked.

    Args:
        arguments: Of `flower-supernode`.
    """
    return sys.platform == "linux" and not _NO_CLIENT_TO_FORK & {*arguments}


def start_fork_server(
    clientapp: Path, server: tuple[str, ...]
) -> tuple[Path, "subprocess.Popen[bytes]", int]:
    """Start a process that forks clients for as long as this one lives.

    Args:
        clientapp: Flower's own `flwr-clientapp`, which runs if no client can be forked.
        server: The command of `fedllm.deployment.fork_server`, less its arguments.

    Returns:
        The folder of a program `flwr-clientapp`, for PATH, which the server removes when
        it ends; the server; and a descriptor: the server ends when it is closed. A program
        that this process becomes inherits the descriptor, and a child does not.

    Raises:
        OSError: No folder will do for the program and the socket.
    """
    folder, listening = _make_program_and_socket(clientapp)
    ended, alive = os.pipe()
    os.set_inheritable(alive, True)
    with listening:
        descriptors = (listening.fileno(), ended)
        try:
            process = subprocess.Popen(
                [*server, str(folder), *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        except OSError:
            os.close(alive)
            shutil.rmtree(folder)
            raise
        finally:
            os.close(ended)
    return folder, process, alive


def _make_program_and_socket(clientapp: Path) -> tuple[Path, socket.socket]:
    """Return the folder of the program, and a socket in it that listens already.

    Raises:
        OSError: Neither folder will do.
    """
    # The program goes first on a PATH, so it lies where nobody else can write, if possible.
    try:
        return _make_in(fedllm_home(), clientapp)
    except OSError:
        return _make_in(Path(tempfile.gettempdir()), clientapp)


def _make_in(parent: Path, clientapp: Path) -> tuple[Path, socket.socket]:
    """Make the program's folder in this one.

    Raises:
        OSError: Its path is too long for a socket, or programs cannot be run there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fedllm-supernode-", dir=parent))
    path, program = folder / "socket", folder / CLIENTAPP
    words = [
        sys.executable,
        "-I",
        "-S",
        fork_client.__file__,
        str(path),
        str(clientapp),
    ]
    listening = socket.socket(socket.AF_UNIX)
    try:
        text = f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n'
        program.write_text(text, encoding="utf-8")
        program.chmod(0o700)
        if not os.access(program, os.X_OK):
            raise PermissionError("programs cannot be run there")
        # Before the SuperNode starts: no message finds it missing.
        listening.bind(str(path))
        listening.listen()
    except OSError as error:
        listening.close()
        shutil.rmtree(folder)
        raise OSError(f"{error} ({folder})") from error
    return folder, listening
