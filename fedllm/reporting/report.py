"""Write the page and the model card of a run from the files of its folder."""

import logging
from pathlib import Path

from fedllm.atomic_files import write_atomic
from fedllm.reporting.card import card
from fedllm.reporting.page import page
from fedllm.runs.record import read_run

logger = logging.getLogger(__name__)


def write_report(folder: Path) -> None:
    """Write report.html, self-contained, and README.md, the model card.

    An error is logged in one line: a run does not end because its page cannot be drawn.

    Args:
        folder: A run folder.
    """
    try:
        run = read_run(folder)
        write_atomic(folder / "report.html", page(run).encode())
        if run.result is not None:
            write_atomic(folder / "README.md", card(run).encode())
    except Exception as error:  # noqa: BLE001 - a page ends no run
        logger.warning(
            "report.html of this run cannot be written: %s: %s",
            type(error).__name__,
            " ".join(str(error).split())[:200],
        )
