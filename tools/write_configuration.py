"""Write docs/configuration.md from fedllm/config.py, so that the page cannot drift.

Every key, its type, what is allowed, its default and its attribute docstring are read
from the sections themselves; the errors of combinations are those that
`parse_run_config` really raises.

    python tools/write_configuration.py
    python tools/write_configuration.py --check
"""

# What is quoted below is Markdown, where a table's row is one line.

import argparse
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import annotated_types
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from fedllm.config import RunConfig, Scalar
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

<!-- Written by tools/write_configuration.py from fedllm/config.py: edit those. -->

A run is configured by dotted keys. Their defaults stand in `[tool.flwr.app.config]` of
`pyproject.toml`. A run overrides them with `--run-config`, which takes either a TOML file or
`key=value` pairs, not both:

```bash
fedllm simulate --num-supernodes 20 --run-config "num-server-rounds=5 privacy.target-epsilon=4.0"
```

Text values need quotes of their own (`model.name='...'`). Write a float with its point (`8.0`).
An unknown key, a wrong type or a value out of range raises an error that names all bad keys at
once, before a model is loaded or a client is asked. Flower's run config has no null, so 0, 0.0 or
an empty text means "not set" if the explanation says so.
"""

# Each raises a ConfigError; the page quotes it.
REFUSED: list[dict[str, Scalar]] = [
    {"adapter.kind": "ia3", "adapter.dropout": 0.1},
    {"train.local-steps": 0, "train.local-epochs": 0.0},
    {"train.learning-rate": 0.1, "train.learning-rate-min": 1.0},
    {"strategy.server-learning-rate": 0.1, "strategy.server-learning-rate-min": 1.0},
    {"strategy.fraction-train": 0.5},
    {"strategy.num-clients": 1},
    {"resume.from": "runs/mine"},
    {"privacy.noise-multiplier": 1.0},
    {"privacy.target-epsilon": 0.0},
    {"privacy.delta": 1e-15},
    {"privacy.max-epsilon": 4.0},
    {"strategy.aggregator": "median"},
    {"strategy.fraction-evaluate": 0.5, "data.held-out-fraction": 0.2},
    {"personal.proximal-mu": 0.1},
    {"privacy.unit": "none", "strategy.fraction-evaluate": 0.5},
    {"privacy.unit": "record", "model.quantization": 8},
    {"privacy.unit": "record", "adapter.kind": "auto"},
    {"privacy.unit": "record", "adapter.dropout": 0.1},
    {"privacy.noise": "joint"},
    {"privacy.unit": "record", "privacy.noise": "joint", "train.local-steps": 8},
    {"privacy.unit": "record", "privacy.noise": "joint", "train.optimizer": "adamw"},
    {
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "strategy.aggregator": "median",
    },
    {
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "strategy.sampling": "poisson",
    },
    {"privacy.unit": "none", "privacy.max-epsilon": 4.0},
]

TAIL = """
## The node's config

Each SuperNode has a config of its own, `fedllm supernode --node-config '...'`. A simulation sets
`partition-id` and `num-partitions` itself.

| key | explanation |
|---|---|
| `data-path` | The client's own file or folder, instead of `data.name`. It is not partitioned. |
| `partition-id`, `num-partitions` | Which share of `data.name` this node holds, if it has no file. Without a limit beside them the node counts as simulated: at record level it starts a new ledger in every run. |
| `privacy-unit` | Limit: the run's `privacy.unit` must be this. If no `max-epsilon` is set, 10 is. |
| `max-epsilon` | Limit: all runs of this node together may spend this at most, zero-out, at the node's `delta` or else 1e-5; each run must bound its own (`privacy.target-epsilon` or `privacy.max-epsilon`) by it too. With `privacy-unit='record'`: this node stops training once its releases have spent this in all runs, whatever the run config says. |
| `budget-period` | Days of a period that `max-epsilon` is for, under client level; without it, the lifetime. The owner alone begins the next one: `fedllm node renew`. |
| `delta` | Limit: the run must set `privacy.delta`, to at most this. |
| `model-name` | Limit: the run's `model.name` must be this. With another limit and `privacy.unit='record'` it is the built-in model if it is not set: a chat template is a program that runs on every row. |
| `privacy-noise` | `joint`, beside `privacy-unit='record'`: a run may leave the noise to the server (`privacy.noise='joint'`), which is then trusted, or to trustees; with `least-trustees` to trustees alone. If it is not set, or `local`, a node with a limit rejects such a run. |
| `declared-rows` | How many rows this node has, declared by its owner as a public number. `privacy.noise='joint'` needs it, unless the run counts persons; nothing compares it with the file. |
| `person-column` | Limit, beside `privacy-unit='record'`, `data-path` and `declared-persons`: the run's `data.person-column` must be this, the column of the file that names whose row it is. Without it a run must have none. |
| `declared-persons` | How many persons the file has, declared by its owner as a public number: under `person-column` it takes the place of the number of rows, for both noises. Nothing compares it with the file. |
| `trusted-trustees` | The trustees whom the owner knows, `name:KEY,name:KEY`, each KEY the 43 characters of `fedllm keys --add-trustee`, brought by a way that is not the server's. Without it a node with data takes part in no run with `privacy.trust='trustees'`. |
| `least-trustees` | Limit: a run must be sealed by `privacy.trust='trustees'`, and by this many trustees at least. |
| `colluding-trustees` | Limit: a sealed run must keep its epsilon even if this many of its trustees help the server. |
| `adapter-rank` | Largest rank that this node trains. A run of `adapter.kind='ffa-lora'` of a larger rank has it train the first columns of B alone, and its update of the others is zero; its reply is no smaller. Runs of another kind and a larger rank are rejected. |
| `batch-size` | Largest micro-batch of this node. Accumulation keeps the step of the run. |
| `max-memory` | GB that a training may need here, by the estimate of `fedllm doctor` for the longest rows: the node takes the largest micro-batch that fits, and rejects a run of which one example does not. |
| `max-seconds` | Seconds that this node works on a round: it makes as many local steps as fit, at least one, and its update counts as any other. Under `privacy.unit='record'` the steps are the plan's: the node times a micro-batch of public tokens, and takes part or declines before it reads a row. |
| `trustee-name`, `trustee-key` | This node is the trustee of that name in runs that name it; the file is its private key, for its owner's eyes alone. Without `data-path` and a partition the node is a trustee alone: it opens rounds, never trains and is no client. |

A run outside a limit gets no update from that node: code `bad-config`, or `budget-spent` if it is one run too many;
that counts as a zero update. Any other key has the same effect, and the node's log names it, so that no limit is lost by a
typing error. The check is code of the app, which Flower ships from the server: it guards against a
careless run, not against a hostile server.

## Environment variables

None has to be set. These change something:

| variable | what it does |
|---|---|
| `FEDLLM_HOME` | The one folder that everything is written under; by default `~/.fedllm`. |
| `FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1` | Keeps the Flower daemon that `flwr run` starts from installing the dependencies for each run. It counts in the environment of the process that starts the daemon. `fedllm simulate`, `superlink` and `supernode` set it. |
| `FLWR_TELEMETRY_ENABLED=0`, `FLWR_DISABLE_UPDATE_CHECK=1` | Flower reports its use to its makers, and asks them for a newer version, unless these are set. `fedllm simulate`, `superlink` and `supernode` set them; a bare `flwr` or `flower-supernode` needs them exported. |
| `RAY_TMPDIR` | Where a simulation's Ray has its folder, which is closed to other users; by default `/tmp`. `RAY_ADDRESS` does not count: a simulation starts a Ray of its own. |
| `RAY_raylet_start_wait_time_s` | Seconds that Ray's node may take to start; if it is not set, we set 120. |
| `HF_HOME`, `HF_HUB_OFFLINE` | The model hub's own: its cache, and whether it may be reached at all. |
"""


def _allowed(info: FieldInfo, kind: str) -> str:
    """Return a cell with the values that a field takes."""
    options = get_args(info.annotation)
    if options:
        return ", ".join(f"`{option}`" for option in options)
    if any(isinstance(mark, AfterValidator) for mark in info.metadata):
        return ", ".join(str(value) for value in _accepted(info))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    words = [
        f"{sign} {getattr(mark, name):,}"
        for name, sign in signs.items()
        for mark in _constraints(info)
        if getattr(mark, name, None) is not None
    ]
    if words:
        return " and ".join(words)
    if kind == "bool":
        return "`true`, `false`"
    longer = any(isinstance(mark, annotated_types.MinLen) for mark in info.metadata)
    return "not empty" if longer else "any, also empty"


def _constraints(info: FieldInfo) -> list[Any]:
    kinds = (
        annotated_types.Ge,
        annotated_types.Gt,
        annotated_types.Le,
        annotated_types.Lt,
    )
    return [mark for mark in info.metadata if isinstance(mark, kinds)]


def _accepted(info: FieldInfo) -> list[int]:
    """Return the small whole numbers that a field with a validator of its own takes."""
    from pydantic import TypeAdapter

    adapter = TypeAdapter(info.rebuild_annotation())
    accepted = []
    for value in range(65):
        try:
            accepted.append(adapter.validate_python(value))
        except ValidationError:
            continue
    return accepted


def _row(key: str, info: FieldInfo, default: Scalar) -> str:
    if not info.description:
        sys.exit(f"{key}: has no attribute docstring")
    kind = {"str": "text"}.get(type(default).__name__, type(default).__name__)
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    if isinstance(default, str):
        shown = f'"{default}"'
    explained = info.description.replace("\n", " ").replace("|", "\\|")
    return f"| `{key}` | {kind} | {_allowed(info, kind)} | `{shown}` | {explained} |"


def _table(section: Any, prefix: str) -> list[str]:
    infos = type(section).__pydantic_fields__
    rows = ["| key | type | allowed | default | explanation |", "|---|---|---|---|---|"]
    for entry in fields(section):
        value = getattr(section, entry.name)
        if not is_dataclass(value):
            key = prefix + entry.name.removesuffix("_").replace("_", "-")
            rows.append(_row(key, infos[entry.name], value))
    return rows


def _errors() -> list[str]:
    lines = ["| together | error |", "|---|---|"]
    for mapping in REFUSED:
        try:
            parse_run_config(mapping)
        except ConfigError as error:
            settings = ", ".join(f"`{key}={value}`" for key, value in mapping.items())
            lines.append(f"| {settings} | {str(error).replace(chr(10), '; ')} |")
        else:
            sys.exit(f"no longer an error: {mapping}")
    return lines


def page() -> str:
    """Return the whole page."""
    defaults = RunConfig()
    lines = [HEAD, "## Run", "", *_table(defaults, "")]
    for entry in fields(defaults):
        section = getattr(defaults, entry.name)
        if is_dataclass(section):
            about = (type(section).__doc__ or "").strip()
            lines += ["", f"## {entry.name}", "", about, ""]
            lines += _table(section, f"{entry.name}.")
    lines += ["", "## Combinations that raise an error", ""]
    lines += ["Each line sets these keys and leaves the rest at their defaults.", ""]
    lines += _errors()
    return "\n".join(lines) + "\n" + TAIL


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE} differs from fedllm/config.py: run this without --check")


if __name__ == "__main__":
    main()
