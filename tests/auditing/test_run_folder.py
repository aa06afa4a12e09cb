"""A run folder is audited as it was run, and an edited one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import Ledger, no_privacy
from fedllm.runs.directory import RunDirectory
from tests.helpers.audits import audit, quick, sealed

__all__ = ["quick"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def run(home: Path) -> Path:
    """A finished private run of three rounds."""
    config = parse_run_config({"num-server-rounds": 3})
    directory = RunDirectory.create(home, 7)
    directory.write_json("config.json", {"run_config": flat(config)})
    ledger = Ledger.create(
        directory.path / "privacy.json", privacy_settings(config, 12, 500)
    )
    for server_round in range(4):
        if server_round:
            ledger.spend(server_round)
        directory.add_metrics({"server_round": server_round})
    return directory.path


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_a_runs_own_settings_are_audited_and_the_findings_kept(run, capsys):
    assert audit("--run") == 0

    out = capsys.readouterr().out
    assert str(run) in out and "3 rounds" in out
    assert "PASS  ledger of the run: 3 rounds in the ledger, 3 in metrics.jsonl" in out
    written = json.loads((run / "audit.json").read_text())
    assert written["passed"] is True
    assert "Audit: passed" in (run / "report.html").read_text()
    assert written["settings"]["population_size"] == 12
    assert written["rehearsal"]["rounds"] == 3
    assert 7.99 < written["rehearsal"]["accounted"] <= 8.0
    assert written["checks"][0]["name"] == "ledger of the run"


@pytest.mark.parametrize("opened", [3, 2])
def test_a_sealed_run_is_audited_with_the_trustees_that_it_had(home, quick, opened):
    config = sealed(**{"num-server-rounds": 1, "privacy.least-trustees": 2})
    directory = RunDirectory.create(home, 7)
    directory.write_json("config.json", {"run_config": flat(config)})
    settings = privacy_settings(config, 4, 500, trustees=opened)
    Ledger.create(directory.path / "privacy.json", settings).spend(1)
    for server_round in range(2):
        directory.add_metrics({"server_round": server_round})

    assert audit("--run", str(directory.path)) == 0

    written = json.loads((directory.path / "audit.json").read_text())
    assert written["passed"] and written["settings"]["trustees"] == opened


def test_a_run_of_fewer_trustees_than_it_demands_is_an_edited_one(home):
    config = sealed(**{"num-server-rounds": 1})
    directory = RunDirectory.create(home, 7)
    directory.write_json("config.json", {"run_config": flat(config)})
    settings = privacy_settings(config, 4, 500, trustees=2)
    Ledger.create(directory.path / "privacy.json", settings).spend(1)
    directory.add_metrics({"server_round": 0})

    assert "trustees was 2 and is now 3" in str(audit("--run", str(directory.path)))


def test_a_run_whose_ledger_forgets_a_round_fails(run, capsys):
    content = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").unlink()
    config = parse_run_config({"num-server-rounds": 3})
    ledger = Ledger.create(run / "privacy.json", privacy_settings(config, 12, 500))
    ledger.spend(1)
    ledger.spend(3)
    assert (
        json.loads((run / "privacy.json").read_text())["epsilon"] < content["epsilon"]
    )

    assert audit("--run", str(run)) == 1

    out = capsys.readouterr().out
    assert "FAIL  ledger of the run" in out and "it forgets [2]" in out
    assert out.splitlines()[-1] == "FAIL"
    assert json.loads((run / "audit.json").read_text())["passed"] is False


def test_a_run_without_privacy_has_nothing_to_audit(run):
    (run / "privacy.json").write_text(json.dumps(no_privacy(12, 500)))

    error = str(audit("--run"))

    assert "nothing to audit" in error and "\n" not in error
    assert not (run / "audit.json").exists()


def test_a_missing_run_is_named(tmp_path):
    assert "latest: there is no such run folder" in str(audit("--run"))
    assert "there is no such run folder" in str(audit("--run", str(tmp_path / "x")))
    (tmp_path / "x").mkdir()
    assert "has no privacy.json" in str(audit("--run", str(tmp_path / "x")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 1.0}, "was edited: epsilon is 1.0"),
        ({"releases": [1, 2]}, "was edited: num_rounds is 3"),
        ({"releases": [1, 1, 2]}, "was edited: releases"),
        ({"delta": 1.0}, "was edited: delta"),
        ({"noise_multiplier": 5.0}, "was edited: epsilon"),
        ({"clipping_norm": 0.1}, "was edited: chain"),
        # Written by a version that had no chain.
        (
            {"clipping_norm": 0.1, "chain": None},
            "clipping_norm was 0.1 and is now 1.5",
        ),
        ({"sampling": "fixed", "chain": None}, "sampling was 'fixed' and is now 'all'"),
    ],
)
def test_an_edited_ledger_is_rejected(run, changes, words):
    edit(run / "privacy.json", **changes)

    assert words in str(audit("--run"))
    assert not (run / "audit.json").exists()


def test_a_noise_multiplier_edited_with_its_epsilon_is_rejected(run):
    config = parse_run_config(
        {"num-server-rounds": 3, "privacy.target-epsilon": 0.0}
        | {"privacy.noise-multiplier": 0.5}
    )
    (run / "privacy.json").unlink()
    ledger = Ledger.create(run / "privacy.json", privacy_settings(config, 12, 500))
    edit(run / "privacy.json", target_epsilon=8.0)
    del ledger

    assert "above target_epsilon 8" in str(audit("--run"))


@pytest.mark.parametrize("name", ["privacy.json", "config.json", "metrics.jsonl"])
def test_a_truncated_file_is_rejected(run, name):
    text = (run / name).read_text()
    (run / name).write_text(text[: len(text) - 10])

    error = str(audit("--run"))

    assert name in error and "Error: " in error and "\n" not in error
