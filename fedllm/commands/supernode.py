"""Flower's SuperNode, whose clients need not import their libraries for every message.

    python -m fedllm.commands.supernode --superlink HOST:9192 --node-config 'data-path="..."'

All arguments are `flower-supernode`'s. Beside it a process waits that has imported torch,
transformers, PEFT and TRL, and forks a client for each message; and the SuperNode looks
for work 20 times a second, not once (FLWR_SUPEREXEC_TASK_POLL_INTERVAL sets it). Linux
only: elsewhere, and where the process cannot be had, each client imports them itself.
"""

import os
import sys
from pathlib import Path

from fedllm.deployment import fork_client, supernode

_BIN = Path(sys.executable).parent
_POLL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"


def main(arguments: list[str] | None = None) -> None:
    """Start the fork server, and become `flower-supernode`."""
    given = sys.argv[1:] if arguments is None else arguments
    if sys.platform == "linux" and _forks(given):
        try:
            folder, *_ = supernode.start_fork_server(
                _BIN / supernode.CLIENTAPP, supernode.FORK_SERVER_COMMAND
            )
        except OSError as error:
            print(f"each client imports its libraries: {error}", file=sys.stderr)
        else:
            path = os.environ.get("PATH", os.defpath)
            os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
    os.environ.setdefault(_POLL, "0.05")
    program = str(_BIN / "flower-supernode")
    os.execv(program, [program, *given])


def _forks(given: list[str]) -> bool:
    """Tell whether a SuperNode with these arguments starts clients that can be forked."""
    says = {"-h", "--help", "-V", "--version"}
    starts_none = {"--isolation=process", "process"}
    return not (says | starts_none | {fork_client.INSTALLS}) & {*given}


if __name__ == "__main__":
    main()
