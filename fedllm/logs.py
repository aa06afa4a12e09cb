"""The package's log on standard output, and errors as one line."""

import logging
import sys
import warnings

from fedllm.errors import FedllmError
from fedllm.foreign_text import printable

_LOGGER = logging.getLogger("fedllm")


def show_log() -> None:
    """Write the package's log to standard output, plainly, once a process.

    Flower mirrors standard output to the user who streams the run.
    """
    # torch warns about its own code, once a process, whatever we call.
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    if not _LOGGER.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Plain())
        _LOGGER.addHandler(handler)
        _LOGGER.setLevel(logging.INFO)
        _LOGGER.propagate = False


def one_line_failure(error: FedllmError) -> None:
    """Log what stopped the run, and keep Flower from adding a traceback to it.

    The error still propagates, so that the run ends as failed.
    """
    for line in str(error).split("\n"):
        _LOGGER.error("%s: %s", type(error).__name__, line)
    logging.getLogger("flwr").addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback of an error that the user can mend."""
    if record.exc_info and isinstance(record.exc_info[1], FedllmError):
        record.exc_info = None
    return True


class _Plain(logging.Formatter):
    """Format a record as one line, with the level before warnings and errors.

    A path or a name in it may come from elsewhere, so all of it is made printable.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage(), limit=None)
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}: {text}"
        return text
