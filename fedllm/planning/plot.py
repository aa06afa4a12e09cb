"""Draw the measured test losses of private federations over their number of clients."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedllm.planning.frontier import Measured, load_frontier


def draw(path: Path, kind: str, plan: dict[str, Any]) -> None:
    """Draw the test loss over the number of clients, a line for each measured epsilon.

    Every mark is a federation that was run, with rounds and steps of its own. The planned
    run is drawn with its interval if it is inside what was measured.

    Args:
        path: The file to write; its suffix names the format.
        kind: Kind of adapter.
        plan: The plan of `fedllm.planning.plan.plan_run`.

    Raises:
        OSError: The file cannot be written.
        ValueError: Matplotlib does not know the format.
    """
    frontier = load_frontier()
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    _draw_rows(axes, [row for row in frontier.private_rows if row.kind == kind])
    expected = plan["expected"]
    if expected["inside_what_was_measured"]:
        loss = expected["test_loss"]
        below, above = (
            loss - expected["test_loss_low"],
            expected["test_loss_high"] - loss,
        )
        axes.errorbar(
            [plan["num_clients"]],
            [loss],
            yerr=[[below], [above]],
            color="0.2",
            marker="x",
            capsize=4,
            label="this run",
        )
    axes.axhline(frontier.loss_before, color="0.5", linestyle=":", label="base")
    axes.axhline(
        frontier.loss_without_privacy, color="0.5", linestyle="--", label="no privacy"
    )
    axes.set(xscale="log", xlabel="clients, all in each round", ylabel="test loss")
    axes.set_title(
        f"{kind}, measured: {frontier.model}, {frontier.data}, delta 1e-05", fontsize=10
    )
    axes.legend(fontsize=8)
    figure.savefig(path)


def _draw_rows(axes: Axes, rows: list[Measured]) -> None:
    """Draw the best row at each epsilon and number of clients."""
    epsilons = sorted({row.epsilon for row in rows if row.epsilon is not None})
    for epsilon, mark in zip(epsilons, "osv^", strict=False):
        best: dict[int, float] = {}
        for row in rows:
            if row.epsilon == epsilon:
                best[row.clients] = min(row.loss, best.get(row.clients, row.loss))
        sizes = sorted(best)
        axes.plot(
            sizes, [best[n] for n in sizes], marker=mark, label=f"epsilon {epsilon:g}"
        )
