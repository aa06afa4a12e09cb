"""The sentences that page and card share."""

from pathlib import Path
from typing import Any

from fedllm.data.embedded import BUILT_IN_DATA, EMBEDDED

NOT_ADVICE = BUILT_IN_DATA.caution
SMALL_MODEL = "A language model states wrong things fluently."


def verdict(result: dict[str, Any]) -> str:
    """Say what a run was worth, from result.json."""
    before, after = result["test_loss_before"], result["test_loss_after"]
    recommended = result["recommended"]
    told = "the base" if recommended == "base" else Path(recommended).name
    if before is None:
        return f"No public test rows: nothing was measured. Recommended: {told}."
    if recommended == "base":
        return (
            f"No round beat the base on public validation rows, so the base is what is "
            f"recommended: loss {before:.3f} on {result['test_examples']} public test rows."
        )
    return (
        f"Loss on {result['test_examples']} public test rows, which chose nothing: "
        f"{before:.3f} for the base, {after:.3f} for what is recommended, {told}."
    )


def caution(settings: dict[str, Any]) -> str:
    """Say what answers are worth, from the flat run config."""
    data = EMBEDDED.get(str(settings.get("data.name")))
    return SMALL_MODEL if data is None else data.caution
