"""The model card of a run: README.md in the form of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from fedllm.adapters.kinds import kind_of
from fedllm.data.embedded import EMBEDDED
from fedllm.models.known import KNOWN_MODELS
from fedllm.privacy.wording import BANDS
from fedllm.reporting.sentences import (
    NOT_ADVICE,
    SMALL_MODEL,
    kind_and_rank,
    protection,
    verdict,
)
from fedllm.runs.record import RunRecord

_USE = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("peft_final")"""
_MERGED_USE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")"""


def card(run: RunRecord, merged: bool = False) -> str:
    """Return the card of a run's adapter, or of base and adapter merged."""
    settings = run.settings
    name, data = str(settings["model.name"]), str(settings["data.name"])
    model, rows = KNOWN_MODELS.get(name), EMBEDDED.get(data)
    result = run.result or {}
    return f"""---
{_metadata(run, merged)}
---

# {f"{name} and an adapter, merged" if merged else f"An adapter for {name}"}

{"The adapter is" if merged else "An adapter"} of kind {kind_and_rank(settings)}, with {run.config["num_trainable"]:,} trained values,
trained by fedllm on {run.config["num_clients"]} clients in {run.rounds_done} rounds.

| | |
|---|---|
| base model | {model.hub_name if model else name.partition("@")[0]} |
| its commit, or hashes | {run.config.get("base_digest", "not known")} |
| its licence | {model.licence if model else "not known here: see where it comes from"} |
| data | {data} |
| its licence | {rows.licence if rows else "not known here: ask who holds it"} |

## Privacy

{run.privacy["statement"]}

Not covered: {"; ".join(run.privacy["not_covered"])}.

## Results

{verdict(result) if result else "The run has not come to its end."}

## Use

```python
{_MERGED_USE if merged else _USE}
```

## Limits

{SMALL_MODEL} {NOT_ADVICE}
"""


def _metadata(run: RunRecord, merged: bool) -> str:
    """Return the front matter; unknown values are left out."""
    settings = run.settings
    model = KNOWN_MODELS.get(str(settings["model.name"]))
    rows = EMBEDDED.get(str(settings["data.name"]))
    base, _, _ = (model.hub_name if model else str(run.config["base"])).partition("@")
    lines: dict[str, Any] = {}
    # A path on this machine is no name that the hub could look up.
    if not Path(base).is_absolute():
        lines["base_model"] = base
        lines["base_model_relation"] = "finetune" if merged else "adapter"
    if model is not None:
        lines["license"] = model.licence
    lines["library_name"] = "transformers" if merged else "peft"
    lines["pipeline_tag"] = "text-generation"
    tags = ["federated-learning", _method(settings)]
    # Who searches the hub for private models looks for a bound that means something.
    if protection(run.privacy) not in ("none", BANDS[-1][1]):
        tags.insert(1, "differential-privacy")
    if rows is not None:
        lines["language"] = rows.language
        tags += rows.tags
    text = [f"{key}: {json.dumps(value)}" for key, value in lines.items()]
    return "\n".join([*text, f"tags: [{', '.join(tags)}]"])


def _method(settings: dict[str, Any]) -> str:
    """Return the hub's tag for PEFT's method: several kinds are LoRA."""
    return kind_of(str(settings["adapter.kind"])).peft_method.lower()
