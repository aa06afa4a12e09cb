"""The page and the model card of a run, made from what lies in its folder."""

import html
import json
from pathlib import Path
from typing import Any

from fedllm.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RESULT_FILE,
    read_json,
)

_COLUMNS = {
    "server_round": "Round",
    "validation_loss": "Validation loss",
    "train_loss": "Train loss",
    "epsilon": "Epsilon spent",
    "clients_asked": "Clients asked",
    "clients_answered": "Answered",
    "clients_rejected": "Rejected",
    "megabytes_down": "MB down",
    "megabytes_up": "MB up",
    "seconds": "Seconds",
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
.statement { font-size: 1.3rem; border-left: .4rem solid; padding: .2rem 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; }
"""


def write_report(folder: Path) -> None:
    """Write report.html, self-contained, and README.md, the model card.

    Args:
        folder: A run folder with config, metrics, privacy and result.
    """
    run = {
        "config": read_json(folder / CONFIG_FILE),
        "privacy": read_json(folder / PRIVACY_FILE),
        "result": read_json(folder / RESULT_FILE),
        "rounds": [
            json.loads(line)
            for line in (folder / METRICS_FILE).read_text("utf-8").splitlines()
        ],
    }
    (folder / "report.html").write_text(_page(run, folder), encoding="utf-8")
    (folder / "README.md").write_text(_card(run), encoding="utf-8")


def _page(run: dict[str, Any], folder: Path) -> str:
    """Return the page."""
    settings = run["config"]["run_config"]
    title = f"{settings['model.name']}, {run['config']['num_clients']} clients"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="statement">{_text(run["privacy"]["statement"])}</p>',
        f"<p>{_text(_verdict(run['result']))}</p>",
        "<h2>Rounds</h2>",
        _table(
            [list(_COLUMNS.values())],
            [[_cell(line, key) for key in _COLUMNS] for line in run["rounds"]],
        ),
        "<h2>Not covered by the statement</h2>",
        "<ul>"
        + "".join(f"<li>{_text(line)}</li>" for line in run["privacy"]["not_covered"])
        + "</ul>",
        "<h2>Settings</h2>",
        _table([["Key", "Value"]], [[k, str(v)] for k, v in settings.items()]),
        "<h2>Versions</h2>",
        _table([["", ""]], [[k, v] for k, v in run["config"]["versions"].items()]),
        f"<p>{_text(folder)}</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _card(run: dict[str, Any]) -> str:
    """Return the model card, with the metadata that the Hugging Face hub reads."""
    settings, privacy = run["config"]["run_config"], run["privacy"]
    rounds = run["result"]["num_rounds"]
    return f"""---
base_model: {run["config"]["base"]}
library_name: peft
pipeline_tag: text-generation
tags: [federated-learning, differential-privacy, {_method(settings)}]
---

# An adapter for {settings["model.name"]}

An adapter of kind {settings["adapter.kind"]}{_rank(settings)}, trained by
fedllm on {run["config"]["num_clients"]} clients in {rounds} rounds; data:
{settings["data.name"]}.

## Privacy

{privacy["statement"]}

Not covered: {"; ".join(privacy["not_covered"])}.

## Results

{_verdict(run["result"])}

## Use

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("peft_final")
```

## Limits

A small language model states wrong things fluently. Its text is not medical advice.
"""


def _method(settings: dict[str, Any]) -> str:
    """Name PEFT's method, as the hub tags it: three kinds are LoRA."""
    kind = str(settings["adapter.kind"])
    return kind if kind in ("ia3", "vera") else "lora"


def _rank(settings: dict[str, Any]) -> str:
    """Say the rank of a kind that has one."""
    if settings["adapter.kind"] == "ia3":
        return ""
    return f", rank {settings['adapter.rank']}"


def _verdict(result: dict[str, Any]) -> str:
    """Say what the run was worth."""
    if result["test_loss_before"] is None:
        return "No public test rows: nothing was measured."
    return (
        f"Loss on {result['test_examples']} public test rows: "
        f"{result['test_loss_before']:.3f} for the base, "
        f"{result['test_loss_after']:.3f} for what is recommended: "
        f"{result['recommended']}."
    )


def _cell(line: dict[str, Any], key: str) -> str:
    """Write one value of a round; what is secret or unmeasured is a dash."""
    value = line[key]
    if key == "seconds":
        known = list(value.values())
        value = None if None in known else sum(known)
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(head: list[list[str]], rows: list[list[str]]) -> str:
    """Return an HTML table."""

    def row(cells: list[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = [row(r, "th") for r in head] + [row(r, "td") for r in rows]
    return f"<table>{''.join(body)}</table>"


def _text(value: object) -> str:
    """Escape for HTML."""
    return html.escape(str(value))
