"""What a run was worth: which adapter to use, and the last lines that a person reads."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.privacy.accounting import plain
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.record_report import RecordReport
from fedllm.promise import ledger_advice

logger = logging.getLogger(__name__)


def say_outcome(
    result: Mapping[str, Any], ledger: Ledger | RecordReport | None, folder: Path
) -> None:
    """Say loss before and after, what to use, epsilon, and what to type next.

    Args:
        result: The content of result.json.
        ledger: What was spent, or what clients say of it; None without privacy.
        folder: The run folder.
    """
    before, after = result["test_loss_before"], result["test_loss_after"]
    if before is not None:
        logger.info(
            "test loss: %.3f before, %.3f after (%d public test questions)",
            before,
            after,
            result["test_examples"],
        )
    if result["recommended"] == "base":
        logger.warning(
            "no round beat the base on public validation rows, so use the base. What "
            "helps: %s",
            "; ".join(_advice(ledger)),
        )
    elif result["best_round"]:
        logger.info(
            "the tuned model beats the base: use %s (round %d)",
            result["recommended"],
            result["best_round"],
        )
    else:
        logger.info(
            "there are no public validation rows, so nothing says whether the tuned "
            "model beats the base"
        )
    if ledger is None:
        logger.info("privacy: none: no noise was added, and epsilon is not bounded")
    elif isinstance(ledger, RecordReport):
        logger.info(
            "epsilon: %s for the worst client, %s for the median one, add-or-remove one "
            "record, at delta %g, as the clients report",
            plain(ledger.worst),
            plain(ledger.median),
            ledger.settings.delta,
        )
        logger.info("privacy: %s", ledger.statement)
        logger.info("not covered: %s", "; ".join(ledger.as_dict()["not_covered"]))
    else:
        spent = ledger.epsilons()
        logger.info(
            "epsilon: %s zero-out, %s replace-one, at delta %g",
            plain(spent.zero_out),
            plain(spent.replace_one),
            ledger.settings.delta,
        )
        content = ledger.as_dict()
        logger.info("privacy: %s", content["statement"])
        logger.info("not covered: %s", "; ".join(content["not_covered"]))
    logger.info("run folder: %s", folder)
    logger.info(
        'ask it: %s evaluate.py --question "What are some symptoms of covid-19?" --base',
        _python(),
    )


def _advice(ledger: Ledger | RecordReport | None) -> list[str]:
    """Say what would help a run that does not beat its base."""
    if isinstance(ledger, RecordReport):
        return [
            "more records on each client, or larger batches of them "
            "(train.gradient-accumulation): noise is divided by the size of a batch",
            "fewer steps or rounds, each with less noise for the same epsilon",
            "another train.learning-rate",
        ]
    return ledger_advice(ledger)


def _python() -> str:
    """Return how this environment's Python is called from here."""
    here = os.path.relpath(Path(sys.executable).with_name("python"))
    return here if os.path.exists(here) and not here.startswith("..") else "python"
