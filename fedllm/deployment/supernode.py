"""What stands beside a SuperNode: the fork server, if it is of use, and other helpers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedllm.config import fedllm_home
from fedllm.deployment import fork_client

FORK_SERVER_COMMAND = (sys.executable, "-P", "-m", "fedllm.deployment.fork_server")

_NO_CLIENT_TO_FORK = {"--isolation=process", "process", fork_client.INSTALLS}

APPROVE = "FEDLLM_NODE_APPROVE"
"""Variable that holds which runs are answered, one of `fedllm.node.approvals.POLICIES`."""
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
    server: tuple[str, ...],
) -> tuple[Path, "subprocess.Popen[bytes]", int]:
    """Start a process that forks clients for as long as this one lives.

    Args:
        server: The command of `fedllm.deployment.fork_server`, less its arguments.

    Returns:
        Its socket, whose folder the server removes when it ends; the server; and a
        descriptor: the server ends when it is closed. A program that this process becomes
        inherits the descriptor, and a child does not.

    Raises:
        OSError: No folder will do for the socket.
    """
    path, listening = _make_socket()
    ended, alive = os.pipe()
    os.set_inheritable(alive, True)
    with listening:
        descriptors = (listening.fileno(), ended)
        try:
            process = subprocess.Popen(
                [*server, str(path.parent), *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
            )
        except OSError:
            os.close(alive)
            shutil.rmtree(path.parent)
            raise
        finally:
            os.close(ended)
    return path, process, alive


def start_helper(command: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    """Start a process that ends with this one, or with the program that this becomes.

    Args:
        command: Gets the number of a pipe as its last argument, which closes then.
    """
    ended, alive = os.pipe()
    os.set_inheritable(alive, True)
    try:
        return subprocess.Popen(
            [*command, str(ended)], pass_fds=[ended], stdin=subprocess.DEVNULL
        )
    except OSError:
        os.close(alive)
        raise
    finally:
        os.close(ended)


def _make_socket() -> tuple[Path, socket.socket]:
    """Return the path of a socket that listens already, and the socket.

    Raises:
        OSError: Neither folder will do.
    """
    # Where nobody else can write, if possible: who listens there gets every client's token.
    try:
        return _make_socket_in(fedllm_home())
    except OSError:
        return _make_socket_in(Path(tempfile.gettempdir()))


def _make_socket_in(parent: Path) -> tuple[Path, socket.socket]:
    """Make a folder in this one that only this user may enter, and a socket in that.

    Raises:
        OSError: Its path is too long for a socket.
    """
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="fedllm-supernode-", dir=parent)) / "socket"
    listening = socket.socket(socket.AF_UNIX)
    try:
        # Before the SuperNode starts: no message finds it missing.
        listening.bind(str(path))
        listening.listen()
    except OSError as error:
        listening.close()
        shutil.rmtree(path.parent)
        raise OSError(f"{error} ({path.parent})") from error
    return path, listening
