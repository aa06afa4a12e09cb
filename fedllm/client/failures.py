"""What leaves of a client's error: a code of a closed list, its text only without privacy."""

from flwr.app import Context, RecordDict

from fedllm.client.log import ClientLog
from fedllm.client.node_config import log_number
from fedllm.errors import (
    BudgetError,
    ConfigError,
    DataError,
    FedllmError,
    TimeLimitError,
)
from fedllm.wire.messages import error_content

CODES: tuple[tuple[type[Exception], str], ...] = (
    (BudgetError, "budget-spent"),
    (ConfigError, "bad-config"),
    (DataError, "no-data"),
    (TimeLimitError, "time-limit"),
    (MemoryError, "out-of-memory"),
)
"""Kinds of error and their codes; any other is `failed`."""


def failure(error: Exception, context: Context, private: bool) -> RecordDict:
    """Log an error and return its code, with its text only without privacy."""
    code = code_of(error)
    log = ClientLog(log_number(context.node_config), context.run_id)
    path = log.write_failure(code, error)
    if private:
        return error_content(code, None)
    text = str(error) if isinstance(error, FedllmError) else repr(error)
    # A lone surrogate, as in a file name, could not be sent.
    sent = f"{text} (log: {path})".encode("utf-8", "backslashreplace").decode()
    return error_content(code, sent)


def code_of(error: Exception) -> str:
    """Map an error to the closed list of codes."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return code
    # An accelerator raises torch's own error; on a CPU torch raises a RuntimeError.
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if type(error).__name__ == "OutOfMemoryError" or is_cpu:
        return "out-of-memory"
    return "failed"
