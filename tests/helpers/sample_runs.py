"""Run folders of every kind, without training anything."""

import json
from pathlib import Path
from typing import Any

from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import Ledger, no_privacy

HOSTILE = "<script>alert('x')</script> & \"quoted\""

# With its noise given: to find the noise for a target takes seconds under Poisson sampling.
SECRET_COHORTS = {
    "strategy__sampling": "poisson",
    "strategy__fraction_train": 0.5,
    "privacy__target_epsilon": 0.0,
    "privacy__noise_multiplier": 5.0,
}


def line(
    server_round: int, epsilon: float | None, secret: bool = False
) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    known = 4 if server_round else 0
    return {
        "server_round": server_round,
        "clients_asked": None if secret and server_round else known,
        "clients_answered": None if secret and server_round else known,
        "clients_rejected": None if secret and server_round else 0,
        "train_loss": None,
        "validation_loss": 3.9 - 0.1 * server_round,
        "client_loss": None,
        "seconds": {
            "train": None if secret and server_round else 700.0 * known,
            "aggregate": None if secret and server_round else 0.1 * known,
            "evaluate": 2.0,
            "save": 0.1,
        },
        "megabytes_down": None if secret and server_round else 1.5,
        "megabytes_up": None if secret and server_round else 1.5,
        "epsilon": epsilon,
        "learning_rate": 1.0 if server_round else None,
    }


def write_run(
    folder: Path, rounds: int = 3, finished: bool = True, **changes: Any
) -> Path:
    """Write a run folder; keys of `changes` have __ for a dot and _ for a hyphen."""
    typed = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    config = parse_run_config({"num-server-rounds": 3, **typed})
    folder.mkdir(parents=True)
    if config.privacy.unit == "client":
        ledger = Ledger.create(
            folder / "privacy.json", privacy_settings(config, 4, 1000)
        )
    else:
        ledger = None
        (folder / "privacy.json").write_text(json.dumps(no_privacy(4, 1000)))
    secret = config.strategy.sampling == "poisson"
    for server_round in range(rounds + 1):
        if ledger is not None and server_round:
            ledger.spend(server_round)
        epsilon = None if ledger is None else ledger.epsilons().zero_out
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(server_round, epsilon, secret)) + "\n")
    content = {
        "run_config": flat(config),
        "num_clients": 4,
        "base": "/models/base",
        "num_trainable": 1000,
        "versions": {"python": "3.11"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    if finished:
        result = {
            "recommended": str(folder / "peft_best"),
            "num_rounds": rounds,
            "best_round": rounds,
            "test_loss_before": 3.75,
            "test_loss_after": 2.96,
            "test_examples": 266,
        }
        (folder / "result.json").write_text(json.dumps(result))
        answer = {
            "question": f"What is {HOSTILE}?",
            "reference": HOSTILE,
            "base": HOSTILE,
            "tuned": HOSTILE,
        }
        answers = {"server_round": rounds, "max_new_tokens": 40, "answers": [answer]}
        (folder / "answers.json").write_text(json.dumps(answers))
    return folder
