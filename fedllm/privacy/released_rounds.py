"""The rounds that a run has released, in a file outside of its folder.

A run folder is copied, or put back from a backup. The ledger in it is then behind, and the
rounds after it would be released a second time under the epsilon of one. This file stays
where it is, so it tells a resumed run what another copy of its folder has released.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from fedllm.atomic_files import write_atomic
from fedllm.errors import PrivacyError
from fedllm.foreign_text import printable
from fedllm.strict_modes import make_strict_folder

_NAME = re.compile(r"[\w-][\w.-]{0,199}", re.ASCII)
_OWNER_ONLY = 0o600


class ReleasedRounds:
    """The released rounds of one run, whichever copy of its folder released them.

    Guarantee:
        `add` has a round on disk, file and folder synced, before it returns, and gives no
        round twice, also to two processes at once. Rounds are never removed. Whoever
        puts this file back together with the run folder is not noticed.

    Args:
        home: fedllm's folder.
        run: Name of the run, as in its ledger.

    Raises:
        PrivacyError: The name is no run's.
    """

    def __init__(self, home: Path, run: str) -> None:
        if not _NAME.fullmatch(run):
            raise PrivacyError(f"the ledger names the run {printable(run)!r}: no run's")
        self.path = home / "released" / f"{run}.json"
        self._lock = FileLock(self.path.with_name(f".{run}.lock"))

    def begin(self) -> None:
        """Start the file of a new run.

        Raises:
            PrivacyError: There is one already, or it cannot be written.
        """
        try:
            make_strict_folder(self.path.parent)
            with self._lock:
                if self.path.exists():
                    raise PrivacyError(
                        f"{self.path}: is of an earlier run: start again"
                    )
                self._write([])
        except OSError as error:
            raise self._not_written(error) from None

    def read(self) -> list[int]:
        """Return the rounds, in order.

        Raises:
            PrivacyError: The file is missing or damaged: nothing may be released then.
        """
        try:
            rounds = json.loads(self.path.read_text("utf-8"))["rounds"]
            if rounds != sorted({int(r) for r in rounds}) or min(rounds, default=1) < 1:
                raise ValueError(f"the rounds are {rounds!r}")
        except FileNotFoundError:
            raise PrivacyError(
                f"{self.path} is missing, which says how many rounds of this run were "
                "released: set FEDLLM_HOME to the folder in which the run began, bring "
                "that file from there, or start a new run"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"{self.path}: cannot be read ({printable(error)}): start a new run"
            ) from None
        return list(rounds)

    def add(self, server_round: int, known: Sequence[int]) -> None:
        """Enter a round before it leaves.

        Args:
            server_round: The round.
            known: The other rounds that the run's ledger has.

        Raises:
            PrivacyError: Another copy of the run folder has released a round that the
                ledger lacks, or this round; or the file cannot be read or written.
        """
        try:
            with self._lock:
                rounds = self.read()
                unknown = sorted(set(rounds) - set(known))
                if unknown:
                    raise PrivacyError(
                        f"another copy of this run's folder has released round "
                        f"{', '.join(map(str, unknown))}: nothing is released here; "
                        "stop one of the two, and resume the other, which then counts "
                        "these rounds as spent"
                    )
                self._write(sorted({*rounds, *known, server_round}))
        except OSError as error:
            raise self._not_written(error) from None

    def _write(self, rounds: list[int]) -> None:
        text = json.dumps({"rounds": rounds}) + "\n"
        write_atomic(self.path, text.encode(), _OWNER_ONLY)

    def _not_written(self, error: OSError) -> PrivacyError:
        return PrivacyError(
            f"{self.path}: cannot be written: {error.strerror}; nothing is released"
        )
