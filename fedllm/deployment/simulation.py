"""A simulation in a SuperLink of its own, which ends with it.

`flwr run` starts a daemon on a fixed port that outlives it. A later `flwr run` joins that
daemon and its interpreter. Here `flwr run` is typed against a SuperLink on a free port with
a temporary Flower home, and the whole process group is ended at the end.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm.deployment.flower_programs import flower_environment, program_path
from fedllm.deployment.superlink import (
    free_port,
    run_status,
    stop_superlink,
    wait_until_up,
)
from fedllm.errors import ConfigError, FederationError
from fedllm.models.known import BUILT_IN_MODEL

# What a client on the built-in model takes at most, with rows as long as ours.
_CLIENT_BYTES = 2 * 2**30
_FLOWER_CPUS = 2
# Seconds between Flower's looks for a run to start.
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Simulation:
    """What `flwr run` is to run.

    Attributes:
        app: The app's folder.
        num_clients: Virtual clients.
        client_cpus: CPUs of a client; None: as few as memory allows.
        run_config: Values of `--run-config`.
    """

    app: Path
    num_clients: int
    client_cpus: int | None
    run_config: Sequence[str]

    def federation_config(self) -> str:
        """Return the value of `--federation-config`."""
        cpus = self.client_cpus
        if cpus is None:
            cpus = fitting_cpus(self.app, self.num_clients, self.run_config)
        return f"num-supernodes={self.num_clients} client-resources-num-cpus={cpus}"


def find_app(folder: str | None, home: Path) -> Path:
    """Return the folder of the app to run.

    Args:
        folder: What the user names; None: the current folder if an app lies in it, else
            the app of the installed package.
        home: The folder of models and runs, where a wheel's app is unpacked.

    Raises:
        ConfigError: The named folder holds no app.
    """
    path = Path(folder or ".").resolve()
    if _holds_app(path):
        return path
    if folder is not None:
        raise ConfigError(
            f"{path}: holds no Flower app (a pyproject.toml with [tool.flwr.app]): name "
            "fedllm's folder, or none"
        )
    from fedllm.deployment.app_folder import app_folder

    return app_folder(home)


def _holds_app(folder: Path) -> bool:
    """Return whether a folder's pyproject.toml declares a Flower app."""
    project = folder / "pyproject.toml"
    return project.is_file() and b"[tool.flwr.app]" in project.read_bytes()


def simulate(
    simulation: Simulation, home: Path, on_line: Callable[[str], None] | None = None
) -> int:
    """Start a SuperLink, run, and stop the SuperLink.

    Args:
        simulation: What to run.
        home: An empty folder, Flower's home for this run.
        on_line: Called with each line of the run's log; None: the log goes to standard
            output as it is.

    Returns:
        The exit status: 0 if the run completed.

    Raises:
        FederationError: The SuperLink does not start, or does not report the run's end.
    """
    port = free_port()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "private"\n\n[superlink.private]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    env = _environment(home)
    log = home / "superlink.log"
    superlink = _start_superlink(port, env, log)
    try:
        if not wait_until_up(superlink, port):
            sys.stderr.write(log.read_text("utf-8")[-4000:])
            raise FederationError(
                "Flower's SuperLink did not start; its log is above this line"
            )
        status = _flwr_run(simulation, home, env, on_line)
        return status or run_status(env)
    finally:
        stop_superlink(superlink)


def _environment(home: Path) -> dict[str, str]:
    """Return the variables for a SuperLink and its Ray."""
    start_seconds = os.environ.get("RAY_raylet_start_wait_time_s", "120")
    return flower_environment(_POLL_SECONDS) | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Ray announces a change of a default that does not concern us.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_raylet_start_wait_time_s": start_seconds,
    }


def _start_superlink(
    port: int, env: dict[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """Start a SuperLink in a session of its own."""
    command = [program_path("flower-superlink"), "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--control-api-address", f"127.0.0.1:{free_port()}"]
    with log.open("w", encoding="utf-8") as output:
        return subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )


def _flwr_run(
    simulation: Simulation,
    home: Path,
    env: dict[str, str],
    on_line: Callable[[str], None] | None,
) -> int:
    """Type `flwr run`, wait for its end and return its exit status."""
    app = app_without_environments(simulation.app, home / "app")
    command = [program_path("flwr"), "run", str(app), "private", "--stream"]
    command += ["--federation-config", simulation.federation_config()]
    for value in simulation.run_config:
        command += ["--run-config", value]
    if on_line is None:
        return subprocess.run(command, env=env, check=False).returncode
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            on_line(line)
    return run.returncode


def app_without_environments(app: Path, folder: Path) -> Path:
    """Return a copy of the app's folder, of links, without what is no part of the app.

    For each run Flower looks at every file in the folder. The README has a virtual
    environment of 100,000 files put there, which takes ten seconds.
    """

    def left_out(where: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name == ".git" or (Path(where) / name / "pyvenv.cfg").is_file()
        ]

    try:
        shutil.copytree(
            app, folder, symlinks=True, ignore=left_out, copy_function=_link
        )
    except OSError:
        return app
    return folder


def _link(source: str, target: str) -> None:
    """Make a second name for a file, or a copy if it lies on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fitting_cpus(app: Path, num_clients: int, run_config: Sequence[str]) -> int:
    """Return how many CPUs a client gets, and so how many train at a time.

    Two clients of a thread each do more than one of two. What a client takes is known of
    the built-in model only; with another one the number is Flower's.
    """
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    try:
        overrides = parse_config_args(list(run_config))
        model = get_fused_config_from_dir(app, overrides).get("model.name")
    except Exception:  # noqa: BLE001 - flwr run reports what is wrong with it
        return _FLOWER_CPUS
    if model != BUILT_IN_MODEL.name:
        return _FLOWER_CPUS
    cores = os.cpu_count() or 1
    room = int(psutil.virtual_memory().available) // _CLIENT_BYTES
    return math.ceil(cores / max(1, min(cores, num_clients, room)))
