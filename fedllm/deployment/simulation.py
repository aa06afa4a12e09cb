"""A simulation in processes of its own, which end with it and which nobody else can reach.

`flwr run` starts a daemon on a fixed port that outlives it, and that executes what any user
of the machine posts there. A later `flwr run` joins that daemon and its interpreter. Here
the app runs on Flower's engine without a SuperLink, and Ray is closed to others.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm.deployment.flower_programs import flower_environment, program_path
from fedllm.deployment.process_tree import end_tree
from fedllm.deployment.ray_walls import STARTED_BY_SIMULATE, close_ray, ray_folder
from fedllm.errors import ConfigError
from fedllm.models.known import BUILT_IN_MODEL

# What a client on the built-in model takes at most, with rows as long as ours.
_CLIENT_BYTES = 2 * 2**30
_FLOWER_CPUS = 2
# Seconds between Flower's looks for a run to start.
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Simulation:
    """What to run.

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
    """Run the simulation in a process of its own, and end all that it started.

    Args:
        simulation: What to run.
        home: An empty folder, Flower's home for this run.
        on_line: Called with each line of the run's log; None: the log goes to standard
            output as it is.

    Returns:
        The exit status: 0 if the run completed.

    Raises:
        ConfigError: The app cannot be bundled, or the run config cannot be read.
    """
    with ray_folder() as ray:
        env = _environment(home, ray)
        app = _unpacked(simulation.app, home, env)
        run = home / "run.json"
        run.write_text(json.dumps(_description(simulation, app)), encoding="utf-8")
        # The app's own modules go first; a user's paths stay.
        paths = [str(app), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return _run_process(run, env, on_line)


def _run_process(
    run: Path, env: dict[str, str], on_line: Callable[[str], None] | None
) -> int:
    """Run the simulation's process, end all that it started, and return its status."""
    command = [sys.executable, "-P", "-m", "fedllm.deployment.simulated_run", str(run)]
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=None if on_line is None else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        if on_line is not None:
            assert process.stdout is not None
            for line in process.stdout:
                on_line(line)
        return process.wait()
    finally:
        end_tree(process.pid)
        process.wait()


def _environment(home: Path, ray: str) -> dict[str, str]:
    """Return the variables for a simulation and its Ray."""
    env = flower_environment(_POLL_SECONDS) | {
        "FLWR_HOME": str(home),
        # Ray announces a change of a default that does not concern us.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
        STARTED_BY_SIMULATE: "1",
    }
    # A secret of this run alone.
    env.pop("RAY_AUTH_TOKEN", None)
    close_ray(env, ray)
    return env


def _unpacked(app: Path, home: Path, env: dict[str, str]) -> Path:
    """Return a folder with the files that Flower would ship, as they are now.

    What is edited while the run lasts does not change it.

    Raises:
        ConfigError: Flower cannot bundle the app.
    """
    shown = app_without_environments(app, home / "app")
    command = [program_path("flwr"), "build", "--app", str(shown)]
    built = subprocess.run(
        command, cwd=home, env=env, capture_output=True, text=True, check=False
    )
    bundles = list(home.glob("*.fab"))
    if built.returncode != 0 or len(bundles) != 1:
        words = " ".join((built.stderr or built.stdout).split())
        raise ConfigError(f"{app}: Flower cannot bundle the app: {words}")
    with zipfile.ZipFile(bundles[0]) as bundle:
        bundle.extractall(home / "unpacked")
    return home / "unpacked"


def _description(simulation: Simulation, app: Path) -> dict[str, object]:
    """Return what the simulation's process reads.

    Raises:
        ConfigError: The run config cannot be read, or names a key that the app lacks.
    """
    from click import ClickException
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    try:
        overrides = parse_config_args(list(simulation.run_config))
        run_config = get_fused_config_from_dir(app, overrides)
    except ClickException as error:
        raise ConfigError(f"--run-config: {error.message}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run-config: {error}") from None
    project = tomllib.loads((app / "pyproject.toml").read_text("utf-8"))
    components = project["tool"]["flwr"]["app"]["components"]
    return {
        "serverapp": components["serverapp"],
        "clientapp": components["clientapp"],
        "run_config": run_config,
        "num_clients": simulation.num_clients,
        "client_cpus": simulation.client_cpus
        or fitting_cpus(run_config.get("model.name"), simulation.num_clients),
    }


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


def fitting_cpus(model: object, num_clients: int) -> int:
    """Return how many CPUs a client gets, and so how many train at a time.

    Two clients of a thread each do more than one of two. What a client takes is known of
    the built-in model only; with another one the number is Flower's.

    Args:
        model: The run config's `model.name`; None for an app without this key.
        num_clients: Virtual clients.
    """
    if model != BUILT_IN_MODEL.name:
        return _FLOWER_CPUS
    cores = os.cpu_count() or 1
    room = int(psutil.virtual_memory().available) // _CLIENT_BYTES
    return math.ceil(cores / max(1, min(cores, num_clients, room)))
