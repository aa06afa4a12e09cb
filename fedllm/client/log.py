"""The client's own log file, which never leaves its machine."""

import logging
import time
import traceback

from flwr.app import Context

from fedllm.client.node_config import partition_of
from fedllm.config import RunConfig, fedllm_home
from fedllm.errors import FedllmError

logger = logging.getLogger(__name__)


def note(context: Context, config: RunConfig, text: str) -> None:
    """Write a line to this client's own log, and show it where that is no release.

    A simulation forwards what its actors print to the run's log, which is the server's.
    """
    _append_log(context, text)
    simulated = "num-partitions" in context.node_config
    if config.privacy.unit == "none" or not simulated:
        logger.info(text)


def log_failure(context: Context, code: str, error: Exception) -> str:
    """Write the whole error to this client's own log and return the log's path."""
    trace = "".join(traceback.format_exception(error))
    return _append_log(context, f"no update (code {code})\n{trace}")


def _append_log(context: Context, text: str) -> str:
    """Append to `logs/client-<partition id>.log` and return its path."""
    try:
        partition_id, _ = partition_of(context)
    except FedllmError:
        partition_id = 0
    path = fedllm_home() / "logs" / f"client-{partition_id}.log"
    try:
        # An error's text may quote a row.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{stamp} run {context.run_id} {text}\n")
    except OSError as error:
        logger.error("%s: cannot be written: %s", path, error.strerror)
    return str(path)
