"""Flower's programs of this environment, and the variables they are started with."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fedllm.config import fedllm_home
from fedllm.errors import ConfigError
from fedllm.strict_modes import make_strict_folder

POLL_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


def flower_environment(
    poll_seconds: float, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the variables for a program of Flower; whatever is exported wins.

    Args:
        poll_seconds: How often it looks for work that waits; Flower's own is 1.0.
        environ: The variables of this process, if not os.environ.
    """
    given = dict(os.environ if environ is None else environ)
    defaults = {
        # This environment has every package. Flower would have uv install them anew for
        # each run, with the CUDA build of torch.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        POLL_INTERVAL: str(poll_seconds),
    }
    # Flower starts programs by name: those of this environment, activated or not.
    path = f"{environment_bin()}{os.pathsep}{given.get('PATH', os.defpath)}"
    return defaults | given | {"PATH": path}


def make_home(folder: str | None) -> Path:
    """Return the folder of models and runs, made if need be, and export it.

    Args:
        folder: What `--home` names; None: FEDLLM_HOME, else ~/.fedllm.

    Raises:
        ConfigError: It cannot be made, or another user may write it.
    """
    if folder is not None:
        os.environ["FEDLLM_HOME"] = folder
    home = fedllm_home()
    try:
        make_strict_folder(home)
    except OSError as error:
        raise ConfigError(
            f"--home: {home}: cannot be made: {error.strerror}: name another folder"
        ) from None
    os.environ["FEDLLM_HOME"] = str(home)
    return home


def become(program: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a program of Flower, in the same environment.

    Raises:
        ConfigError: It is not installed.
    """
    path = program_path(program)
    os.execv(path, [path, *arguments])


def environment_bin() -> Path:
    """Return the folder of this environment's programs."""
    return Path(sys.executable).parent


def program_path(name: str) -> str:
    """Return a program of this environment, activated or not.

    Raises:
        ConfigError: It is not installed.
    """
    beside = environment_bin() / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise ConfigError(f"{name}: is not installed here: pip install fedllm")
    return path
