"""Which way pays, as text for a person and as JSON values."""

from typing import Any

from fedllm.planning.frontier import load_frontier
from fedllm.planning.measured_ways import ALONE, Outlook, changes, outlooks
from fedllm.privacy.wording import plain

_MOST_CHANGES = 3


def ways_plan(clients: int, rows: int, epsilon: float) -> dict[str, Any]:
    """Return what each way reaches, which is best, and what would change that.

    Args:
        clients: Clients of the federation.
        rows: Rows of each.
        epsilon: What a private federation may spend.
    """
    found = outlooks(clients, rows, epsilon)
    return {
        "num_clients": clients,
        "rows": rows,
        "epsilon": epsilon,
        "ways": [_as_dict(one) for one in found],
        "best": found[0].way if found[0].loss is not None else None,
        "changes": [
            {"change": what, "test_loss": round(loss, 3), "alone": round(alone, 3)}
            for what, loss, alone in changes(clients, rows, epsilon)[:_MOST_CHANGES]
        ],
    }


def _as_dict(one: Outlook) -> dict[str, Any]:
    measured = one.measured
    return {
        "way": one.way,
        "test_loss": None if one.loss is None else round(one.loss, 3),
        "test_losses": list(measured.test_losses) if measured else None,
        "epsilon": measured.epsilon if measured else None,
        "interpolation_error": (
            round(one.interpolated[1], 3) if one.interpolated else None
        ),
        "command": measured.command if measured else None,
    }


def way_lines(plan: dict[str, Any]) -> list[str]:
    """Return the answer of `ways_plan` as text."""
    frontier = load_frontier()
    lines = [
        f"{plan['num_clients']} clients of {plan['rows']} rows, epsilon "
        f"{plain(plan['epsilon'])}: test loss of each way, measured on {frontier.model} with "
        f"{frontier.data} ({frontier.loss_before:.2f} untuned)",
        *(f"  {_way(one)}" for one in plan["ways"]),
        _verdict(plan),
    ]
    if plan["changes"]:
        lines.append("joining was measured to pay with")
    lines += [
        f"  {one['change']}: {one['test_loss']:.2f}, alone {one['alone']:.2f}"
        for one in plan["changes"]
    ]
    return lines


def _way(one: dict[str, Any]) -> str:
    """Return one way's loss, with where it comes from."""
    if one["test_loss"] is None:
        return f"{one['way']}: not measured"
    if one["interpolation_error"] is not None:
        return (
            f"{one['way']}: {one['test_loss']:.2f}, between two measured numbers of rows "
            f"(doing so where it was measured was off by up to "
            f"{one['interpolation_error']:.2f})"
        )
    spread = ""
    if len(one["test_losses"]) > 1:
        spread = f" ({min(one['test_losses']):.2f} to {max(one['test_losses']):.2f})"
    return f"{one['way']}: {one['test_loss']:.2f}{spread}; {one['command']}"


def _verdict(plan: dict[str, Any]) -> str:
    """Return whether joining pays, as far as it was measured."""
    by_way = {one["way"]: one["test_loss"] for one in plan["ways"]}
    alone = by_way.pop(ALONE)
    private = {
        one["way"]: one["test_loss"]
        for one in plan["ways"]
        if one["epsilon"] is not None
    }
    if alone is None or not private:
        return "whether joining pays: not measured for these numbers"
    way = min(private, key=lambda name: private[name])
    gain = alone - private[way]
    if gain > 0:
        return f"joining pays: {way} is {gain:.2f} below alone"
    return f"joining does not pay: {way} is {-gain:.2f} above alone"
