"""The card of a personal adapter: README.md, for the node that has it and nobody else."""

from collections.abc import Mapping
from typing import Any

from fedllm.models.known import KNOWN_MODELS
from fedllm.reporting.sentences import SMALL_MODEL, caution, kind_and_rank


def personal_card(
    settings: Mapping[str, Any], run_id: int, choice: Mapping[str, Any]
) -> str:
    """Return the card.

    Args:
        settings: The flat run config.
        run_id: Flower's id of the run.
        choice: Losses, choice and numbers of rows, as in choice.json.
    """
    name = str(settings["model.name"])
    model = KNOWN_MODELS.get(name)
    rows = choice["rows"]
    losses = "\n".join(
        f"| {candidate} | {loss:.3f} |" for candidate, loss in choice["losses"].items()
    )
    return f"""# A personal adapter for {name}

**Not private. Keep it on this machine.** It was trained on this node's own rows without noise,
and may hold what single rows say. No epsilon covers it. The run's epsilon is about what left
this node in the rounds; nothing of this adapter left, so it is unchanged.

An adapter of kind {kind_and_rank(dict(settings))}. It was trained on from the adapter that run {run_id}
released, in at most {settings["personal.epochs"]:g} passes over {rows["training"]} of this node's rows.

| | |
|---|---|
| base model | {model.hub_name if model else name.partition("@")[0]} |
| its licence | {model.licence if model else "not known here: see where it comes from"} |
| chosen | {choice["choice"]} |

## Loss on the {rows["choosing"]} held-out rows that chose

| | |
|---|---|
{losses}

{rows["stopping"]} other held-out rows ended the training. No round used any of them. A difference
on so few rows may be chance.

## Limits

{SMALL_MODEL} {_caution(settings)}
"""


def _caution(settings: Mapping[str, Any]) -> str:
    """Return the caution of the data, if it has one of its own."""
    text = caution(dict(settings))
    return "" if text == SMALL_MODEL else text
