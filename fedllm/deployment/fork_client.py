"""What a SuperNode's `flwr-clientapp` becomes: it asks the fork server for a client.

It runs without site packages and imports nothing of fedllm, since it starts with every
message. Its arguments are the program that ran it and that program's arguments; a variable
names the fork server's socket. If no fork server answers, it becomes that program again,
without the variable, which then runs the client itself.
"""

import json
import os
import socket
import sys

TAKEN = b"+"
SECONDS_TO_TAKE = 15
INSTALLS = "--allow-runtime-dependency-installation"
FORK_SERVER = "FEDLLM_FORK_SERVER"
"""Variable that holds the fork server's socket, if there is one."""


def main() -> None:
    """Wait for the forked client and exit with its status."""
    program, *argv = sys.argv[1:]
    path = os.environ.pop(FORK_SERVER)
    # Libraries that a run installs must not meet others that are imported already.
    status = None if INSTALLS in argv else _status_of_fork(path, argv)
    if status is None:
        os.execv(program, [program, *argv])
    # A signal's number cannot be an exit status: 128 is added, as shells do.
    sys.exit(128 - status if status < 0 else status)


def _status_of_fork(path: str, argv: list[str]) -> int | None:
    """Return the exit status of the forked client; None if none was forked."""
    taken, status = b"", b""
    try:
        environment = dict(os.environ)
        request = {"argv": argv, "folder": os.getcwd(), "environment": environment}
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(SECONDS_TO_TAKE)
            server.connect(path)
            socket.send_fds(server, [b"\0"], [0, 1, 2])
            server.sendall(json.dumps(request).encode() + b"\n")
            try:
                taken = server.recv(1)
            except TimeoutError:
                # After 30 s Flower gives a message that was not taken to another process.
                # A client that is forked from here on cannot report it, and ends.
                server.shutdown(socket.SHUT_RD)
                taken = server.recv(1)
            server.settimeout(None)
            status = server.recv(16)
    except OSError:
        # The server has ended, before a client was forked or after.
        pass
    if taken != TAKEN:
        return None
    return int(status) if status else 1


if __name__ == "__main__":
    main()
