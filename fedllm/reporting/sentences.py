"""The sentences that the page, the model card and the commands share."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.adapters.kinds import KINDS, kind_of
from fedllm.data.embedded import BUILT_IN_DATA, EMBEDDED
from fedllm.privacy.wording import strength

NOT_ADVICE = BUILT_IN_DATA.caution
SMALL_MODEL = "A language model states wrong things fluently."


def verdict(result: dict[str, Any]) -> str:
    """Return the result of a run in a sentence, from result.json."""
    before, after = result["test_loss_before"], result["test_loss_after"]
    recommended = result["recommended"]
    name = "the base" if recommended == "base" else Path(recommended).name
    if before is None:
        return f"No public test rows: nothing was measured. Recommended: {name}."
    if recommended == "base":
        return (
            f"No round beat the base on public validation rows, so the base is "
            f"recommended: loss {before:.3f} on {result['test_examples']} public test rows."
        )
    text = (
        f"Loss on {result['test_examples']} public test rows, which chose nothing: "
        f"{before:.3f} for the base, {after:.3f} for the recommended adapter, {name}."
    )
    if result.get("test_pairs_preferred") is not None:
        text += (
            f" The chosen answer is the likelier one in "
            f"{result['test_pairs_likelier_before']:.1%} of the pairs before and "
            f"{result['test_pairs_likelier_after']:.1%} after; "
            f"{result['test_pairs_preferred']:.1%} are preferred as chosen."
        )
    return text


def protection(privacy: Mapping[str, Any]) -> str:
    """Return the word for a run's protection, from the numbers of its privacy.json.

    The file has the word too, but an older version may have written it without a look at
    delta.
    """
    unit, epsilon = privacy.get("unit"), privacy.get("epsilon")
    if unit == "none":
        return strength(None)
    clients = privacy.get("population_size") if unit == "client" else None
    bound = math.inf if epsilon is None else float(epsilon)
    return strength(bound, privacy.get("delta"), clients)


def caution(settings: dict[str, Any]) -> str:
    """Return the caution about answers, from the flat run config."""
    data = EMBEDDED.get(str(settings.get("data.name")))
    return SMALL_MODEL if data is None else data.caution


def kind_and_rank(settings: dict[str, Any]) -> str:
    """Return an adapter's kind, with the rank if the kind has one."""
    name = str(settings.get("adapter.kind"))
    if name in KINDS and not kind_of(name).has_rank:
        return name
    return f"{name}, rank {settings.get('adapter.rank')}"
