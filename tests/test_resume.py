"""A run that is cut off anywhere, and what goes on from it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Message, MetricRecord, RecordDict

from fedllm import client, durable, run_directory
from fedllm.checkpoint import CHECKPOINT_FILE
from fedllm.config import flat, parse_run_config
from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.federation import Federation
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.public_rows import PublicRows
from fedllm.replies import ARRAYS, METRICS, array_record
from tests.in_process_grid import InProcessGrid
from tests.test_federation import NO_PRIVACY, lines_of, partitions, settings

__all__ = ["settings"]

ROUNDS = 3


class Killed(BaseException):
    """Stands for kill -9: no handler of errors takes it."""


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
    return Message(content, reply_to=message)


@pytest.fixture
def quick(settings, monkeypatch):
    """Settings of a run of milliseconds: clients that add noise, and a made-up loss."""

    def loss(self: PublicRows, arrays: Any) -> float:
        total = sum(float(np.abs(value).sum()) for value in arrays.values())
        # Best in the middle of the run: what came later must not count after a crash.
        return abs(total % 7 - 3.5) + 1.0

    monkeypatch.setattr(PublicRows, "validation_loss", loss)
    monkeypatch.setattr(PublicRows, "test_loss", lambda self, arrays: None)
    return {
        **settings,
        "num-server-rounds": ROUNDS,
        "strategy.server-optimizer": "adam",
        "strategy.server-learning-rate": 0.05,
        "strategy.server-learning-rate-min": 0.01,
        "train.learning-rate-min": 0.5,
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
    grid.contexts = {
        first_node + index: context
        for index, context in enumerate(grid.contexts.values())
    }
    return Federation(parse_run_config(run_config), grid, run_id)


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
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        del values["seconds"]
        found[f"line {values['server_round']}"] = values
    result = json.loads((folder / "result.json").read_text())
    found["result"] = {**result, "recommended": Path(result["recommended"]).name}
    return found


class Crashes:
    """Kills the run at the k-th write, before it or in the middle of it.

    Every way in which the server changes a disk is counted: k = 0 counts only.
    """

    def __init__(self, patch: pytest.MonkeyPatch, k: int = 0) -> None:
        self.count = 0
        self.k = k
        for owner, name in (
            (durable, "write_synced"),
            (durable, "sync_folder"),
            (Path, "replace"),
            (run_directory, "save_adapter"),
            (run_directory.shutil, "rmtree"),
            (run_directory.shutil, "copytree"),
            (run_directory.os, "fsync"),
            (Path, "write_text"),
        ):
            patch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.k:
                raise Killed(f"before {name}")
            self.count += 1
            if self.count == self.k:
                self.half(name, args)
                raise Killed(f"in the middle of {name}")
            return call(*args, **kwargs)

        return counting

    @staticmethod
    def half(name: str, args: tuple[Any, ...]) -> None:
        """Leave on the disk what a kill in the middle of a call would."""
        if name == "write_synced":
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        elif name == "write_text":
            args[0].write_bytes(args[1].encode()[: len(args[1]) // 2])
        elif name == "copytree":
            args[1].mkdir()
            (args[1] / "adapter_config.json").write_bytes(b"{")
        elif name == "save_adapter":
            args[0].mkdir(exist_ok=True)
            (args[0] / "adapter_model.safetensors").write_bytes(b"half")
        elif name == "rmtree" and args[0].exists():
            for path in list(args[0].iterdir())[:1]:
                path.unlink()
        elif name == "fsync":
            with contextlib.suppress(OSError):
                os.ftruncate(args[0], max(0, os.fstat(args[0]).st_size - 9))


@contextlib.contextmanager
def crashes(k: int = 0) -> Iterator[Crashes]:
    with pytest.MonkeyPatch.context() as patch:
        yield Crashes(patch, k)


def num_writes(given: dict[str, Any]) -> int:
    """Count the writes of a run's whole life after its start."""
    run = federation(given)
    with crashes() as counter:
        run.run()
    return counter.count


def crash_at(given: dict[str, Any], k: int) -> Federation:
    run = federation(given)
    with crashes(k), pytest.raises(Killed):
        run.run()
    return run


def test_without_privacy_a_run_killed_at_any_write_ends_as_if_it_had_not_been(quick):
    given = {**quick, **NO_PRIVACY}
    whole = federation(given)
    whole.run()
    expected = kept(whole.directory.path)
    resumable = 0

    for k in range(1, num_writes(given) + 1):
        cut = crash_at(given, k)
        folder = cut.directory.path
        if not (folder / CHECKPOINT_FILE).exists():
            with pytest.raises(FederationError, match="nothing spent"):
                resumed()
            continue
        if not (folder / "result.json").exists():
            resumed(first_node=200 + 10 * k).run()
            resumable += 1
        assert kept(folder) == expected, k
        shutil.rmtree(folder)

    assert resumable > 60


def test_with_dp_a_run_killed_at_any_write_never_gets_epsilon_back(quick):
    given = {**quick, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    lost_once = 0

    for k in range(1, num_writes(given) + 1):
        cut = crash_at(given, k)
        folder = cut.directory.path
        if not (folder / CHECKPOINT_FILE).exists():
            assert read(cut, "privacy.json")["releases"] == []
            continue
        paid = read(cut, "privacy.json")["releases"]
        done = _finished_rounds(folder)
        if not (folder / "result.json").exists():
            run = resumed(first_node=200 + 10 * k)
            assert run.next_round == max([0, *paid]) + 1
            run.run()
        told = read(cut, "privacy.json")
        trained = [line["server_round"] for line in lines_of(cut)]
        assert told["releases"] == [1, 2, 3], k
        assert told["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 3, told["delta"]))
        lost = set(paid) - set(done)
        assert trained == [r for r in range(4) if r not in lost], k
        lost_once += len(lost)
        shutil.rmtree(folder)

    assert lost_once > 20


def _finished_rounds(folder: Path) -> list[int]:
    with safetensors.safe_open(folder / CHECKPOINT_FILE, "np") as file:
        last = json.loads(file.metadata()["fedllm"])["server_round"]
    return list(range(1, last + 1))
