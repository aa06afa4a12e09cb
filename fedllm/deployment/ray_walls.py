"""The variables that close Ray, which a simulation runs its clients on.

By its defaults Ray listens on every interface, asks nobody for a secret, unpickles what it
is sent, and keeps its sockets in a folder that every user of the machine may write.
"""

import atexit
import logging
import os
import secrets
import tempfile
from collections.abc import MutableMapping

STARTED_BY_SIMULATE = "FEDLLM_STARTED_BY_SIMULATE"
"""Set for a run that `fedllm simulate` starts, which has no SuperLink."""

logger = logging.getLogger(__name__)

_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_FOLDER = "RAY_TMPDIR"


def close_ray(environ: MutableMapping[str, str], folder: str) -> None:
    """Set the variables of a Ray that only this user's processes can reach and steer.

    They count for what imports Ray afterwards. A worker of Ray inherits them, and keeps
    the secret of its cluster.

    Args:
        environ: The variables to change.
        folder: Where Ray keeps its sockets and logs; nobody else may enter it.
    """
    # Ray binds to the node's address. Off Linux this makes that 127.0.0.1 by default.
    environ[_CLUSTERS] = "0"
    environ[_MODE] = "token"
    environ.setdefault(_TOKEN, secrets.token_hex(32))
    environ[_FOLDER] = folder
    # The clients would run on another cluster, perhaps of another machine.
    environ.pop("RAY_ADDRESS", None)
    environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # If prometheus-client is installed, Ray serves numbers of its own on a fixed port, to every
    # user and, unless its node's address is 127.0.0.1, to the network. This is no port.
    environ["AUTOSCALER_METRIC_PORT"] = "-1"
    # A node may take more than its 30 s to come up on a busy small machine.
    environ.setdefault("RAY_raylet_start_wait_time_s", "120")


def ray_folder() -> "tempfile.TemporaryDirectory[str]":
    """Make a folder for a Ray that nobody else may enter, where Ray's own would be.

    The path of a socket may have 107 letters, and Ray's names take 70 of them, so TMPDIR
    will not always do.
    """
    parent = os.environ.get(_FOLDER, "/tmp")
    return tempfile.TemporaryDirectory(
        prefix="fedllm-ray-", dir=parent, ignore_cleanup_errors=True
    )


def close_this_process_ray() -> None:
    """Close the Ray that this process will start, unless it is closed already."""
    is_local = os.environ.get(_CLUSTERS) == "0"
    has_secret = os.environ.get(_MODE) == "token" and _TOKEN in os.environ
    if is_local and has_secret and _FOLDER in os.environ:
        return
    folder = ray_folder()
    atexit.register(folder.cleanup)
    close_ray(os.environ, folder.name)


def warn_of_superlink(grid: object) -> None:
    """Log what remains open if Flower's daemon runs this simulation.

    Args:
        grid: The ServerApp's; a deployment's is of another class.
    """
    if type(grid).__name__ == "InMemoryGrid" and STARTED_BY_SIMULATE not in os.environ:
        logger.warning(
            "Flower's SuperLink, which runs this simulation and stays after it, executes "
            "what any user of this machine posts to its port: end it when you are done, "
            "or use `fedllm simulate`, which has none"
        )
