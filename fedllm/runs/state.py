"""The state of a run: running, finished, failed or interrupted.

A run holds a lock on its folder, which the operating system releases when the process ends,
however that happens. So an interrupted run is distinguished from a running one without process
ids, which are reused. Another lock keeps a second run out of the folder: to test this one is to
hold it for a moment, and a test must never keep a run from starting.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Literal

from fedllm.atomic_files import write_atomic
from fedllm.foreign_text import printable

STATE_FILE = "state.json"
LOCK_FILE = ".running"

_MOST_OF_A_REASON = 1000

State = Literal["running", "finished", "failed", "interrupted"]


class RunState:
    """The state of a run in this process.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: int | None = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write("running", None)

    def finish(self) -> None:
        """Record that the run has finished."""
        self._end("finished", None)

    def fail(self, reason: str) -> None:
        """Record what stopped the run."""
        self._end("failed", printable(reason, _MOST_OF_A_REASON))

    def _end(self, state: State, reason: str | None) -> None:
        self._write(state, reason)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, state: State, reason: str | None) -> None:
        text = json.dumps({"state": state, "reason": reason}, indent=2) + "\n"
        write_atomic(self._folder / STATE_FILE, text.encode())


def read_state(folder: Path, finished: bool) -> tuple[State, str | None]:
    """Return the state of a run, and the reason of a failure.

    Args:
        folder: Its folder; nothing is written there.
        finished: Whether it has a result. This decides if it recorded no state, or was killed
            before it could record its end.
    """
    ended: State = "finished" if finished else "interrupted"
    try:
        content = json.loads((folder / STATE_FILE).read_text("utf-8"))
        state, reason = content["state"], content["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return ended, None
    if state in ("finished", "failed"):
        return state, None if reason is None else printable(reason, _MOST_OF_A_REASON)
    return ("running" if _held(folder / LOCK_FILE) else ended), None


def _held(lock: Path) -> bool:
    """Return whether a process holds a lock."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
