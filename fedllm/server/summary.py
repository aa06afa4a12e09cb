"""The log lines before round 1 and after the last one."""

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.planning.advice import ledger_advice
from fedllm.privacy.accounting import noise_to_signal
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.record_claims import RecordClaims, RecordSettings
from fedllm.privacy.wording import plain

logger = logging.getLogger(__name__)


def log_outcome(
    result: Mapping[str, Any], ledger: Ledger | RecordClaims | None, folder: Path
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
    elif isinstance(ledger, RecordClaims):
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


def _advice(ledger: Ledger | RecordClaims | None) -> list[str]:
    """Say what would help a run that does not beat its base."""
    if isinstance(ledger, RecordClaims):
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


_FEW_CLIENTS = 10


def log_privacy_plan(ledger: Ledger) -> None:
    """Say epsilon under both relations, the noise, and R."""
    settings = ledger.settings
    planned = ledger.epsilon_after(settings.planned_rounds)
    ratio = noise_to_signal(
        settings.noise_multiplier,
        settings.num_trainable,
        settings.num_sampled_clients,
    )
    logger.info(
        "privacy: %d rounds will spend epsilon %s zero-out (%s replace-one) at delta "
        "%g; noise multiplier %.4g, clipping norm %g",
        settings.planned_rounds,
        plain(planned.zero_out),
        plain(planned.replace_one),
        settings.delta,
        settings.noise_multiplier,
        settings.clipping_norm,
    )
    logger.info(
        "noise to signal R = %.3g (%d trained values, %g clients a round)",
        ratio,
        settings.num_trainable,
        settings.num_sampled_clients,
    )
    if planned.zero_out > 50:
        logger.warning(
            "epsilon %s is no protection to speak of: this run is not private",
            plain(planned.zero_out),
        )
    if settings.population_size < _FEW_CLIENTS:
        logger.warning(
            "with %d clients the noise of each round is divided by %g only, which is "
            'heavy; --federation-config "num-supernodes=20" makes a simulation of 20',
            settings.population_size,
            settings.num_sampled_clients,
        )


def log_record_plan(settings: RecordSettings) -> None:
    """Say what a record may lose in the planned rounds, and who sees to it."""
    if settings.target_epsilon > 0:
        logger.info(
            "privacy: each client calibrates its own noise, so that %d rounds spend at "
            "most epsilon %s on any of its records (add-or-remove one record) at delta "
            "%g; largest gradient norm %g",
            settings.planned_rounds,
            plain(settings.target_epsilon),
            settings.delta,
            settings.max_grad_norm,
        )
    else:
        logger.info(
            "privacy: noise multiplier %.4g on each client; what it spends on a record "
            "depends on how many it has, and each client reports it; largest gradient "
            "norm %g",
            settings.noise_multiplier,
            settings.max_grad_norm,
        )
    if settings.max_epsilon > 0:
        logger.info(
            "a client stops before a record has spent epsilon %s in all runs together",
            plain(settings.max_epsilon),
        )
    if settings.target_epsilon > 50:
        logger.warning(
            "epsilon %s is no protection to speak of: this run is not private",
            plain(settings.target_epsilon),
        )
