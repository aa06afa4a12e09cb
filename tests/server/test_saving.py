"""Saved rounds, and runs that are killed at any write."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from fedllm import atomic_files
from fedllm.errors import FederationError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.runs import directory
from fedllm.runs.checkpoint import CHECKPOINT_FILE
from fedllm.server.federation import Federation
from tests.helpers.federations import (
    NO_PRIVACY,
    Killed,
    federation,
    kept,
    lines_of,
    read,
    resumed,
    start,
)


def test_peft_alone_opens_the_final_adapter(settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    federation, _ = start({**settings, **NO_PRIVACY, "train.learning-rate": 5.0})
    federation.run()
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])

    model = PeftModel.from_pretrained(base, federation.directory.path / "peft_final")
    weights = {k: v for k, v in model.state_dict().items() if "lora_B" in k}

    assert max(float(v.abs().max()) for v in weights.values()) > 0


@pytest.mark.parametrize(("best", "more"), [(0, set()), (1, {"peft_1"}), (2, set())])
def test_only_due_and_best_rounds_are_kept(quick, monkeypatch, best, more):
    run = federation(
        {**quick, **NO_PRIVACY, "num-server-rounds": 5, "output.save-every": 2}
    )
    losses = iter([1.0 if number == best else 2.0 for number in range(6)])
    monkeypatch.setattr(run.public, "validation_loss", lambda _: next(losses))
    run.run()

    kept = {p.name for p in run.directory.path.glob("peft_[0-9]*")}
    assert kept == {"peft_2", "peft_4", "peft_5"} | more


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_a_run_with_peft_s_own_kinds_leaves_adapters_that_evaluate(
    settings, tiny_llama, kind
):
    federation, _ = start({**settings, "adapter.kind": kind})
    federation.run()

    folder = federation.directory.path
    told = json.loads((folder / "peft_final/adapter_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert told["peft_type"].lower() == kind
    assert f"An adapter of kind {kind}" in card
    assert f"differential-privacy, {kind}]" in card
    lines = lines_of(federation)
    assert lines[1]["clients_rejected"] == 0
    assert lines[2]["validation_loss"] is not None


class Crashes:
    """Kills the run at the k-th write, before it or in the middle of it.

    Every way in which the server changes a disk is counted: k = 0 counts only.
    """

    def __init__(self, patch: pytest.MonkeyPatch, k: int = 0) -> None:
        self.count = 0
        self.k = k
        for owner, name in (
            (atomic_files, "write_synced"),
            (atomic_files, "sync_folder"),
            (Path, "replace"),
            (directory, "save_adapter"),
            (directory.shutil, "rmtree"),
            (directory.shutil, "copytree"),
            (directory.os, "fsync"),
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


def test_with_dp_a_run_killed_at_any_write_never_gets_epsilon_back(quick, monkeypatch):
    # Round 1 is the best whatever the noise: else runs would differ in their writes.
    monkeypatch.setattr(
        PublicRows,
        "validation_loss",
        lambda self, arrays: 1.0 if any(a.any() for a in arrays.values()) else 2.0,
    )
    given = {**quick, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    given["num-server-rounds"] = 2
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
            assert run.progress.next_round == max([0, *paid]) + 1
            run.run()
        told = read(cut, "privacy.json")
        trained = [line["server_round"] for line in lines_of(cut)]
        assert told["releases"] == [1, 2], k
        assert told["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 2, told["delta"]))
        lost = set(paid) - set(done)
        assert trained == [r for r in range(3) if r not in lost], k
        lost_once += len(lost)
        shutil.rmtree(folder)

    assert lost_once > 20


def _finished_rounds(folder: Path) -> list[int]:
    with safetensors.safe_open(folder / CHECKPOINT_FILE, "np") as file:
        last = json.loads(file.metadata()["fedllm"])["server_round"]
    return list(range(1, last + 1))
