import errno
import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.adapters import files
from fedllm.adapters.files import read_origin
from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import AdapterSpec
from fedllm.errors import FederationError, FedllmError
from fedllm.runs import directory
from fedllm.runs.directory import METRICS_FILE, RunDirectory, read_json

SPEC = AdapterSpec(
    kind="ffa-lora",
    rank=2,
    alpha=4.0,
    dropout=0.0,
    target_modules=("q_proj",),
    modules={"model.layers.0.self_attn.q_proj": (6, 5)},
    seed=3,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path, 17)


def save_round(folder: RunDirectory, server_round: int, value: float = 0.0) -> Path:
    arrays = {n: np.full_like(a, value) for n, a in initial_arrays(SPEC).items()}
    return folder.save_round(server_round, SPEC, arrays, "base", {"model": "m"})


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_folder_lies_under_home_and_latest_points_at_the_newest(tmp_path):
    first = RunDirectory.create(tmp_path, 1)
    assert (tmp_path / "runs" / "latest").resolve() == first.path.resolve()
    second = RunDirectory.create(tmp_path, 2)

    assert second.path.is_absolute()
    assert second.path.parent == tmp_path / "runs"
    assert second.path.name.endswith("_2")
    assert (tmp_path / "runs" / "latest").resolve() == second.path.resolve()
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_only_its_owner_looks_into_a_run_folder(folder):
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_latest_still_holds_when_the_home_is_moved(tmp_path):
    run = RunDirectory.create(tmp_path / "old", 1)
    (tmp_path / "old").rename(tmp_path / "new")

    assert (tmp_path / "new" / "runs" / "latest").resolve().name == run.path.name


def test_json_has_null_for_what_is_not_finite(folder):
    folder.write_json(
        "x.json", {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5}
    )

    assert read_json(folder.path / "x.json") == {
        "a": None,
        "b": [None, {"c": None}],
        "d": 1.5,
    }


def test_a_metrics_line_is_added_a_round(folder):
    folder.add_metrics({"server_round": 0, "train_loss": math.nan})
    folder.add_metrics({"server_round": 1, "train_loss": 2.0})

    lines = (folder.path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["train_loss"] for line in lines] == [None, 2.0]


def test_a_json_file_is_there_whole_or_as_it_was(folder, monkeypatch):
    folder.write_json("x.json", {"a": 1})
    monkeypatch.setattr(directory.os, "fsync", full_disk)

    with pytest.raises(FederationError):
        folder.write_json("x.json", {"a": 2, "b": "long" * 1000})

    assert read_json(folder.path / "x.json") == {"a": 1}


def test_json_is_synced_before_it_takes_the_name(folder, monkeypatch):
    written = []
    sync = directory.os.fsync
    monkeypatch.setattr(
        directory.os,
        "fsync",
        lambda fd: (written.append((folder.path / "x.json").exists()), sync(fd)),
    )

    folder.write_json("x.json", {"a": 1})

    assert written[0] is False


def test_a_full_disk_is_one_line_that_names_the_way_out(folder, tmp_path, monkeypatch):
    save_round(folder, 1)
    attempts = {
        "metrics": lambda: folder.add_metrics({"a": 1}),
        "json": lambda: folder.write_json("x.json", {"a": 1}),
        "round": lambda: save_round(folder, 2),
        "copy": lambda: folder.copy_adapter(1, "peft_final"),
        "create": lambda: RunDirectory.create(tmp_path, 18),
    }
    monkeypatch.setattr(directory.os, "fsync", full_disk)
    monkeypatch.setattr(directory, "save_adapter", full_disk)
    monkeypatch.setattr(directory.shutil, "copytree", full_disk)
    monkeypatch.setattr(Path, "mkdir", full_disk)

    for attempt in attempts.values():
        with pytest.raises(
            FederationError, match="no space left.*FEDLLM_HOME"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_full_disk_while_weights_are_written_is_one_line(folder, monkeypatch):
    import safetensors.numpy

    def fail(*args: Any, **kwargs: Any) -> None:
        # What safetensors raises when the disk is full.
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)

    with pytest.raises(FederationError, match="no space left.*FEDLLM_HOME"):
        save_round(folder, 1)


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("in the way")

    with pytest.raises(FederationError, match="cannot be written.*FEDLLM_HOME"):
        RunDirectory.create(tmp_path, 1)


def test_a_saved_round_names_its_round(folder):
    path = save_round(folder, 4)

    assert path == folder.path / "peft_4"
    assert read_origin(path)["server_round"] == 4
    assert read_origin(path)["model"] == "m"


def test_a_crash_in_the_middle_leaves_no_half_round(folder, monkeypatch):
    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "peft_config", crash)
    with pytest.raises(KeyboardInterrupt):
        save_round(folder, 1)
    assert not (folder.path / "peft_1").exists()

    monkeypatch.undo()
    save_round(folder, 1)
    assert [p.name for p in folder.path.iterdir()] == ["peft_1"]


def test_a_round_that_is_saved_again_replaces_the_first(folder):
    save_round(folder, 1, 0.0)
    save_round(folder, 1, 2.0)

    from safetensors.numpy import load_file

    values = load_file(folder.path / "peft_1" / "adapter_model.safetensors")
    b = next(value for name, value in values.items() if "lora_B" in name)
    assert (b == 2).all()


def test_best_and_final_are_copies_that_outlive_the_round(folder):
    save_round(folder, 1)
    save_round(folder, 2)
    folder.copy_adapter(1, "peft_best")
    folder.copy_adapter(2, "peft_best")
    folder.drop_round(1)
    folder.drop_round(2)
    folder.drop_round(3)

    assert [p.name for p in folder.path.iterdir()] == ["peft_best"]
    assert read_origin(folder.path / "peft_best")["server_round"] == 2


def test_an_error_of_reading_json_has_its_cause(folder):
    for text in ('{"a": ', "[" * 100_000):
        (folder.path / "x.json").write_text(text)
        with pytest.raises(FedllmError, match="not JSON"):
            read_json(folder.path / "x.json")
    with pytest.raises(FedllmError, match="cannot be read"):
        read_json(folder.path / "y.json")


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "2026-01-01_00-00-00")

    first = RunDirectory.create(tmp_path, 7)
    second = RunDirectory.create(tmp_path, 7)

    assert first.path != second.path
    assert (tmp_path / "runs" / "latest").resolve() == second.path.resolve()
