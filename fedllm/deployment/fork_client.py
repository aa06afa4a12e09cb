"""The program that a SuperNode finds as `flwr-clientapp`: it asks the fork server for one.

It runs without site packages and imports nothing of fedllm, since it starts with every
message. Its arguments are the fork server's socket, Flower's own `flwr-clientapp`, and the
arguments that the SuperNode gives that. If no fork server answers, it becomes Flower's
program.
"""

import json
import os
import socket
import sys

TAKEN = b"+"
SECONDS_TO_TAKE = 15
INSTALLS = "--allow-runtime-dependency-installation"


def main() -> None:
    """Wait for the forked client and exit with its status."""
    path, program, *argv = sys.argv[1:]
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
