"""The doctor: each thing that is wrong is found, with a remedy, and nothing is fetched."""

import json
import os

import pytest

from fedllm.commands import doctor
from tests.helpers.commands import exit_status
from tests.helpers.doctor import examined


def test_a_machine_that_can_run_it_is_told_so(capsys, typed):
    status, checks = examined(capsys, typed)

    assert status == 0
    assert {check["level"] for check in checks.values()} <= {"ok", "note"}
    assert "4 bit works" in checks["quantisation"]["text"]
    assert "4 of 4 rows" in checks["data"]["text"]
    assert not os.path.exists(os.environ["FEDLLM_HOME"])


def test_a_bad_config_is_all_that_is_reported(capsys):
    bad = ["--run-config", "train.batch-size=0 privacy.delta=2.0"]

    assert exit_status(doctor.main, bad) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL  config: privacy.delta")
    assert lines[1].startswith("FAIL  config: train.batch-size")
    assert lines[2:] == ["2 of 2 checks failed"]
    assert exit_status(doctor.main, [*bad, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False


def test_a_screen_for_a_person_has_a_remedy_below_what_failed(capsys, typed):
    pairs = f"model.name='/nowhere' data.name='{typed['data.name']}'"
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--run-config", pairs])
    lines = capsys.readouterr().out.splitlines()

    assert stopped.value.code == 1
    assert len(lines) <= 24
    assert any(line.startswith("FAIL  model: /nowhere") for line in lines)
    assert lines[-1].endswith("checks failed")


def test_a_nodes_rows_are_looked_at_in_place_of_the_machine(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "What?", "response": "That."}\n')
    words = ["--node", str(rows), "--run-config", "model.name='no/such-model'"]
    assert exit_status(doctor.main, words) == 0
    said = capsys.readouterr().out
    assert "minimum:" in said and "device" not in said
    assert said.endswith("a run can use these rows\n")
    rows.write_text("{}\n")
    assert exit_status(doctor.main, [*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ready"] is False
