"""The list of runs: quick, without torch, and never a traceback."""

import json
import subprocess
import sys

import pytest

from fedllm.commands import runs
from fedllm.runs.state import RunState
from tests.helpers.sample_runs import SECRET_COHORTS, write_run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def told(capsys, *arguments):
    runs.main(list(arguments))
    return capsys.readouterr().out


def test_runs_are_listed_newest_first_with_what_matters(home, capsys):
    write_run(home / "2026-01-02_03-04-05_7")
    quiet = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
    write_run(home / "2026-03-02_03-04-05_8", rounds=1, finished=False, **quiet)
    (home / "latest").symlink_to(home / "2026-03-02_03-04-05_8")
    lines = told(capsys).splitlines()

    assert len(lines) == 3
    assert lines[1].split()[:2] == ["2026-03-02", "03:04"]
    for part in ("1/3", "3.900 -> 3.800", " none ", "interrupted"):
        assert part in lines[1]
    for part in ("3/3", "3.750 -> 2.960", " 8.00 ", "finished", "smollm2"):
        assert part in lines[2]


def test_a_running_and_a_failed_run_are_told_apart(home, capsys):
    state = RunState(write_run(home / "2026-01-01_00-00-00_1", finished=False))
    failed = home / "2026-01-01_00-00-00_2"
    failed.mkdir()
    RunState(failed).fail("FederationError: too few")
    found = json.loads(told(capsys, "--json"))

    assert [run["state"] for run in found] == ["failed", "running"]
    assert found[0]["reason"] == "FederationError: too few"
    assert "too few" in told(capsys, "2026-01-01_00-00-00_2")
    state.finish()
    assert json.loads(told(capsys, "--json"))[1]["state"] == "finished"


BREAK = {
    "an empty folder": lambda f: [p.unlink() for p in f.iterdir()],
    "no JSON": lambda f: (f / "config.json").write_text("{"),
    "another type": lambda f: (f / "config.json").write_text('{"run_config": 3}'),
    "no object": lambda f: (f / "privacy.json").write_text("[]"),
    "half a line": lambda f: (f / "metrics.jsonl").write_text(
        '{"server_round": 0, "va'
    ),
    "a line of another kind": lambda f: (f / "metrics.jsonl").write_text("3\n"),
    "a loss that is text": lambda f: (f / "result.json").write_text(
        '{"test_loss_before": "x", "test_loss_after": 1}'
    ),
    "a result without losses": lambda f: (f / "result.json").write_text("{}"),
    "an epsilon that is text": lambda f: (f / "privacy.json").write_text(
        '{"unit": "client", "epsilon": "eight"}'
    ),
    "bytes": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("what", BREAK)
def test_a_damaged_run_is_listed_as_damaged(home, capsys, what):
    write_run(home / "2026-01-01_00-00-00_1")
    BREAK[what](write_run(home / "2026-01-02_00-00-00_2"))
    found = json.loads(told(capsys, "--json"))

    assert [run["state"] for run in found] == ["damaged", "finished"]
    assert found[0]["reason"]
    assert "damaged" in told(capsys).splitlines()[1]
    with pytest.raises(SystemExit, match="damaged"):
        runs.main(["2026-01-02_00-00-00_2"])


def test_one_run_is_shown_with_paths_statement_and_rounds(home, capsys):
    folder = write_run(home / "2026-01-02_03-04-05_7")
    (folder / "peft_final").mkdir()
    (home / "latest").symlink_to(folder)
    text = told(capsys, "latest")
    found = json.loads(told(capsys, "latest", "--json"))

    statement = json.loads((folder / "privacy.json").read_text())["statement"]
    assert statement in text and found["statement"] == statement
    assert str(folder / "report.html") in text and "peft_final" in text
    assert "round    3" in text and "4 of 4 clients answered" in text
    assert [line["server_round"] for line in found["rounds"]] == [0, 1, 2, 3]


def test_a_run_killed_before_its_page_was_written_gets_it_when_it_is_shown(
    home, capsys
):
    folder = write_run(home / "2026-01-02_03-04-05_7")
    (folder / "state.json").write_text('{"state": "running", "reason": null}')

    assert "finished" in told(capsys, folder.name)
    assert "<html" in (folder / "report.html").read_text()
    assert (folder / "README.md").exists()


def test_secret_cohorts_are_not_counted(home, capsys):
    write_run(home / "2026-01-02_03-04-05_7", **SECRET_COHORTS)
    text = told(capsys, "2026-01-02_03-04-05_7")

    assert "clients answered" not in text and "cohorts are secret" in text


def test_no_runs_and_no_such_run_are_one_line(home, capsys):
    assert "no runs in" in told(capsys)
    with pytest.raises(SystemExit, match="there is no such run"):
        runs.main(["nothing"])


def test_it_loads_no_torch_and_takes_under_a_second_of_processor(home):
    for i in range(20):
        write_run(home / f"2026-01-02_03-04-{i:02d}_7")
    script = (
        "import sys, time\n"
        "from fedllm.commands.runs import main\n"
        "main([])\n"
        "assert not {'torch', 'flwr', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert time.process_time() < 1, time.process_time()\n"
    )

    subprocess.run([sys.executable, "-c", script], check=True)
