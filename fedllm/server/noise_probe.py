"""What the noise of a run does to the model by itself, measured before round 1."""

import logging

from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.advice import ledger_advice
from fedllm.strategy.client_level_dp import ClientLevelDP

logger = logging.getLogger(__name__)

DESTRUCTIVE = 0.1
"""Rise of the loss by noise alone, in nats per token, above which noise is destructive."""


def require_harmless_noise(
    config: RunConfig, strategy: ClientLevelDP, public: PublicRows, before: float
) -> None:
    """Measure what noise alone does to the loss, and warn or raise if it is destructive.

    Args:
        config: The run config; `privacy.noise-probe=false` measures nothing.
        strategy: Makes the noise of all rounds, through the real server update.
        public: Scores it on public validation rows.
        before: Loss of the untuned model on the same rows, nats per token.

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
        clients = strategy.ledger.settings.population_size
        raise PrivacyError(
            f"privacy.on-destructive-noise: noise alone raises the validation loss by "
            f"{rise:.2f}, too much for {clients} clients, so the run stops before round "
            "1: choose privacy.unit='record', which protects single rows and not whole "
            "clients (--run-config configs/record-level.toml), or more clients: fedllm "
            "simulate --num-supernodes 20; "
            "privacy.on-destructive-noise='warn' trains all the same"
        )
    advice = "; ".join(ledger_advice(strategy.ledger))
    logger.warning("noise alone is destructive. What helps: %s", advice)
