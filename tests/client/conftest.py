"""One client with its rows, asked through its message handler."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.client.message_handler import reply_to
from fedllm.config_parsing import parse_run_config
from fedllm.models.location import load_config
from tests.helpers.client_replies import LIMITS, NODE, Answer
from tests.helpers.flower_messages import context, train_instruction
from tests.helpers.tiny_models import SENTENCES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": text[:20], "response": text[20:]} for text in SENTENCES]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def run_config(tiny_llama: Path, data_file: Path) -> dict[str, Any]:
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 0,
        "adapter.rank": 2,
        "data.name": str(data_file),
        "train.batch-size": 2,
        "train.local-steps": 1,
        "num-server-rounds": 5,
    }


@pytest.fixture(scope="module")
def arrays(tiny_llama: Path, run_config: dict[str, Any]) -> dict[str, Any]:
    config = parse_run_config(run_config)
    spec = adapter_spec(config.adapter, load_config(str(tiny_llama)), config.seed)
    return initial_arrays(spec)


@pytest.fixture
def limits(run_config: dict[str, Any]) -> dict[str, Any]:
    """A node's limits, which name the model of the tests."""
    return {**LIMITS, "model-name": run_config["model.name"]}


@pytest.fixture
def answer(run_config: dict[str, Any], arrays: dict[str, Any]) -> Answer:
    """Ask the client once."""

    def ask(
        changes: dict[str, Any] | None = None,
        node: dict[str, Any] = NODE,
        message: Message | None = None,
        **more: Any,
    ) -> Message:
        message = message or train_instruction(arrays, **more)
        return reply_to(message, context({**run_config, **(changes or {})}, node))

    return ask
