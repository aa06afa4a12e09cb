"""What to expect of a private federation, drawn over its number of clients."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fedllm.planning.frontier import expected, load_frontier, noise_level
from fedllm.privacy.accounting import calibrate


def draw(
    path: Path, kind: str, targets: Sequence[float], num_rounds: int, delta: float
) -> None:
    """Draw the expected test loss over the number of clients, a line for each epsilon.

    Args:
        path: Where to; the suffix says in which format.
        kind: Kind of adapter.
        targets: Zero-out epsilons, at most four.
        num_rounds: Rounds, with all clients in each.
        delta: Of the guarantee.

    Raises:
        OSError: The file cannot be written.
        ValueError: Matplotlib does not know the format.
    """
    frontier = load_frontier()
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes = [round(10 * 10 ** (i / 10)) for i in range(21)]
    for epsilon, mark in zip(targets, "osv^", strict=False):
        z = calibrate(epsilon, num_rounds, delta, "all", 1.0)
        losses = []
        for size in sizes:
            found = expected(kind, noise_level(z, num_rounds, size), frontier)
            losses.append(found.loss if found else math.nan)
        label = f"epsilon {epsilon:g}"
        axes.plot(sizes, losses, marker=mark, markevery=4, label=label)
    axes.axhline(frontier.loss_before, color="0.5", linestyle=":", label="base")
    axes.axhline(
        frontier.loss_without_privacy, color="0.5", linestyle="--", label="no privacy"
    )
    axes.set(xscale="log", xlabel="clients, all in each round", ylabel="test loss")
    axes.set_title(
        f"{kind}, {num_rounds} rounds, delta {delta:g}: {frontier.model}, {frontier.data}",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    figure.savefig(path)
