"""What the noise of a run does to the model by itself, measured before round 1."""

import logging
from collections.abc import Sequence
from typing import Any

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.strategy.server_noise import ServerNoise

logger = logging.getLogger(__name__)

DESTRUCTIVE = 0.1
"""Rise of the loss by noise alone, in nats per token, above which noise is destructive."""


def require_harmless_noise(
    config: RunConfig,
    strategy: ServerNoise[Any],
    public: PublicRows,
    before: float,
    advice: Sequence[str],
) -> None:
    """Measure what noise alone does to the loss, and warn or raise if it is destructive.

    Args:
        config: The run config; `privacy.noise-probe=false` measures nothing.
        strategy: Makes the noise of all rounds, through the real server update.
        public: Scores it on public validation rows.
        before: Loss of the untuned model on the same rows, nats per token.
        advice: What helps against the noise, best first.

    Raises:
        PrivacyError: Noise is destructive and `privacy.on-destructive-noise` is
            `refuse`.
    """
    if not config.privacy.noise_probe:
        return
    after = public.validation_loss(strategy.noise_alone())
    if after is None:
        return
    strategy.ledger.note_probe({"before": before, "noise_alone": after})
    rise = after - before
    logger.info(
        "noise alone moves the validation loss from %.3f to %.3f: %s",
        before,
        after,
        "harmless" if rise <= DESTRUCTIVE else "destructive",
    )
    if rise <= DESTRUCTIVE:
        return
    if config.privacy.on_destructive_noise == "refuse":
        raise PrivacyError(
            f"privacy.on-destructive-noise: noise alone raises the validation loss by "
            f"{rise:.2f}, {_too_much(config, strategy)}; "
            "privacy.on-destructive-noise='warn' trains all the same"
        )
    logger.warning("noise alone is destructive. What helps: %s", "; ".join(advice))


def _too_much(config: RunConfig, strategy: ServerNoise[Any]) -> str:
    """Return for whom the noise is too much, and what to choose instead."""
    if config.is_joint:
        return (
            f"too much for batches of {config.train.expected_batch_size} records, so the run "
            "stops before round 1: choose larger batches (train.gradient-accumulation), or a "
            "smaller strategy.server-learning-rate"
        )
    clients = strategy.ledger.settings.population_size
    return (
        f"too much for {clients} clients, so the run stops before round "
        "1: choose privacy.unit='record', which protects single rows and not whole "
        "clients (--run-config configs/record-level.toml), or more clients: fedllm "
        "simulate --num-supernodes 20"
    )
