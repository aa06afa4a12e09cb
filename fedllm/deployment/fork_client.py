"""The program that a SuperNode finds as `flwr-clientapp`: ask the fork server for one.

It runs without site packages and imports nothing of fedllm, for it starts with every
message. Arguments are the fork server's socket, Flower's own `flwr-clientapp`, and what
the SuperNode gave that. If no fork server answers, it becomes Flower's program.
"""

import json
import os
import socket
import sys

TAKEN = b"+"
SECONDS_TO_TAKE = 15
INSTALLS = "--allow-runtime-dependency-installation"


def main() -> None:
    """Wait for the forked client and end with its status."""
    path, program, *argv = sys.argv[1:]
    # Libraries that a run brings along must not meet others that are imported already.
    status = None if INSTALLS in argv else _asked(path, argv)
    if status is None:
        os.execv(program, [program, *argv])
    # A signal's number cannot be an exit status: a shell's way of saying it.
    sys.exit(128 - status if status < 0 else status)


def _asked(path: str, argv: list[str]) -> int | None:
    """Return the exit status of the client that was forked; None if none was."""
    taken, said = b"", b""
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
                # Flower gives a message that nobody took to another process after 30 s.
                # A client that is forked from here on cannot say so, and ends.
                server.shutdown(socket.SHUT_RD)
                taken = server.recv(1)
            server.settimeout(None)
            said = server.recv(16)
    except OSError:
        # It has ended, before a client was forked or after.
        pass
    if taken != TAKEN:
        return None
    return int(said) if said else 1


if __name__ == "__main__":
    main()
