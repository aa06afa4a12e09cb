"""The log lines before round 1 and after the last one."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.data.overlap import judged_by_embedded
from fedllm.server.account import PrivacyAccount
from fedllm.server.local_grid import is_simulation

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
    if result.get("test_pairs_preferred") is not None:
        logger.info(
            "test pairs: the chosen answer is the likelier one in %.1f %% before and %.1f %% "
            "after; %.1f %% are preferred as chosen after (higher implicit reward)",
            100 * result["test_pairs_likelier_before"],
            100 * result["test_pairs_likelier_after"],
            100 * result["test_pairs_preferred"],
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


def log_judges(config: RunConfig, grid: Grid) -> None:
    """Warn if the package's own public rows judged a run whose clients may have others.

    Args:
        config: The run config.
        grid: Flower's way to the clients. Those of a simulation have no file of their own.
    """
    if judged_by_embedded(config.data) and not is_simulation(grid):
        logger.warning(
            "public rows of %s, which come with fedllm, judged this run: if clients trained on "
            "rows of their own (data-path), losses and recommendation say nothing of those. "
            "data.name='own' judges by no rows, data.public-validation and data.public-test "
            "by yours",
            config.data.name,
        )


def command() -> str:
    """Return how `fedllm` of this environment is typed, from the working folder.

    Never its bare name: the programs of an environment that is not activated are on the
    PATH of a simulation's processes, and not on the user's.
    """
    program = Path(sys.executable).with_name("fedllm")
    here = os.path.relpath(program)
    return str(program) if here.startswith("..") else here
