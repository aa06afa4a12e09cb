"""A SuperLink of our own: start it, wait for it, stop it."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import psutil

_START_SECONDS = 120.0


def run_status(env: dict[str, str]) -> int:
    """Return 0 if the run completed, else 1: `flwr run --stream` does not tell."""
    command = [program_path("flwr"), "list", "private", "--format", "json"]
    listed = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False
    )
    try:
        runs = json.loads(listed.stdout)["runs"]
        return 0 if all("completed" in str(run["status"]) for run in runs) else 1
    except (ValueError, KeyError, TypeError):
        sys.stderr.write(f"error: cannot tell how the run ended: {listed.stdout}\n")
        return 1


def wait_until_up(superlink: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait for the SuperLink's health answer."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and superlink.poll() is None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def stop_superlink(superlink: "subprocess.Popen[bytes]") -> None:
    """End the SuperLink and all that it started, which is in sessions of its own."""
    try:
        root = psutil.Process(superlink.pid)
        started = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, started = psutil.wait_procs(started, timeout=20)


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program_path(name: str) -> str:
    """Return a program of this environment, activated or not."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"{name}: not installed here: pip install -e .")
    return found
