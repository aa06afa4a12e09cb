"""How often a client refuses in one run before it gives one answer to everything.

A request that ends without a release costs no epsilon, and the server chooses it: a limit of
time or memory, for instance, tells whether a row is longer than it. So only a few such
answers leave.
"""

import os
from pathlib import Path

from filelock import FileLock

from fedllm.errors import BudgetError, PrivacyError
from fedllm.strict_modes import make_strict_folder

MOST = 3
"""Requests of one run that may end without a release."""


class Refusals:
    """The requests of one run that ended without a release, counted on disk.

    Guarantee:
        A request is counted, and synced, before it is looked at, and taken back only when
        its release is paid for: one that killed the process stays counted.

    Args:
        folder: Where the client keeps its counts.
        run_id: Flower's id of the run.
        client: The client's partition id.
    """

    def __init__(self, folder: Path, run_id: int, client: int) -> None:
        self._path = folder / f"{run_id}-{client}"

    def begin(self) -> None:
        """Count a request.

        Raises:
            BudgetError: As many as may be were refused; this one gets no other answer.
            PrivacyError: The count cannot be written; then nothing may leave.
        """
        if self._change(1) > MOST:
            raise BudgetError(
                f"{MOST} requests of this run ended without an update, and each may tell "
                "something of the rows without noise: this client takes no further part in "
                f"it; to try again, delete {self._path}"
            )

    def release(self) -> None:
        """Take the last request back: it was paid for.

        Raises:
            PrivacyError: The count cannot be written.
        """
        self._change(-1)

    def _change(self, step: int) -> int:
        """Change the count, at most to one above the limit, and return it."""
        try:
            make_strict_folder(self._path.parent)
            with (
                FileLock(f"{self._path}.lock", mode=0o600),
                self._path.open("ab") as file,
            ):
                count = min(max(os.fstat(file.fileno()).st_size + step, 0), MOST + 1)
                # The count is the file's length: nothing in it can be malformed.
                os.ftruncate(file.fileno(), count)
                os.fsync(file.fileno())
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: cannot be written: {error.strerror}; nothing is released"
            ) from None
        return count
