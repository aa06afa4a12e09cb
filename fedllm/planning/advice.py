"""Advice for a run whose noise is too large."""

import math

from fedllm.privacy.accounting import noise_to_signal
from fedllm.privacy.ledger import Ledger


def advice(
    noise_multiplier: float,
    num_trainable: int,
    num_sampled_clients: float,
    num_rounds: int,
) -> list[str]:
    """Return remedies against the noise, best first, with numbers.

    Args:
        noise_multiplier: z, of all noise in a released sum.
        num_trainable: d.
        num_sampled_clients: n.
        num_rounds: Rounds that z was calibrated for.
    """
    ratio = noise_to_signal(noise_multiplier, num_trainable, num_sampled_clients)
    out = []
    if ratio > 3:
        needed = math.ceil(ratio * num_sampled_clients / 3)
        out.append(f"more clients (R falls from {ratio:.3g} to 3 with {needed:,})")
        smaller = (3 / ratio) ** 2 * num_trainable
        out.append(
            "an adapter with fewer trained values (adapter.kind=lora-core; R is 3 with "
            f"about {smaller:,.0f} instead of {num_trainable:,})"
        )
    if num_rounds > 1:
        out.append(
            "fewer rounds (for the same epsilon the noise of a round grows with their "
            f"square root: one round has {1 / math.sqrt(num_rounds):.2f} times as much)"
        )
    out.append("a smaller strategy.server-learning-rate, which scales noise and signal")
    return out


def ledger_advice(ledger: Ledger | None) -> list[str]:
    """Return remedies for a run that does not beat its base."""
    if ledger is None:
        return ["more rounds or local steps", "another train.learning-rate"]
    settings = ledger.settings
    return advice(
        settings.opened_noise,
        settings.num_trainable,
        settings.num_sampled_clients,
        settings.planned_rounds,
    )
