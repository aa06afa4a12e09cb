"""The log lines before round 1 and after the last one."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.server.account import PrivacyAccount

logger = logging.getLogger(__name__)


def log_plan(account: PrivacyAccount) -> None:
    """Log what the planned rounds will spend."""
    for level, text in account.plan():
        logger.log(level, "%s", text)


def log_outcome(
    result: Mapping[str, Any], account: PrivacyAccount, folder: Path
) -> None:
    """Log the loss before and after, what to use, epsilon, and what to type next.

    Args:
        result: The content of result.json.
        account: What was spent.
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
            "; ".join(account.advice()),
        )
    elif result["best_round"] is not None:
        logger.info(
            "the tuned model beats the base: use %s (round %d)",
            result["recommended"],
            result["best_round"],
        )
    else:
        logger.info(
            "there are no public validation rows, so nothing shows whether the tuned "
            "model beats the base"
        )
    for text in account.outcome():
        logger.info("%s", text)
    logger.info("run folder: %s", folder)
    logger.info(
        'ask it: %s evaluate --question "What are some symptoms of covid-19?" --base',
        command(),
    )


def command() -> str:
    """Return how `fedllm` of this environment is typed, from the working folder.

    Never its bare name: the programs of an environment that is not activated are on the
    PATH of a simulation's processes, and not on the user's.
    """
    program = Path(sys.executable).with_name("fedllm")
    here = os.path.relpath(program)
    return str(program) if here.startswith("..") else here
