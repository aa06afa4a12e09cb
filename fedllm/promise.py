"""What a run promises before round 1, and what its noise alone would do."""

import logging

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import plain
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.planning import advice, noise_to_signal
from fedllm.public_rows import PublicRows
from fedllm.strategy import ClientLevelDP

logger = logging.getLogger(__name__)

DESTRUCTIVE = 0.1
"""Rise of the loss by noise alone, in nats per token, from which a run warns."""

_FEW_CLIENTS = 10


def say_promise(ledger: Ledger) -> None:
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


def probe_noise(strategy: ClientLevelDP, public: PublicRows, before: float) -> None:
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


def ledger_advice(ledger: Ledger | None) -> list[str]:
    """Say what would help a run that does not beat its base."""
    if ledger is None:
        return ["more rounds or local steps", "another train.learning-rate"]
    settings = ledger.settings
    return advice(
        settings.noise_multiplier,
        settings.num_trainable,
        settings.num_sampled_clients,
        settings.planned_rounds,
    )
