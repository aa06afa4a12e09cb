"""Trains what runs deliver to a node, beside its SuperNode, if its owner says so.

`fedllm supernode --personal after-run` starts this process, which looks for deliveries and
runs `fedllm node personal` for each, one after another, at a low priority. A client that
answers messages never waits for it. It ends with the SuperNode, and so does the training that
it is at, which leaves nothing half-made; the next start begins that one anew.
"""

import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

from fedllm.client.delivery import PERSONAL_FOLDER, deliveries
from fedllm.errors import FedllmError
from fedllm.logs import show_log

# As a program this module is called __main__.
logger = logging.getLogger("fedllm.deployment.personal_watch")

PERSONAL_WATCH_COMMAND = (
    *(sys.executable, "-P", "-m"),
    "fedllm.deployment.personal_watch",
)
_TRAIN = (sys.executable, "-P", "-m", "fedllm.commands.main", "node", "personal")
_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_TO_END = 20
_LESS_URGENT = 10
_ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


def main() -> None:
    """Watch until the SuperNode has ended.

    The argument is a pipe that nobody writes to and that closes with the SuperNode.
    """
    show_log()
    # What ends a group of processes is for the SuperNode first, whose end ends this. A
    # handler is not inherited, as ignoring would be: the training can be ended.
    for end in _ENDS:
        signal.signal(end, lambda *_: None)
    os.nice(_LESS_URGENT)
    watch(int(sys.argv[1]))


def watch(
    alive: int,
    command: tuple[str, ...] = _TRAIN,
    seconds: float = _SECONDS_BETWEEN_LOOKS,
) -> None:
    """Train each delivery once, until the pipe closes.

    Args:
        alive: The pipe.
        command: What trains, less the name of the delivery.
        seconds: Between two looks.
    """
    tried: set[str] = set()
    while not _has_ended(alive, seconds):
        for name in _untrained(tried):
            tried.add(name)
            if not _train(alive, (*command, name), seconds):
                return


def _untrained(tried: set[str]) -> Iterator[str]:
    """Yield the names of deliveries without a personal adapter that were not tried yet.

    One whose training failed, for too few rows perhaps, would fail again.
    """
    try:
        found = deliveries()
    except FedllmError as error:
        if "" not in tried:
            tried.add("")
            logger.warning("no personal adapter is trained: %s", error)
        return
    for one in found:
        name = f"{one.run_id}/client-{one.node.partition_id}"
        if name not in tried and not (one.folder / PERSONAL_FOLDER).is_dir():
            yield name


def _train(alive: int, command: tuple[str, ...], seconds: float) -> bool:
    """Run one training to its end; return False if the SuperNode ended first."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        if _has_ended(alive, min(seconds, 1.0)):
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return False
    return True


def _has_ended(alive: int, seconds: float) -> bool:
    """Wait, and return whether the SuperNode has ended meanwhile."""
    ready, _, _ = select.select([alive], [], [], seconds)
    return bool(ready)


if __name__ == "__main__":
    main()
