"""The rehearsal of `fedllm audit --memorised`: sentences are planted, and two twins trained.

The rehearsal is a federation of its own, with the settings of a run and its rows, in a folder
that is deleted afterwards. Nothing of it is released, and no released run ever saw a planted
sentence. It shows what such settings memorise, not what one run has memorised.
"""

import json
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import Arrays
from fedllm.auditing.planted import (
    MOST_EXPOSURE,
    Memory,
    Planted,
    make_planted,
    measure_memory,
    planted_rows,
)
from fedllm.client.cache import resident_model
from fedllm.client.message_handler import reply_to
from fedllm.commands.comparison_arms import make_arm
from fedllm.config import ResumeConfig, RunConfig, flat
from fedllm.data.partitions import partition
from fedllm.data.rows import load_rows
from fedllm.errors import ConfigError
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.runs.directory import RunDirectory
from fedllm.server.local_grid import LocalGrid
from fedllm.server.startup import set_up

_CLIENT_COLUMN = "rehearsal-client"
_TWINS = {"without privacy": "federated", "private": "federated-dp"}
MEANING = (
    "A rehearsal with planted sentences shows what such settings memorise of sentences like "
    "these; a secret that was never trained on has an exposure of about 1.4 bits. That nothing "
    "was recited proves nothing about other text or other attacks."
)


def rehearse(
    config: RunConfig,
    num_clients: int,
    num_planted: int,
    repeats: int,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Plant sentences, train both twins, and measure them and the base.

    Args:
        config: The settings of the run that is rehearsed.
        num_clients: N.
        num_planted: Sentences, at least 1, planted at one client after the other.
        repeats: How often each stands among its client's rows.
        show: Gets a line of each model.

    Returns:
        The content of memorised.json.

    Raises:
        FedllmError: The rows are not here, or the settings cannot be rehearsed.
    """
    config = _rehearsed(config, num_clients)
    planted = make_planted(num_planted, range(num_clients), config.seed)
    models: dict[str, Memory] = {}
    with tempfile.TemporaryDirectory(prefix="fedllm-rehearsal-") as name:
        folder = Path(name)
        config = write_rehearsal(config, num_clients, planted, repeats, folder)
        adapted = resident_model(config).adapted
        arrays = initial_arrays(adapted.spec)
        models["base"] = measure_memory(adapted, arrays, planted, config)
        show(memory_line("base", models["base"], num_planted))
        for title, arm in _TWINS.items():
            if arm == "federated-dp" and config.privacy.unit == "none":
                continue
            arrays = _train(arm, config, num_clients, folder / arm)
            models[title] = measure_memory(adapted, arrays, planted, config)
            show(memory_line(title, models[title], num_planted))
    return {
        "num_planted": num_planted,
        "repeats": repeats,
        "num_clients": num_clients,
        "rounds": config.num_server_rounds,
        "model": config.model.name,
        "unit": config.privacy.unit,
        "most": MOST_EXPOSURE,
        "models": {title: memory.as_dict() for title, memory in models.items()},
        "meaning": MEANING,
    }


def memory_line(title: str, memory: Memory, count: int) -> str:
    """Return what a model remembers, for a person."""
    return (
        f"{title}: exposure {memory.exposure:.2f} bits ({memory.exposure_low:.2f} to "
        f"{memory.exposure_high:.2f}) of at most {MOST_EXPOSURE:.0f}; recited "
        f"{memory.recited} of {count} ({100 * memory.recited_low:.1f} to "
        f"{100 * memory.recited_high:.1f} %)"
    )


def _rehearsed(config: RunConfig, num_clients: int) -> RunConfig:
    """Return the settings of the rehearsal, but for its rows.

    Raises:
        ConfigError: The planted sentences fit no row of such a shape, or the run is sealed.
    """
    if config.is_sealed:
        raise ConfigError(
            "privacy.trust: a rehearsal has no trustees (got 'trustees'): rehearse the settings "
            "with privacy.trust='server'"
        )
    if config.data.format not in ("auto", "question-answer"):
        raise ConfigError(
            "data.format: planted sentences are questions with answers, and the rows are "
            f"read as {config.data.format!r} alone: set 'auto' or 'question-answer'"
        )
    config = replace(config, resume=ResumeConfig())
    if config.adapter.kind == "auto":
        config = with_choice(config, choose_adapter(config, num_clients))
    privacy = replace(config.privacy, on_destructive_noise="warn")
    return replace(config, privacy=privacy)


def write_rehearsal(
    config: RunConfig,
    num_clients: int,
    planted: Sequence[Planted],
    repeats: int,
    folder: Path,
) -> RunConfig:
    """Write each client's rows and planted sentences, and return the config that names them.

    Args:
        config: Names the run's own rows and how clients share them.
        num_clients: N.
        planted: The sentences.
        repeats: How often each stands among its client's rows.
        folder: Gets the file.

    Raises:
        FedllmError: The rows are not on this machine.
    """
    data, path = config.data, folder / "rows.jsonl"
    rows = load_rows(data)
    with path.open("w", encoding="utf-8") as file:
        for client in range(num_clients):
            own = partition(data, rows, client, num_clients, config.seed).to_list()
            here = [one for one in planted if one.client == client]
            more = [row for row in planted_rows(here, config) for _ in range(repeats)]
            if data.person_column:
                # Each sentence is a person's; ids of the file are text then.
                own = [_with_text_id(row, data.person_column) for row in own]
                column, question = data.person_column, data.prompt_column
                more = [{**row, column: row[question]} for row in more]
            for row in (*own, *more):
                line = {**row, _CLIENT_COLUMN: f"client-{client}"}
                file.write(json.dumps(line, default=str) + "\n")
    rehearsed = replace(
        data, name=str(path), partition="natural", partition_column=_CLIENT_COLUMN
    )
    return replace(config, data=rehearsed)


def _with_text_id(row: dict[str, Any], column: str) -> dict[str, Any]:
    value = row.get(column)
    return row if value is None else {**row, column: str(value)}


def _train(arm: str, config: RunConfig, num_clients: int, folder: Path) -> Arrays:
    """Run one twin to its end, and return its last adapter."""
    made = make_arm(arm, config, num_clients)
    folder.mkdir(mode=0o700)
    # Clients of record level keep their ledgers by it.
    run_id = secrets.randbits(63)
    grid = LocalGrid(reply_to, made.nodes, flat(made.config), run_id)
    federation = set_up(
        made.server_config,
        grid,
        run_id,
        least_clients=1,
        directory=RunDirectory(folder),
    )
    federation.run()
    return federation.progress.arrays
