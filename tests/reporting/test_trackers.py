"""Trackers get what metrics.jsonl has, and nothing is sent anywhere."""

import pytest

from fedllm.errors import ConfigError
from fedllm.reporting.trackers import make_tracker, numbers, require_tracker
from tests.helpers.sample_runs import line


def test_numbers_are_those_of_the_line_and_nulls_are_none_of_them():
    found = numbers(line(2, 4.5, secret=True))

    assert found == {
        "eval/loss": pytest.approx(3.7),
        "seconds/evaluate": 2.0,
        "seconds/save": 0.1,
        "epsilon": 4.5,
        "train/learning_rate": 1.0,
    }


def test_no_tracker_is_no_tracker(tmp_path):
    assert make_tracker("none", tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_one_line_with_the_command(name, monkeypatch):
    monkeypatch.setattr("fedllm.reporting.trackers.find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=rf"output\.tracker.*{name}.*pip install"):
        require_tracker(name)


def fed(name, folder):
    """Give three rounds to a real tracker."""
    folder.mkdir()
    tracker = make_tracker(name, folder)
    for server_round in range(3):
        tracker.log(server_round, numbers(line(server_round, float(server_round))))
    tracker.close()
    return {p for p in folder.rglob("*") if p.is_file()}


def test_tensorboard_reads_back_what_it_was_given(tmp_path):
    pytest.importorskip("tensorboard")
    fed("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()

    losses = [(e.step, round(e.value, 4)) for e in events.Scalars("eval/loss")]
    assert losses == [(0, 3.9), (1, 3.8), (2, 3.7)]
    assert "seconds/train" in events.Tags()["scalars"]


def test_mlflow_keeps_a_folder_with_the_numbers_and_no_name_of_a_user(tmp_path):
    pytest.importorskip("mlflow")
    files = fed("mlflow", tmp_path / "run")

    (losses,) = (f for f in files if f.parts[-2:] == ("eval", "loss"))
    steps = [row.split()[1:] for row in losses.read_text().splitlines()]
    assert [(float(v), int(s)) for v, s in steps] == [
        (pytest.approx(3.9 - 0.1 * i), i) for i in range(3)
    ]
    tags = {f.name for f in files if f.parent.name == "tags"}
    assert tags == {"mlflow.runName"}


def test_mlflow_takes_the_name_of_its_own_variable(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team/trial")
    files = fed("mlflow", tmp_path / "run")

    texts = [f.read_text() for f in files if f.name == "meta.yaml"]
    assert any("name: team/trial" in text for text in texts)
    assert not any("name: fedllm" in text for text in texts)


def test_wandb_takes_the_project_of_its_own_variable(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "clinic-trial")
    files = fed("wandb", tmp_path / "run")

    (record,) = (f for f in files if f.suffix == ".wandb")
    assert b"clinic-trial" in record.read_bytes()


def test_wandb_is_offline_and_records_nothing_of_the_machine(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    files = fed("wandb", tmp_path / "run")

    (record,) = (f for f in files if f.suffix == ".wandb")
    content = record.read_bytes()
    assert b"eval/loss" in content
    assert record.parent.name.startswith("offline-run")
    names = {f.name for f in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "config.yaml"}
