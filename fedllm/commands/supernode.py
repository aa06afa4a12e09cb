"""Flower's SuperNode, whose clients need not import their libraries for every message.

    python -m fedllm.commands.supernode --superlink HOST:9192 --node-config 'data-path="..."'

All arguments are `flower-supernode`'s. Beside it a process waits that has imported torch,
transformers, PEFT and TRL, and forks a client for each message; and the SuperNode looks
for work 20 times a second, not once (FLWR_SUPEREXEC_TASK_POLL_INTERVAL sets it). Linux
only: elsewhere, and where the process cannot be had, each client imports them itself.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from fedllm import fork_client
from fedllm.config import fedllm_home

_BIN = Path(sys.executable).parent
_CLIENTAPP = "flwr-clientapp"
_SERVER = (sys.executable, "-P", "-m", "fedllm.fork_server")
_POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


def main(arguments: list[str] | None = None) -> None:
    """Start the fork server, and become `flower-supernode`."""
    given = sys.argv[1:] if arguments is None else arguments
    if sys.platform == "linux" and _forks(given):
        try:
            folder, *_ = start_fork_server(_BIN / _CLIENTAPP, _SERVER)
        except OSError as error:
            print(f"each client imports its libraries: {error}", file=sys.stderr)
        else:
            path = os.environ.get("PATH", os.defpath)
            os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
    os.environ.setdefault(_POLL, "0.05")
    program = str(_BIN / "flower-supernode")
    os.execv(program, [program, *given])


def _forks(given: list[str]) -> bool:
    """Tell whether a SuperNode with these arguments starts clients that can be forked."""
    says = {"-h", "--help", "-V", "--version"}
    starts_none = {"--isolation=process", "process"}
    return not (says | starts_none | {fork_client.INSTALLS}) & {*given}


def start_fork_server(
    clientapp: Path, server: tuple[str, ...]
) -> tuple[Path, "subprocess.Popen[bytes]", int]:
    """Start a process that forks clients for as long as this one lives.

    Args:
        clientapp: Flower's own `flwr-clientapp`, for when there is nobody to fork.
        server: The command of `fedllm.fork_server`, less its arguments.

    Returns:
        The folder of a program `flwr-clientapp`, for PATH, which goes with the server;
        the server; and a descriptor whose end ends it, which a program that this process
        becomes inherits and a child does not.

    Raises:
        OSError: There is no folder for it.
    """
    folder, listening = _program_and_socket(clientapp)
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


def _program_and_socket(clientapp: Path) -> tuple[Path, socket.socket]:
    """Return the folder of the program, and a socket there that listens already.

    Raises:
        OSError: It can be had in neither place.
    """
    # It goes first on a PATH, so where nobody else can write, if that can be had.
    try:
        return _made_in(fedllm_home(), clientapp)
    except OSError:
        return _made_in(Path(tempfile.gettempdir()), clientapp)


def _made_in(parent: Path, clientapp: Path) -> tuple[Path, socket.socket]:
    """Make the folder in this one.

    Raises:
        OSError: Its path is too long for a socket, or programs cannot be run there.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fedllm-supernode-", dir=parent))
    path, program = folder / "socket", folder / _CLIENTAPP
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


if __name__ == "__main__":
    main()
