"""The client's own log file, which never leaves its machine."""

import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from fedllm.config import fedllm_home
from fedllm.errors import ConfigError
from fedllm.strict_modes import make_strict_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientLog:
    """The log of one client in one run: `logs/client-<number>.log`.

    Attributes:
        number: The client's partition id.
        run_id: Flower's id of the run, which begins every entry.
        is_shown: Whether lines also go to standard output. A simulation forwards what
            its actors print to the run's log, which is the server's; under differential
            privacy that would be a release.
    """

    number: int
    run_id: int
    is_shown: bool = False

    def write(self, text: str) -> None:
        """Write a line, and show it if that releases nothing."""
        self._append(text)
        if self.is_shown:
            logger.info(text)

    def write_new_ledger(self, folder: Path) -> None:
        """Write that a budget begins, since one under another home would count on."""
        self.write(
            f"client {self.number}: {folder}: a new ledger begins, with nothing spent; what "
            "this client's rows have spent under another home (FEDLLM_HOME) is not in it"
        )

    def write_failure(self, code: str, error: Exception) -> str:
        """Write the whole error, never shown, and return the log's path."""
        trace = "".join(traceback.format_exception(error))
        return self._append(f"no update (code {code})\n{trace}")

    def _append(self, text: str) -> str:
        """Append an entry and return the log's path."""
        path = fedllm_home() / "logs" / f"client-{self.number}.log"
        try:
            # An error's text may quote a row.
            make_strict_folder(path.parent)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{stamp} run {self.run_id} {text}\n")
        except (OSError, ConfigError) as error:
            # An entry that is not written must not cost the round.
            logger.error("%s: cannot be written: %s", path, error)
        return str(path)
