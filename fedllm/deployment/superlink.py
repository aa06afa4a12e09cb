"""Flower's SuperLink: the command line of a deployment's, and one of our own to stop."""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import psutil

from fedllm.deployment.flower_programs import program_path
from fedllm.errors import ConfigError, FederationError

_START_SECONDS = 120.0
# Each makes the caller responsible for TLS, and --keys needless.
_OWN_TRANSPORT = ("--insecure", "--ssl-certfile")


def superlink_arguments(
    keys: Path | None, port: int, database: str, others: Sequence[str]
) -> list[str]:
    """Return the arguments of `flower-superlink` for a deployment.

    Args:
        keys: The folder that `fedllm keys` made, or the server's three files of it; None
            if the other arguments say how the SuperLink is reached.
        port: Where it listens, on loopback: the gate forwards to it.
        database: Its state, with the clients' updates until each is collected.
        others: Arguments that are handed on. They come last, so that they win.

    Raises:
        ConfigError: The keys are missing.
    """
    arguments = ["--port", str(port), "--database", database]
    if keys is not None:
        arguments += _transport(keys)
    elif not any(word.partition("=")[0] in _OWN_TRANSPORT for word in others):
        raise ConfigError(
            "--keys: is needed: the folder that `fedllm keys` makes (or --insecure, for "
            "a trial on one machine)"
        )
    return [*arguments, *others]


def _transport(keys: Path) -> list[str]:
    """Return the arguments for TLS and for nodes' keys.

    Raises:
        ConfigError: A file is missing.
    """
    files = {
        "--ssl-ca-certfile": keys / "ca.crt",
        "--ssl-certfile": keys / "server.crt",
        "--ssl-keyfile": keys / "server.key",
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"--keys: there is no {', '.join(missing)}: make the folder by `fedllm keys`"
        )
    pairs = [word for flag, path in files.items() for word in (flag, str(path))]
    return [*pairs, "--enable-supernode-auth"]


def run_status(env: dict[str, str]) -> int:
    """Return 0 if the run completed, else 1: `flwr run --stream` does not report it.

    Raises:
        FederationError: The SuperLink does not answer.
    """
    command = [program_path("flwr"), "list", "private", "--format", "json"]
    listed = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False
    )
    try:
        runs = json.loads(listed.stdout)["runs"]
        return 0 if all("completed" in str(run["status"]) for run in runs) else 1
    except (ValueError, KeyError, TypeError):
        raise FederationError(
            f"`flwr list` does not report how the run ended: {listed.stdout.strip()}"
        ) from None


def wait_until_up(superlink: "subprocess.Popen[bytes]", port: int) -> bool:
    """Wait for the SuperLink's health answer; return False if it does not come."""
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
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=20)


def free_port() -> int:
    """Return a port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
