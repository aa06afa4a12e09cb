"""What a run promises before round 1, and what its noise alone would do."""

import logging

from fedllm.errors import PrivacyError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.advice import ledger_advice
from fedllm.strategy.client_level_dp import ClientLevelDP

logger = logging.getLogger(__name__)

DESTRUCTIVE = 0.1
"""Rise of the loss by noise alone, in nats per token, from which a run warns."""


def measure_noise_alone(
    strategy: ClientLevelDP, public: PublicRows, before: float
) -> None:
    """Measure what noise alone does to the loss, and warn or refuse.

    Args:
        strategy: Makes the noise of all rounds, through the real server update.
        public: Scores it on public validation rows.
        before: Loss of the untuned model on the same rows.

    Raises:
        PrivacyError: It does harm and `privacy.on-destructive-noise` is `refuse`.
    """
    after = public.validation_loss(strategy.noise_alone())
    if after is None:
        return
    strategy.ledger.note_probe({"before": before, "noise_alone": after})
    harm = after - before
    logger.info(
        "noise alone moves the validation loss from %.3f to %.3f: %s",
        before,
        after,
        "harmless" if harm <= DESTRUCTIVE else "destructive",
    )
    if harm <= DESTRUCTIVE:
        return
    helps = "; ".join(ledger_advice(strategy.ledger))
    config = strategy.strategy.config
    if config.privacy.on_destructive_noise == "refuse":
        raise PrivacyError(
            f"noise alone raises the validation loss by {harm:.2f}, and "
            f"privacy.on-destructive-noise is 'refuse'. What helps: {helps}"
        )
    logger.warning("noise alone does harm. What helps: %s", helps)
