"""Whether a run is running, finished, failed or was interrupted.

A run holds a lock on its folder, which the operating system lets go when the process
ends, however that happens. So an interrupted run is told from a running one without
process ids, which are used again. It is not the lock that keeps a second process out of
the folder: to look whether one is held is to hold it for a moment, and a look must never
keep a run from starting.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Literal

from fedllm.atomic_files import write_atomic

STATE_FILE = "state.json"
LOCK_FILE = ".running"

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
        """Say that it came to its end."""
        self._end("finished", None)

    def fail(self, reason: str) -> None:
        """Say what stopped it."""
        self._end("failed", reason)

    def _end(self, state: State, reason: str | None) -> None:
        self._write(state, reason)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _write(self, state: State, reason: str | None) -> None:
        text = json.dumps({"state": state, "reason": reason}, indent=2) + "\n"
        write_atomic(self._folder / STATE_FILE, text.encode())


def read_state(folder: Path, finished: bool) -> tuple[State, str | None]:
    """Return the state of a run, and why it failed.

    Args:
        folder: Its folder; nothing is written there.
        finished: Whether it has a result: what to go by where it kept no state, or was
            killed before it could say that it came to its end.
    """
    ended: State = "finished" if finished else "interrupted"
    try:
        told = json.loads((folder / STATE_FILE).read_text("utf-8"))
        state, reason = told["state"], told["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return ended, None
    if state in ("finished", "failed"):
        return state, None if reason is None else str(reason)
    return ("running" if _held(folder / LOCK_FILE) else ended), None


def _held(lock: Path) -> bool:
    """Tell whether a process holds a lock."""
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
