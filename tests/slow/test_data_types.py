"""Each type of rows, through real Flower, on a tiny model."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.flower_processes import environment, latest_run, typed
from tests.helpers.rows import turn, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def of_each_type(number: int) -> dict[str, dict[str, Any]]:
    """Return a row of each type, all of one question."""
    question, answer = f"What is term {number}?", f"A disorder, number {number}."
    turns = [turn("user", question), turn("assistant", answer)]
    return {
        "text": {"text": f"{question} {answer}"},
        "prompt": {"prompt": question, "completion": answer},
        "alpaca": {"instruction": "Explain.", "input": question, "output": answer},
        "messages": {"messages": turns},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ]
        },
    }


READ_AS = {
    "text": "text",
    "prompt": "prompt + completion",
    "alpaca": "instruction + input + output",
    "messages": "messages",
    "sharegpt": "conversations",
}


def simulate(model: Path, home: Path, clients: int, **settings: object) -> Path:
    """Run a simulation without privacy; return its run folder."""
    values = {
        "model.name": str(model),
        "model.quantization": 0,
        "num-server-rounds": 1,
        "train.batch-size": 4,
        "train.local-steps": 1,
        "privacy.unit": "none",
        "privacy.target-epsilon": 0.0,
        **settings,
    }
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    command = [sys.executable, "-m", "fedllm.commands.main", "simulate"]
    command += ["--num-supernodes", str(clients), "--run-config", config]
    done = typed(command, environment(home / "flwr", home / "fedllm"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    return latest_run(home / "fedllm")


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_client_of_each_type_of_rows_trains(tiny_chat_llama, tmp_path):
    """One federation, in which every client has rows of another type."""
    rows = [
        {"site": site, **row}
        for number in range(8)
        for site, row in of_each_type(number).items()
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)

    run = simulate(
        tiny_chat_llama,
        tmp_path,
        len(READ_AS),
        **{"data.name": str(data), "data.partition": "natural"},
    )

    line = lines_of(run)[1]
    assert (line["clients_answered"], line["clients_rejected"]) == (5, 0)
    logs = [p.read_text() for p in (tmp_path / "fedllm" / "logs").glob("client-*.log")]
    for columns in READ_AS.values():
        said = f"8 of 8 rows are read as {columns}\n"
        assert sum(said in log for log in logs) == 1, columns
    assert not any("nothing is learned" in log for log in logs)


def test_preferences_train_at_record_level(tiny_chat_llama, tmp_path):
    def pairs(first: int, count: int) -> str:
        rows = [
            {
                "prompt": [turn("user", f"What is term {number}?")],
                "chosen": [turn("assistant", f"A disorder, number {number}.")],
                "rejected": [turn("assistant", "Who knows?")],
            }
            for number in range(first, first + count)
        ]
        return str(write_jsonl(tmp_path / f"pairs-{first}.jsonl", rows))

    run = simulate(
        tiny_chat_llama,
        tmp_path,
        2,
        **{
            "train.objective": "dpo",
            "data.name": pairs(0, 60),
            "data.public-validation": pairs(100, 6),
            "data.public-test": pairs(200, 6),
            "adapter.kind": "lora-core",
            "privacy.unit": "record",
            "privacy.target-epsilon": 8.0,
            "privacy.on-destructive-noise": "warn",
        },
    )

    first, last = lines_of(run)
    assert (last["clients_answered"], last["clients_rejected"]) == (2, 0)
    assert first["validation_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["pairs_preferred"] is None
    assert 0 <= last["pairs_preferred"] <= 1 and 0 <= last["pairs_likelier"] <= 1
    result = json.loads((run / "result.json").read_text())
    assert result["test_examples"] == 6
    assert 0 <= result["test_pairs_preferred"] <= 1
    privacy = json.loads((run / "privacy.json").read_text())
    assert privacy["unit"] == "record" and privacy["epsilon"] <= 8
    assert json.loads((run / "peft_final" / "adapter_config.json").read_text())
