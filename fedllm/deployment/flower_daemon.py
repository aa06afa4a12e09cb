"""The SuperLink daemon that a bare `flwr run` leaves behind."""

import os
from pathlib import Path

FLOWER_PORT = 39091
"""Where the daemon of `flwr run` listens."""


def listener_on(port: int) -> int | None:
    """Return the process that listens on a port of this machine; None if not visible."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).is_file():
            continue
        for line in Path(table).read_text("utf-8").splitlines()[1:]:
            fields = line.split()
            listens = fields[3] == "0A"
            if listens and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:
            continue
        if links & sockets:
            return int(folder.name)
    return None


def interpreter_of(process: int) -> str:
    """Return the interpreter of a process, as it was typed."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return line[0].decode(errors="replace")
    except OSError:
        return "an unknown interpreter"


def variables_of(process: int) -> dict[str, str]:
    """Return the variables of a process that change a run."""
    names = (
        "FEDLLM_HOME",
        "FLWR_HOME",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
    )
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries)
    return {key: value for key, _, value in pairs if key in names}
