"""Federations in one process: settings, runs that are cut off, and what they leave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.client import cache, message_handler
from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.evaluation.public_rows import PublicRows
from fedllm.server.federation import Federation
from fedllm.server.startup import set_up
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, METRICS, array_record
from tests.helpers.flower_messages import RUN_ID
from tests.helpers.in_process_grid import InProcessGrid
from tests.helpers.rows import write_rows


@pytest.fixture
def drawings():
    """The page's drawings, for a test that looks at them: they cost half of a run."""


@pytest.fixture
def settings(tiny_llama, tmp_path, monkeypatch, request):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    cache._resident.clear()
    if "drawings" not in request.fixturenames:
        monkeypatch.setattr("fedllm.reporting.page.plots", lambda run: [])
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 0,
        "data.name": write_rows(tmp_path / "train.jsonl", 24),
        "data.public-validation": write_rows(tmp_path / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(tmp_path / "test.jsonl", 5, 200),
        "adapter.rank": 4,
        "num-server-rounds": 2,
        "train.batch-size": 4,
        "train.local-steps": 1,
        "strategy.server-learning-rate": 1.0,
        "strategy.server-learning-rate-min": 1.0,
        "strategy.wait-for-clients": 0.1,
        "strategy.round-timeout": 20.0,
        # A random model's loss under the noise of a few clients moves either way.
        "privacy.on-destructive-noise": "warn",
    }


# With its noise given: to find the noise for a target takes seconds under Poisson sampling.
SECRET_COHORTS = {
    "strategy.sampling": "poisson",
    "strategy.fraction-train": 0.5,
    "privacy.target-epsilon": 0.0,
    "privacy.noise-multiplier": 2.0,
}

# One noise for the records of all clients: six of 24 in a step.
JOINT = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "privacy.target-epsilon": 0.0,
    "privacy.noise-multiplier": 1.0,
    "privacy.delta": 1e-5,
    "train.batch-size": 1,
    "train.gradient-accumulation": 6,
    "train.local-steps": 1,
    "train.learning-rate-min": 0.45,
}

NO_PRIVACY = {"privacy.unit": "none", "privacy.target-epsilon": 0.0}


def partitions(count):
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def start(settings, answer=message_handler.reply_to, nodes=None, order=list):
    run_config = {**flat(parse_run_config({})), **settings}
    nodes = partitions(3) if nodes is None else nodes
    grid = InProcessGrid(nodes, run_config, answer, order)
    return set_up(parse_run_config(run_config), grid, RUN_ID), grid


def lines_of(federation):
    text = (federation.directory.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


EVALUATE = {
    **NO_PRIVACY,
    "data.held-out-fraction": 0.4,
    "strategy.fraction-evaluate": 1.0,
}

ROUNDS = 3


class Killed(BaseException):
    """Stands for kill -9: no handler of errors takes it."""


def kill(*args: Any) -> Any:
    raise Killed


def learner(message: Message, context: Any) -> Message:
    """A client whose update depends on the round, the adapter and its partition."""
    arrays = message.content.array_records[ARRAYS]
    server_round = int(message.content.config_records["config"]["server-round"])
    partition = context.node_config["partition-id"]
    generator = np.random.default_rng([server_round, partition])
    moved = {
        name: value.numpy() * 0.9
        + generator.normal(0, 0.01, value.numpy().shape).astype(np.float32)
        for name, value in arrays.items()
    }
    content = RecordDict({ARRAYS: array_record(moved)})
    content[METRICS] = MetricRecord({"num-examples": 3 + partition, "train-loss": 1.0})
    return Message(masked(content), reply_to=message)


@pytest.fixture
def quick(settings, monkeypatch):
    """Settings of a run of milliseconds: clients that add noise, and a made-up loss."""

    def loss(self: PublicRows, arrays: Any) -> float:
        total = sum(float(np.abs(value).sum()) for value in arrays.values())
        # Best in the middle of the run: what came later must not count after a crash.
        return abs(total % 7 - 3.5) + 1.0

    monkeypatch.setattr(PublicRows, "validation_loss", loss)
    monkeypatch.setattr(PublicRows, "test_loss", lambda self, arrays: None)
    monkeypatch.setattr(
        PublicRows, "answers", lambda self, arrays, asked, length: asked
    )
    # The page is drawn from the other files, and a run that lacks it has lost nothing.
    monkeypatch.setattr("fedllm.reporting.monitor.write_report", lambda folder: None)
    return {
        **settings,
        "num-server-rounds": ROUNDS,
        "strategy.server-optimizer": "adam",
        "strategy.server-learning-rate": 0.05,
        "strategy.server-learning-rate-min": 0.01,
        "train.learning-rate-min": 0.15,
    }


def federation(
    given: dict[str, Any],
    answer: Callable[..., Any] = learner,
    first_node: int = 100,
    run_id: int = 7,
    num_clients: int = 3,
) -> Federation:
    run_config = {**flat(parse_run_config({})), **given}
    grid = InProcessGrid(partitions(num_clients), run_config, answer)
    contexts = list(grid.contexts.values())
    grid.contexts = {first_node + index: c for index, c in enumerate(contexts)}
    for context in contexts:
        context.run_id = run_id
    return set_up(parse_run_config(run_config), grid, run_id)


def resumed(where: str = "latest", **more: Any) -> Federation:
    """The run as `flwr run . --run-config 'resume.from="latest"'` goes on with it."""
    return federation({"resume.from": where}, run_id=8, **more)


def read(run: Federation, name: str) -> Any:
    return json.loads((run.directory.path / name).read_text())


def kept(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves but times, by file and name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("peft_*/adapter_model.safetensors")):
        for name, value in safetensors.numpy.load_file(path).items():
            found[f"{path.parent.name} {name}"] = value.tobytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    untimed = {"seconds": None, "client_seconds": None}
    found["lines"] = [{**json.loads(line), **untimed} for line in lines]
    result = json.loads((folder / "result.json").read_text())
    found["result"] = {**result, "recommended": Path(result["recommended"]).name}
    return found


def cut_in_round(given: dict[str, Any], server_round: int, **more: Any) -> Federation:
    """A run that was killed while it waited for the clients of a round."""

    def answer(message: Message, context: Any) -> Message:
        config = message.content.config_records["config"]
        if config.get("server-round") == server_round:
            raise Killed
        return more.get("answer", learner)(message, context)

    run = federation(given, answer, **{k: more[k] for k in more if k != "answer"})
    with pytest.raises(Killed):
        run.run()
    return run


def edit(run: Federation, name: str, change: Callable[[Any], Any]) -> None:
    path = run.directory.path / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
