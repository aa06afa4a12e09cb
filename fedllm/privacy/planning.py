"""Is it worth anything: the noise against the signal, and what would help."""

import math


def noise_to_signal(
    noise_multiplier: float, num_trainable: int, num_sampled_clients: float
) -> float:
    """Return R = z * sqrt(d) / n: the norm of the averaged noise over the clip norm.

    R alone is no verdict: a language model bore R = 22, since noise in many dimensions
    falls mostly where the loss is flat. The noise probe is the verdict.
    """
    return noise_multiplier * math.sqrt(num_trainable) / num_sampled_clients


def advice(
    noise_multiplier: float,
    num_trainable: int,
    num_sampled_clients: float,
    num_rounds: int,
) -> list[str]:
    """Return what would help against the noise, best first, with numbers.

    Args:
        noise_multiplier: z.
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
