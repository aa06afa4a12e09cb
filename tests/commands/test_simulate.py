"""The command of a simulation: its options, and what it prints as JSON."""

import json

import pytest

from fedllm.commands import simulate
from tests.helpers.commands import exit_status


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """What is handed to the simulation, which logs a run folder and completes."""
    calls = []
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "result.json").write_text('{"test_loss_after": 2.5}')

    def fake(simulation, home, on_line=None):
        config = [v for v in simulation.run_config if v.endswith(".toml")]
        texts = [(home / name).read_text() for name in config]
        calls.append((simulation, texts))
        if on_line:
            on_line("INFO :      round 0\n")
            on_line(f"INFO :      run folder: {folder}\n")
        return 0

    monkeypatch.setattr(simulate, "simulate", fake)
    return calls


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_no_fraction_of_a_cpu(capsys, number):
    with pytest.raises(SystemExit) as ended:
        simulate.main(["--client-cpus", number])
    assert ended.value.code == 2
    assert "--client-cpus" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--clients", "--num-supernodes"])
def test_clients_have_fedllms_name_and_flowers(simulated, flag):
    simulate.main([flag, "7"])

    assert simulated[0][0].num_clients == 7


def test_a_file_and_pairs_become_one_file_in_which_the_later_value_wins(
    simulated, tmp_path
):
    file = tmp_path / "mine.toml"
    file.write_text('num-server-rounds = 7\n[model]\nname = "a"\nquantization = 8\n')
    pairs = 'model.name="b" num-server-rounds=2 data.partition-alpha=0.5'
    simulate.main(["--run-config", str(file), "--run-config", pairs])

    assert sorted(simulated[0][1][0].splitlines()) == [
        "data.partition-alpha = 0.5",
        'model.name = "b"',
        "model.quantization = 8",
        "num-server-rounds = 2",
    ]


def test_json_is_the_result_alone_and_the_log_goes_to_stderr(
    simulated, capsys, tmp_path
):
    simulate.main(["--json"])
    printed = capsys.readouterr()

    assert json.loads(printed.out) == {
        "completed": True,
        "folder": str(tmp_path / "a run"),
        "result": {"test_loss_after": 2.5},
    }
    assert "round 0" in printed.err


def test_a_run_that_fails_ends_with_its_status(monkeypatch, capsys):
    monkeypatch.setattr(simulate, "simulate", lambda *_: 1)

    assert exit_status(simulate.main, ["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "completed": False,
        "folder": None,
        "result": None,
    }


def test_text_that_flower_would_pass_over_starts_no_run(simulated):
    # Flower takes this for no setting at all, and the run would spend the default.
    with pytest.raises(SystemExit, match="is not part of a key=value pair"):
        simulate.main(["--run-config", "privacy.target-epsilon = 2.0"])

    assert simulated == []


def test_rows_that_name_no_person_start_no_simulation(simulated, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "q", "response": "a", "patient": 1}\n')
    pairs = f'data.name="{rows}" data.person-column='

    with pytest.raises(SystemExit) as ended:
        simulate.main(["--run-config", pairs + '"patent"'])

    assert "no row has the column 'patent'" in str(ended.value.code)
    assert not simulated
    simulate.main(["--run-config", pairs + '"patient"'])
    assert simulated
